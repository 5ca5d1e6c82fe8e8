"""Constrained answers on a tiny random model: whatever it would like to say, it says what matches."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import (
    EOS,
    byte_tokenizer,
    family_config,
    mixed_recipes,
    random_model,
    save_adapter,
    save_model,
    write_blob,
)

from loramux.server.engine import constraints as constraints_module
from loramux.server.engine import grammars, pace
from loramux.server.engine.constraints import Constraints, Held, Masks
from loramux.server.engine.core import EngineCore
from loramux.server.engine.grammars import ConstraintError
from loramux.server.engine.protocol import Constraint, EngineOutput, EngineRequest
from loramux.server.engine.runner import Runner
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.staging import Staging
from loramux.server.engine.transport import decode_request, encode_request

VOCAB = 264  # five more than the tokenizer has
CAPITAL = "[A-Z][a-z]{1,9}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "d\n"]}, "maxItems": 3},
        "friend": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "kind": {"const": "node"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["kind", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SUM = """\
start: NUMBER ("+" NUMBER)*
NUMBER: /[1-9][0-9]{0,2}/
"""
MARKED = """\
start: <bos> %json {"type": "boolean"} "!"
"""


def schema(value: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags", "friend"]
        and 1 <= len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "bc", "d\n"}
        and value["friend"] in (None, True, False)
    )


def is_tree(text: str) -> bool:
    def holds(node: Any) -> bool:
        return set(node) == {"kind", "children"} and len(node["children"]) <= 2 and all(map(holds, node["children"]))

    return holds(json.loads(text))


KINDS: dict[str, tuple[Constraint, Callable[[str], bool]]] = {
    "person": (schema(PERSON), is_person),
    "tree": (schema(TREE), is_tree),
    "object": (Constraint("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "regex": (Constraint("regex", CAPITAL), lambda text: re.fullmatch(CAPITAL, text) is not None),
    "choice": (Constraint("choice", '["yes", "no", "\\u00e9\\"\\n"]'), lambda text: text in ("yes", "no", 'é"\n')),
    "lark": (Constraint("lark", SUM), lambda text: re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2})*", text) is not None),
    "marked": (Constraint("lark", MARKED), lambda text: text in ("<bos>true!", "<bos>false!")),
}


class Setup:
    """A model with a tokenizer, and adapters."""

    def __init__(self, root: Path) -> None:
        model = random_model(family_config("llama", vocab_size=VOCAB, max_position_embeddings=1024))
        self.model_dir = save_model(model, root / "base", tokenizer=True)
        self.blob_dir = root / "blobs"
        self.tokenizer = byte_tokenizer()
        recipes = mixed_recipes(model)[:3]
        self.digests = [write_blob(model, save_adapter(model, r, root / "adapters"), self.blob_dir) for r in recipes]

    def core(self, **overrides: Any) -> EngineCore:
        return make_core(self.model_dir, self.blob_dir, **overrides)

    def text(self, outputs: list[EngineOutput]) -> str:
        tokens = tokens_of(outputs)
        if outputs[-1].stop_token_id is not None:
            tokens = tokens[:-1]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("constraints"))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def core(setup: Setup, request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    engine = setup.core(overlap=request.param)
    yield engine
    engine.close()


def ask(
    name: str, constraint: Constraint | None, max_tokens: int = 400, seed: int = 0, **sampling: Any
) -> EngineRequest:
    settings = {"temperature": 1.5, "seed": seed, **sampling}
    return request(name, [5, 6, 7, 8, 9], max_tokens, settings.pop("adapters", ()), constraint=constraint, **settings)


def wait(made: Constraints, seq: Sequence) -> None:
    """Returns when the sequence has its matcher."""
    while not made.ready(seq):
        time.sleep(0.001)


def run(core: EngineCore, *requests: EngineRequest) -> dict[str, list[EngineOutput]]:
    for one in requests:
        core.add(one)
    return drain(core)


@pytest.mark.parametrize("kind", list(KINDS))
def test_answers_match(setup: Setup, core: EngineCore, kind: str) -> None:
    constraint, holds = KINDS[kind]
    found = run(core, *(ask(str(seed), constraint, seed=seed) for seed in range(6)))
    ended = 0
    for outputs in found.values():
        if outputs[-1].finish_reason == "stop":
            ended += 1
            assert holds(setup.text(outputs))
        else:
            assert outputs[-1].finish_reason == "length"
            assert len(tokens_of(outputs)) == 400
    assert ended >= 3


def test_greedy_answers_match_too(setup: Setup, core: EngineCore) -> None:
    for kind in ("person", "regex", "choice", "lark", "marked"):
        constraint, holds = KINDS[kind]
        (outputs,) = run(core, ask(kind, constraint, temperature=0.0)).values()
        assert outputs[-1].finish_reason in ("stop", "length")
        if outputs[-1].finish_reason == "stop":
            assert holds(setup.text(outputs))


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_free_rows_of_a_mixed_batch_say_what_they_say_alone(setup: Setup, overlap: bool) -> None:
    """To the last bit, where the model's own numbers do not depend on the batch."""
    core = setup.core(overlap=overlap, deterministic=True)
    free = [
        ask(f"free-{i}", None, 30, seed=i, ignore_eos=True, adapters=[(d, 1.0)] if d else (), **more)
        for i, (d, more) in enumerate(
            [(None, {}), (setup.digests[0], {"temperature": 0.0}), (setup.digests[1], {"logprobs": 2}),
             (None, {"frequency_penalty": 0.5})]
        )
    ]  # fmt: skip
    alone = run(core, *free)
    held = [
        ask(f"held-{i}", KINDS[kind][0], seed=i, adapters=[(setup.digests[i % 3], 1.0)] if i % 2 else ())
        for i, kind in enumerate(KINDS)
    ]
    mixed = run(core, *(one for pair in zip(free, held, strict=False) for one in pair), *held[len(free) :])
    for name, outputs in alone.items():
        assert tokens_of(mixed[name]) == tokens_of(outputs)
        assert [o.logprobs for o in mixed[name]] == [o.logprobs for o in outputs]
    for i, kind in enumerate(KINDS):
        outputs = mixed[f"held-{i}"]
        assert outputs[-1].finish_reason == "length" or KINDS[kind][1](setup.text(outputs))
    core.close()


