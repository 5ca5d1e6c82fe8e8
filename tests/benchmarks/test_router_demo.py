"""The router's benchmark on the demo: its prompts are new and frozen, and toy runs say what they must."""

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.scripts import benchmark_script

from loramux.server.demo.skills import adapter_skills, base_skills, split_of

ROOT = Path(__file__).parents[2]
FROZEN = "1f6ecb1ac390614c38741f963b55313c73bc6a107eb52c9d85e86404d14c105c"


@pytest.fixture(scope="module")
def router() -> Iterator[ModuleType]:
    """benchmarks/router.py."""
    with benchmark_script("router") as module:
        yield module


def plain(text: str) -> str:
    """Words alone: what two wordings that differ only in case, marks and arguments share."""
    return " ".join(re.findall(r"[a-z0-9+*/=-]+", text.replace("{x}", " ").lower()))


def known_texts() -> set[str]:
    """Every line of text in the demo and the tests (this set's own file is none of them).

    One word is a line of text where an argument stands by it: else it may be any identifier.
    """
    found = set()
    for folder in ("server/demo", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines = [(plain(line), "{x}" in line) for line in node.value.splitlines()]
                    found.update(line for line, asks in lines if asks or " " in line)
    return found - {""}


def test_the_prompts_are_new(router: Any) -> None:
    prompts = router.router_demo.fresh_prompts()
    wordings = [plain(wording) for wording in {p.wording for p in prompts}]
    assert len(set(wordings)) == len(wordings)
    assert not set(wordings) & known_texts()


def test_the_prompts_are_many_and_frozen(router: Any) -> None:
    prompts = router.router_demo.fresh_prompts()
    assert Counter(p.kind for p in prompts) == {"adapter": 384, "base": 240, "near": 240}
    assert set(Counter(p.skill for p in prompts if p.kind == "adapter").values()) == {48}
    assert {p.adapter for p in prompts} == {"", *(skill.name for skill in adapter_skills())}
    assert min(len({p.wording for p in prompts if p.kind == kind}) for kind in ("base", "near")) >= 48
    texts = json.dumps([[p.kind, p.adapter, p.question.prompt, p.question.answer] for p in prompts])
    assert hashlib.sha256(texts.encode()).hexdigest() == FROZEN


def test_composites_ask_of_one_adapter_or_two(router: Any) -> None:
    own, learnt = {s.name for s in base_skills()}, {s.name for s in adapter_skills()}
    for prompt in router.router_demo.composites():
        skills = prompt.question.skills
        assert prompt.adapter in skills
        assert sum(name in learnt for name in skills) == (1 if prompt.kind == "mixed" else 2)
        assert prompt.kind != "mixed" or own & set(skills)


def test_examples_are_of_the_training_split(router: Any) -> None:
    for skill in adapter_skills():
        examples = router.router_demo.examples_of(skill, 10)
        assert len(set(examples)) == 10
        parts = sorted((wording.partition("{x}") for wording in skill.wordings), key=lambda p: -len(p[0]) - len(p[2]))
        for text in examples:
            before, _, after = next(p for p in parts if text.startswith(p[0]) and text.endswith(p[2]))
            assert split_of(text.removeprefix(before).removesuffix(after)) == "train"


def test_auroc_counts_pairs(router: Any) -> None:
    assert router.router_demo.auroc([3.0, 2.0], [1.0, 2.0]) == (3 + 0.5) / 4
    assert router.router_demo.auroc([1.0], [2.0]) == 0.0


def test_the_demo_is_measured_over_http(router: Any, capsys: pytest.CaptureFixture[str]) -> None:
    demo = router.router_demo
    prompts = list({(p.kind, p.skill): p for p in demo.fresh_prompts()}.values())
    several = list({p.kind: p for p in demo.composites()}.values())
    result = demo.run(lambda *_: None, prompts, several, changed=("roman", "reverse"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["section"] for line in lines] == ["demo, fresh", "demo, changes", "demo, composites"]
    fresh = result["fresh"]
    assert fresh["prompts"] == {"adapter": 8, "base": 6, "near": 8}
    assert fresh["chosen"] == pytest.approx(sum(r["chosen"] for r in fresh["skills"] if r["kind"] == "adapter") / 8)
    assert fresh["auroc"] == pytest.approx((6 * fresh["auroc_base"] + 8 * fresh["auroc_near"]) / 14)
    assert fresh["passed"] == (fresh["auto"] >= 0.98 * fresh["oracle"] and fresh["auroc"] >= 0.95)
    assert [row["adapter"] for row in result["changes"]] == ["roman", "reverse"]
    for row in result["changes"]:
        assert row["adapter"] not in row["misrouted"]
        assert row["abstained"] + sum(row["misrouted"].values()) == pytest.approx(1)
    wholes = {(row["kind"], row["arm"]): row for row in result["composites"]}
    assert wholes["two", "base"]["whole"] == 0
    assert len(wholes) == 8


@pytest.mark.slow
def test_decisions_and_first_tokens_are_timed(router: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = router.router_latency.run(lambda *_: None, adapters=40, registered=(12,), batches={1: 1, 2: 1})
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert line == {"section": "latency", **result}
    assert result["decisions"]["own_adapter_first"] == 1
    assert [(row["adapters"], row["batch"], row["requests"]) for row in result["first_tokens"]] == [
        (12, 1, 1),
        (12, 2, 2),
    ]
    for row in result["first_tokens"]:
        for arm in ("named_ms", "auto_ms"):
            assert 0 < row[arm]["p10"] <= row[arm]["p50"] <= row[arm]["p90"]
