import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters_store.patterns import Budget, Pattern, PatternError

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "q_proj",
    "xq_proj",
    "lm_head",
    "a",
    "ab.ba.a",
]


def ours(key: str, module: str) -> bool:
    return Pattern(key, Budget(10**7)).matches(module, Budget(10**7))


def peft(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "self_attn.q_proj",
        r"layers\.0\.self_attn\.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "^q_proj",
        r"model\.layers\.(0|1)\..*",
        r".*\.(q|v)_proj",
        r"layers\.\d+\.mlp\..*_proj$",
        r"layers.[0-9]{1,2}.self_attn.(?:q_proj|v_proj)",
        r"layers\.[^0]\..*",
        "(a|b)+.*",
        "q_proj|v_proj",
        "[q-v]_proj",
        r"\w+_proj",
        r"\D*",
        "a??b*",
        "(ab)?(.ba)*.a",
        "{}",
        "a{",
        "a{,2}",
        "x{0}a",
        "[]a]",
        "[^]a]+",
        "",
    ],
)
def test_agrees_with_peft(key: str) -> None:
    assert [ours(key, m) for m in MODULES] == [peft(key, m) for m in MODULES]


@pytest.mark.parametrize(
    "key", ["(a", "a)", "a**", "*a", "(?=a)", "(?i)a", r"\1", r"a\b", "[a", "[z-a]", "a{300}", "(" * 30, "a\\"]
)
def test_refuses_what_it_does_not_understand(key: str) -> None:
    with pytest.raises(PatternError):
        Pattern(key, Budget(10**6))


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|a)*b", "(.*)*(.*)*(.*)*x", "(.*a){20}", "((((a*)*)*)*)*$b", "(a{1,100}){1,100}", ".*" * 400]
)
def test_expression_bombs_end(key: str) -> None:
    before = time.process_time()
    try:
        budget = Budget(200_000)
        pattern = Pattern(key, budget)
        for _ in range(100):
            pattern.matches("a" * 200, budget)
    except PatternError:
        pass
    assert time.process_time() - before < 10  # `re` needs longer than the universe has


PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", "(", ")", "(?:", "|", "*", "+", "?", "{2}", "{1,2}", "{,1}", "^", "$", r"\w"]
)


@settings(max_examples=600, deadline=None, database=None)
@given(st.lists(PIECES, max_size=9).map("".join), st.lists(st.sampled_from("ab."), max_size=7).map("".join))
def test_agrees_with_re_on_random_expressions(key: str, module: str) -> None:
    try:
        pattern = Pattern(key, Budget(10**6))
    except PatternError:
        return
    try:
        expected = peft(key, module)
    except re.error:
        return
    assert pattern.matches(module, Budget(10**6)) == expected
