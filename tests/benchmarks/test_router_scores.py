"""The router's benchmark end to end on invented files: what it prints, that nothing is chosen on test data."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.encoders import save_encoder
from support.scripts import benchmark_script

from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.families import NeighboursFamily, RidgeFamily, RouterDCFamily
from loramux.router.scores.routerdc import RouterDCOptions
from loramux.router.scores.select import select

QUICK = (RidgeFamily(), NeighboursFamily((5,), (0.1,)), RouterDCFamily((RouterDCOptions(steps=50),)))
TASKS = ("mmlu_{}", "gsm8k-{}", "cmmlu_{}", "arc_challenge_{}", "humaneval_{}")


def write(folder: Path, *, test_scores: float) -> None:
    """Five sets in RouterDC's layout; model m<i> is good at set i; test scores are all `test_scores`."""
    generator = np.random.default_rng(0)
    for split, rows in (("train", 40), ("test", 6)):
        for i, pattern in enumerate(TASKS):
            lines = []
            for _ in range(rows):
                words = " ".join(f"w{w}" for w in generator.integers(10 * i, 10 * i + 10, 6))
                good = {f"m{j}": 0.9 * (i == j) if split == "train" else test_scores for j in range(5)}
                lines.append({"question": words, "scores": good})
            (folder / f"{pattern.format(split)}.json").write_text(json.dumps(lines))


@pytest.fixture
def router() -> Iterator[ModuleType]:
    """benchmarks/router.py."""
    with benchmark_script("router") as module:
        yield module


@pytest.mark.parametrize("test_scores", [0.9, 0.0])
def test_it_prints_an_object_per_rung_and_holds_the_bar(
    router: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    test_scores: float,
) -> None:
    write(tmp_path, test_scores=test_scores)
    encoder = save_encoder(tmp_path / "encoder", pooling="mean_tokens")
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(router.router_scores, "plot", lambda *given: drawn.append(given))
    monkeypatch.setattr(router.router_scores, "select", lambda t, given=QUICK, **options: select(t, given, **options))
    monkeypatch.setattr(
        sys, "argv",
        ["router.py", str(tmp_path), "--sections", "scores", "--seeds", "2", "--threads", "1",
         "--encoder", str(encoder), "--out", str(out), "--plot", str(plot), "--cache", str(tmp_path / "cache.sqlite")],
    )  # fmt: skip
    code = router.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rungs = {line["rung"]: line for line in lines[:-1]}
    assert {"ridge", "knn", "routerdc"} <= rungs.keys()
    assert sum(line["chosen"] for line in rungs.values()) == 1
    for line in rungs.values():
        assert list(line["per_task"]) == ["mmlu", "gsm8k", "cmmlu", "arc_c", "humaneval"]
        assert line["id_mean"] == pytest.approx(np.mean(list(line["per_task"].values())))
    assert lines[-1] == json.loads(out.read_text())
    steps = lines[-1]["sections"]["scores"]["candidates_one_at_a_time"]
    assert [step["candidates"] for step in steps] == [1, 2, 3, 4, 5]
    assert max(step["update_error"] for step in steps) < 1e-5
    # the multiple-choice sets count any score above 0 as 1, the others count the score itself
    mean = 100 * (3 * (test_scores > 0) + 2 * test_scores) / 5
    assert all(line["id_mean"] == pytest.approx(mean) for line in rungs.values())
    assert code == (0 if mean >= 57.5 else 1)
    [(plotted, plotted_steps, where)] = drawn
    assert {"ridge", "knn", "routerdc"} <= {line["rung"] for line in plotted}
    assert (plotted_steps, where) == (steps, plot)


def test_the_plot_is_drawn(router: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    tasks = dict.fromkeys(router.router_scores.TASKS, 50.0)
    steps = [{"candidates": i, "added": "m", "update_error": 0.0, "ridge": 50.0, "oracle": 60.0} for i in (1, 2)]
    router.router_scores.plot(
        [{"rung": "ridge", "id_mean": 50.0, "per_task": tasks}], steps, tmp_path / "sub" / "p.svg"
    )
    assert "<svg" in (tmp_path / "sub" / "p.svg").read_text()


def test_a_missing_folder_is_named(
    router: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["router.py", str(tmp_path / "none")])
    assert router.main() == 2
    assert "RouterDC" in capsys.readouterr().err


def test_the_interval_is_that_of_the_paired_difference(router: Any) -> None:
    """Every query gains 2 points: no width. Gains of 0 or 10 at random: the normal interval of their mean."""
    groups = np.repeat(np.arange(5), 400)
    data = ScoreTable(np.zeros((2000, 1), np.float32), np.zeros((2000, 2)), ("a", "b"), groups)
    base = np.random.default_rng(0).random(2000)
    interval = router.router_scores.confidence_interval
    assert interval(base + 0.02, base, data) == pytest.approx((2.0, 2.0))
    gains = 0.1 * np.random.default_rng(1).integers(0, 2, 2000)
    error = 100 * gains.std() / np.sqrt(2000)
    low, high = interval(base + gains, base, data)
    assert (low, high) == pytest.approx(
        (100 * gains.mean() - 1.96 * error, 100 * gains.mean() + 1.96 * error), abs=0.02
    )