def test_overlap_changes_nothing(setup: Setup) -> None:
    requests = [ask(kind, KINDS[kind][0], seed=3, adapters=[(setup.digests[0], 1.0)]) for kind in KINDS]
    answers = []
    for overlap in (False, True):
        core = setup.core(overlap=overlap)
        answers.append({name: tokens_of(outputs) for name, outputs in run(core, *requests).items()})
        core.close()
    assert answers[0] == answers[1]


def test_preemption_changes_nothing(setup: Setup) -> None:
    requests = [ask(str(i), KINDS["tree"][0], 120, seed=i) for i in range(6)]
    roomy = setup.core()
    expected = {name: tokens_of(outputs) for name, outputs in run(roomy, *requests).items()}
    roomy.close()
    for overlap in (False, True):
        core = setup.core(overlap=overlap, kv_cache_bytes=102_000, max_model_len=130)
        found = {name: tokens_of(outputs) for name, outputs in run(core, *requests).items()}
        assert core.stats().preemptions > 0
        assert found == expected
        core.close()


def test_the_token_that_completes_it_ends_it(setup: Setup, core: EngineCore) -> None:
    """Nothing can follow a closing brace: no further token is computed, and none is hidden."""
    (outputs,) = run(core, ask("a", schema({"type": "boolean"}), ignore_eos=True)).values()
    assert setup.text(outputs) in ("true", "false")
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id is None


def test_min_tokens_and_ignore_eos_hold_while_more_is_allowed(setup: Setup, core: EngineCore) -> None:
    many = Constraint("regex", "a{0,100}")
    found = run(
        core,
        ask("ignores", many, 200, ignore_eos=True),
        ask("waits", many, 200, min_tokens=20),
        ask("cut", many, 30, ignore_eos=True),
        ask("complete", Constraint("regex", "ab"), 50, min_tokens=40),
    )
    assert setup.text(found["ignores"]) == "a" * 100
    assert found["ignores"][-1].finish_reason == "stop"
    assert 20 <= len(setup.text(found["waits"])) <= 100
    assert found["cut"][-1].finish_reason == "length"
    assert setup.text(found["cut"]) == "a" * 30
    assert setup.text(found["complete"]) == "ab"
    assert found["complete"][-1].finish_reason == "stop"


def test_an_end_of_sequence_ends_what_may_end(setup: Setup, core: EngineCore) -> None:
    (outputs,) = run(core, ask("a", Constraint("regex", "a*"), logit_bias=((EOS, 100.0),))).values()
    assert tokens_of(outputs) == [EOS]
    assert outputs[-1].stop_token_id == EOS


def test_biases_and_penalties_choose_among_what_is_allowed(setup: Setup, core: EngineCore) -> None:
    b = setup.tokenizer.convert_tokens_to_ids("b")
    found = run(
        core,
        ask("biased", Constraint("regex", "[ab]{12}"), logit_bias=((b, 100.0), (200, 100.0))),
        ask("penalised", Constraint("regex", "[ab]{12}"), temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0),
        ask("banned", Constraint("regex", "b{5}"), logit_bias=((b, -100.0),)),
    )
    assert setup.text(found["biased"]) == "b" * 12
    assert set(setup.text(found["penalised"])) == {"a", "b"}
    assert setup.text(found["banned"]) == "bbbbb"


def test_logprobs_are_those_of_the_model_itself(setup: Setup, core: EngineCore) -> None:
    """As for every request: the mask changes what is chosen, and not what is reported."""
    (outputs,) = run(core, ask("a", Constraint("regex", "abc"), logprobs=1)).values()
    tokens = tokens_of(outputs)
    free = ask("b", None, 1, temperature=0.0, logprobs=1)
    (first,) = run(core, free).values()
    rows = np.frombuffer(outputs[0].logprobs or b"").reshape(1, 3)
    assert rows[0, 1:] == pytest.approx(np.frombuffer(first[0].logprobs or b"")[1:])
    assert len(tokens) == 3
    assert all(len(np.frombuffer(o.logprobs or b"")) == 3 for o in outputs)


def test_stop_token_ids_stop_where_they_are_allowed(setup: Setup, core: EngineCore) -> None:
    b = setup.tokenizer.convert_tokens_to_ids("b")
    (outputs,) = run(core, ask("a", Constraint("regex", "a{3}b{3}"), stop_token_ids=(b,))).values()
    assert setup.text(outputs) == "aaa"
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", b)


def test_a_constraint_that_breaks_ends_its_request_alone(
    setup: Setup, core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that needs more lexer states than a matcher may have, from some token on."""
    monkeypatch.setattr(grammars, "_MAX_LEXER_STATES", 60)
    heavy = Constraint("regex", "[a-z]{500}")
    found = run(core, ask("heavy", heavy), ask("light", KINDS["choice"][0]), ask("free", None, 20, ignore_eos=True))
    assert found["heavy"][0].token_ids
    assert found["heavy"][-1].finish_reason == "error"
    assert "constraint" in (found["heavy"][-1].error or "")
    assert found["light"][-1].finish_reason == "stop"
    assert len(tokens_of(found["free"])) == 20


def test_a_constraint_that_holds_up_the_steps_ends_its_request_alone(
    setup: Setup, core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token of this grammar takes longer than the one before, within all of llguidance's limits."""
    monkeypatch.setattr(pace, "SLOW_WORK_SECONDS", 0.005)
    monkeypatch.setattr(pace, "SLOW_MATCHER_SECONDS", 0.005)
    monkeypatch.setattr(grammars, "MAX_SLOW_SECONDS", 0.1)
    heavy = Constraint("lark", 'start: s\ns: s s | "a" | "b"')
    found = run(core, ask("heavy", heavy, ignore_eos=True), ask("light", KINDS["regex"][0]), ask("free", None, 20))
    assert found["heavy"][-1].finish_reason == "error"
    assert "takes too long" in (found["heavy"][-1].error or "")
    assert found["light"][-1].finish_reason == "stop"
    assert found["free"][-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema({"not": {"type": "null"}}), "not"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "#"}), "no text"),
        (Constraint("json_schema", "{"), "EOF"),
        (Constraint("regex", "(?=a)b"), "look-ahead"),
        (Constraint("regex", "(a"), "regex"),
        (Constraint("lark", 'begin: "a"'), "start"),
        (Constraint("lark", "start: <nobody>"), "nobody"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(core: EngineCore, constraint: Constraint, words: str) -> None:
    found = run(core, ask("bad", constraint), ask("good", None, 5, ignore_eos=True))
    assert found["bad"][-1].finish_reason == "error"
    assert found["bad"][-1].error_kind == "request"
    assert words in (found["bad"][-1].error or "")
    assert len(tokens_of(found["good"])) == 5


def test_a_model_without_a_tokenizer_says_so(setup: Setup, tmp_path: Path) -> None:
    bare = save_model(random_model(family_config("llama")), tmp_path / "bare")
    core = make_core(bare, setup.blob_dir)
    (outputs,) = run(core, ask("a", KINDS["regex"][0], 20)).values()
    assert "tokenizer" in (outputs[-1].error or "")
    core.close()


def test_a_missing_package_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    core = setup.core()
    (outputs,) = run(core, ask("a", KINDS["regex"][0])).values()
    assert "pip install llguidance" in (outputs[-1].error or "")
    core.close()


def test_abort_frees_what_is_made_for_a_request(setup: Setup) -> None:
    core = setup.core(max_num_seqs=2)
    for i in range(6):
        core.add(ask(str(i), KINDS["object"][0], 20, seed=i))
    core.step()
    for i in range(5):
        core.abort(str(i))
    found = drain(core)
    assert list(found) == ["5"]
    core.close()


class Counting:
    """Stands for the compiler and counts; `hold` keeps it from ending."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.threads: list[str] = []

    def __call__(self, *args: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return self.real(*args)


def test_a_constraint_that_recurs_is_compiled_once_and_beside_the_steps(
    setup: Setup, core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Counting(constraints_module.compile_constraint)
    monkeypatch.setattr(constraints_module, "compile_constraint", compiler)
    run(core, *(ask(str(seed), KINDS["choice"][0], seed=seed) for seed in range(8)))
    run(core, ask("again", KINDS["choice"][0]), ask("other", KINDS["regex"][0]))
    assert len(compiler.threads) == 2
    assert all(name.startswith("grammar") for name in compiler.threads)


def test_kept_grammars_are_bounded(setup: Setup, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints_module, "MAX_KEPT", 3)
    compiler = Counting(constraints_module.compile_constraint)
    monkeypatch.setattr(constraints_module, "compile_constraint", compiler)
    for i in (0, 1, 2, 0, 3, 0, 1):  # the least lately used one goes: 1 goes for 3
        run(core, ask("a", Constraint("regex", f"{i}")))
    assert len(compiler.threads) == 5


def test_at_most_so_many_are_made_ahead(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Counting(constraints_module.compile_constraint)
    monkeypatch.setattr(constraints_module, "compile_constraint", compiler)
    made = Constraints(setup.model_dir, vocab_size=VOCAB, eos_token_ids=(EOS,), limit=2)
    seqs = [Sequence.from_request(ask(str(i), Constraint("regex", f"{i}"))) for i in range(3)]
    assert not any(made.ready(seq) for seq in seqs)
    while len(compiler.threads) < 2:
        time.sleep(0.001)
    assert not made.ready(seqs[2])
    wait(made, seqs[0])
    wait(made, seqs[2])
    assert len(compiler.threads) == 3
    assert made.ready(Sequence.from_request(ask("free", None)))
    made.release(seqs[1])
    made.close()


def test_a_step_without_constraints_touches_no_mask(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a mask was asked for")

    monkeypatch.setattr(Masks, "apply", never)
    monkeypatch.setattr(Masks, "take", never)
    core = setup.core(overlap=True)
    found = run(core, ask("a", None, 10, ignore_eos=True), ask("b", None, 10, ignore_eos=True, temperature=0.0))
    assert [len(tokens_of(outputs)) for outputs in found.values()] == [10, 10]
    core.close()


def test_the_model_is_launched_before_the_last_tokens_are_waited_for(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    compute, take = Runner.compute, Masks.take

    def computed(*args: Any) -> Any:
        order.append("launch")
        return compute(*args)

    def taken(self: Masks, held: Held, tokens: Any) -> None:
        if not held.is_taken:
            order.append("take")
        take(self, held, tokens)

    monkeypatch.setattr(Runner, "compute", computed)
    monkeypatch.setattr(Masks, "take", taken)
    core = setup.core(overlap=True)
    run(core, ask("a", Constraint("regex", "abcdef")))
    core.close()
    assert order[:2] == ["launch", "launch"]
    assert order[2:10] == ["take", "launch"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 2), (1,), (0, 1, 2)])
def test_masks_are_exact(setup: Setup, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Allowed tokens keep their logits, all others of the constrained rows are impossible; other rows are untouched."""
    made = Constraints(setup.model_dir, vocab_size=VOCAB, eos_token_ids=(EOS,), limit=8)
    seqs = [Sequence.from_request(ask(str(row), Constraint("regex", "[ac]x|" + "a" * (row + 1)))) for row in rows]
    for seq in seqs:
        wait(made, seq)
    made.close()
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    masks, held = Masks(torch.device("cpu")), Held(rows, tuple(seqs))
    masked = masks.apply(logits, held, {rows[0]: (EOS, setup.tokenizer.convert_tokens_to_ids("a"))})
    assert torch.equal(logits, before)
    assert masked.dtype == dtype
    for row in range(3):
        allowed = set(range(VOCAB))
        if row in rows:
            allowed = set(setup.tokenizer.convert_tokens_to_ids(["c"] if row == rows[0] else ["a", "c"]))
        finite = torch.isfinite(masked[row].float())
        assert set(finite.nonzero().squeeze(1).tolist()) == allowed
        assert torch.equal(masked[row][finite], before[row][finite])


def test_a_mask_is_applied_without_looking_at_the_device(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose tensors have no contents."""
    meta, upload = torch.device("meta"), Staging.upload
    monkeypatch.setattr(Staging, "upload", lambda self, *arrays: [t.to(meta) for t in upload(self, *arrays)])
    made = Constraints(setup.model_dir, vocab_size=VOCAB, eos_token_ids=(EOS,), limit=8)
    seq = Sequence.from_request(ask("a", KINDS["person"][0]))
    wait(made, seq)
    made.close()
    for rows in (1, 4):
        logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16, device=meta)
        masked = Masks(torch.device("cpu")).apply(logits, Held((0,), (seq,)), {0: (EOS,)})
        assert (masked.device, masked.dtype, masked.shape) == (meta, torch.bfloat16, logits.shape)


def test_a_request_crosses_the_wire_with_its_constraint() -> None:
    for constraint in (None, *(constraint for constraint, _ in KINDS.values())):
        sent = ask("a", constraint)
        assert decode_request(msgpack.unpackb(msgpack.packb(encode_request(sent)))) == sent


def test_an_unready_sequence_is_not_waited_for(setup: Setup) -> None:
    made = Constraints(setup.model_dir, vocab_size=VOCAB, eos_token_ids=(EOS,), limit=1)
    seq = Sequence.from_request(ask("a", schema({"not": {}})))
    assert not made.ready(seq)
    with pytest.raises(ConstraintError, match="not"):
        wait(made, seq)
    made.close()
