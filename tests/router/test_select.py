"""Cross-validation: names what generalises, from training data alone, the same by seed; says when it cannot compare."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support.encoders import clustered_table

from loramux.router.interface import Floats, Progress, Scorer
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.ensemble import Ensemble, aligned, combine, spread
from loramux.router.scores.families import (
    ClusteredRidgeFamily,
    Family,
    NeighboursFamily,
    RidgeFamily,
    RouterDCFamily,
)
from loramux.router.scores.ridge import Ridge
from loramux.router.scores.routerdc import RouterDCOptions
from loramux.router.scores.select import default_families, select

HEAD = RouterDCFamily((RouterDCOptions(projection=8, clusters=4, steps=50, learning_rate=1e-2),))
QUICK: tuple[Family, ...] = (
    RidgeFamily((0.1, 1.0)), ClusteredRidgeFamily((1.0,), (4, 4)), NeighboursFamily((3, 20), (0.1,)), HEAD,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constant:
    """A scorer that always prefers one candidate, or that knew the answers of the rows it was fitted on."""

    candidates: tuple[str, ...]
    best: str
    answers: dict[bytes, int] | None = None

    def score(self, embeddings: Floats) -> Floats:
        values = np.zeros((len(embeddings), len(self.candidates)), np.float32)
        values[:, self.candidates.index(self.best)] = 1
        for i, row in enumerate(embeddings):
            if self.answers and row.tobytes() in self.answers:
                values[i] = 0
                values[i, self.answers[row.tobytes()]] = 1
        return values


@dataclass(frozen=True, slots=True)
class ConstantFamily:
    """One constant per candidate; `memory`: it repeats what it has seen, which looks perfect in training."""

    keys: tuple[str, ...]
    memory: bool = False
    name: str = "constant"
    in_score_units: bool = False

    def settings(self) -> tuple[str, ...]:
        return self.keys

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        seen = {row.tobytes(): int(y.argmax()) for row, y in zip(table.embeddings, table.scores, strict=True)}
        return [Constant(table.candidates, self.keys[i], seen if self.memory else None) for i in settings]


def test_estimates_are_the_out_of_fold_metric() -> None:
    """A constant's estimate is its candidate's mean over groups; a memory of the training rows gains nothing by it."""
    table = clustered_table(200)
    means = [table.mean(table.scores[:, j]) for j in range(4)]
    plain = select(table, [ConstantFamily(table.candidates)], seed=0).chosen
    assert plain.value == pytest.approx(max(means))
    assert plain.setting == table.candidates[int(np.argmax(means))]
    assert plain.by_group == pytest.approx(table.group_means(table.scores[:, int(np.argmax(means))]))
    memory = select(table, [ConstantFamily(table.candidates, memory=True)], seed=0).chosen
    assert memory.value == pytest.approx(plain.value)


def test_it_names_what_generalises_and_repeats_by_seed() -> None:
    train, test = clustered_table(150), clustered_table(300, seed=1)
    stages: list[str] = []
    families = (ConstantFamily(train.candidates), *QUICK)
    selection = select(train, families, seed=5, progress=lambda stage, *_: stages.append(stage))
    assert selection.chosen.name != "constant"
    best = max(e.value for e in selection.estimates)
    assert all(e.behind == pytest.approx(best - e.value) for e in selection.estimates)
    assert selection.chosen.behind <= selection.chosen.behind_error
    assert selection.named("constant").behind > selection.named("constant").behind_error
    assert len(selection.estimates) == 5 + 26  # five families, every set of two or more
    assert list(dict.fromkeys(stages)) == [f"comparing {f.name}" for f in families]
    scorer = selection.fit(train)
    assert (scorer.score(test.embeddings).argmax(1) == test.scores.argmax(1)).mean() > 0.9
    assert select(train, families, seed=5) == selection
    assert (selection.fit(train).score(test.embeddings) == scorer.score(test.embeddings)).all()
    assert select(train, families, seed=6) != selection


def test_of_equals_within_an_error_the_simplest_is_chosen() -> None:
    table = clustered_table(150)
    good, bad = RidgeFamily((1.0,)), ConstantFamily(table.candidates)
    assert select(table, [good, NeighboursFamily((20,), (0.1,))], seed=0, ensembles=False).chosen.name == "ridge"
    assert select(table, [NeighboursFamily((20,), (0.1,)), good], seed=0, ensembles=False).chosen.name == "knn"
    assert select(table, [bad, good], seed=0, ensembles=False).chosen.name == "ridge"


def test_the_error_is_that_of_the_paired_difference_over_groups() -> None:
    table = clustered_table(200)
    values = {key: table.scores[:, j] for j, key in enumerate(table.candidates)}
    families = [replace(ConstantFamily((key,)), name=key) for key in table.candidates]
    selection = select(table, families, seed=0, ensembles=False)
    best = max(selection.estimates, key=lambda e: e.value)
    for estimate in selection.estimates:
        difference = values[best.name] - values[estimate.name]
        parts = [difference[table.groups == group] for group in (0, 1)]
        assert estimate.behind == pytest.approx((parts[0].mean() + parts[1].mean()) / 2)
        assert estimate.behind_error == pytest.approx(np.sqrt(sum(p.var() / len(p) for p in parts)) / 2)


def test_hyperparameters_are_chosen_too() -> None:
    table = clustered_table(150)
    generator = np.random.default_rng(0)
    noisy = replace(table, scores=np.clip(table.scores + generator.normal(0, 0.6, table.scores.shape), 0, 1))
    selection = select(noisy, [RidgeFamily((1e-6, 3.0, 1e6))], seed=0, repeats=3)
    assert selection.chosen.setting == "alpha=3"
    by_hand = Ridge.fit(noisy, 3.0).score(table.embeddings)
    assert (selection.fit(noisy).score(table.embeddings) == by_hand).all()


def test_one_score_per_query_is_compared_by_squared_error() -> None:
    """Feedback on what was served: every query knows one candidate."""
    table = clustered_table(300)
    served = np.random.default_rng(7).integers(0, 4, 300)
    scores = np.where(np.arange(4) == served[:, None], table.scores, np.nan)
    selection = select(replace(table, scores=scores), QUICK, seed=0)
    assert selection.criterion == "minus mean squared error of the scores"
    assert selection.named("routerdc").failed == "too few queries were scored on two candidates"
    assert len(selection.estimates) == 4, "ensembles are in no units that an error could be taken of"
    scorer = selection.fit(replace(table, scores=scores))
    test = clustered_table(200, seed=1)
    assert (aligned(scorer, test.embeddings, table.candidates).argmax(1) == test.scores.argmax(1)).mean() > 0.9


def test_a_rare_candidate_may_be_missing_from_a_fold() -> None:
    table = clustered_table(100)
    scores = table.scores.copy()
    scores[1:, 3] = np.nan
    selection = select(replace(table, scores=scores), QUICK, seed=0)
    assert all(math.isfinite(e.value) for e in selection.estimates)


@pytest.mark.parametrize(("rows", "each"), [(12, 1), (60, 2)])
def test_scores_too_thin_to_compare_are_an_error_that_counts_them(rows: int, each: int) -> None:
    """No candidate is scored on two queries, so that none can be predicted from the others."""
    table = clustered_table(rows)
    keys = ("", *(f"a{i}" for i in range(1, rows * each)))
    scores = np.full((rows, rows * each), np.nan)
    scores[np.repeat(np.arange(rows), each), np.arange(rows * each)] = 0.5
    thin = replace(table, scores=scores, candidates=keys)
    with pytest.raises(ValueError, match=r"ridge, clustered ridge, knn: score each adapter on 5 queries") as caught:
        select(thin, QUICK[:3], seed=0)
    assert f"(the base has 1, a1 has 1, a2 has 1, a3 has 1, a4 has 1, {rows * each - 5} more" in str(caught.value)


def test_a_family_that_cannot_be_fitted_is_reported_and_left_out() -> None:
    table = clustered_table(60)
    broken = RouterDCFamily((replace(HEAD.options[0], held_out=0.001),))
    selection = select(table, [RidgeFamily((1.0,)), broken], seed=0)
    assert selection.chosen.name == "ridge"
    assert "too few" in selection.named("routerdc").failed
    with pytest.raises(ValueError, match="no scorer can be fitted: routerdc"):
        select(table, [broken], seed=0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="9 scored queries are too few"):
        select(clustered_table(9), QUICK, seed=0)
    with pytest.raises(ValueError, match="folds must be"):
        select(clustered_table(50), QUICK, seed=0, folds=1)
    with pytest.raises(ValueError, match="no candidate"):
        select(clustered_table(50).columns([]), QUICK, seed=0)


def test_default_families_start_with_the_simplest() -> None:
    assert [f.name for f in default_families()] == ["ridge", "grouped ridge", "clustered ridge", "knn", "routerdc"]
    for family in default_families():
        assert len(set(family.settings())) == len(family.settings())


def test_ensembles_average_differences_in_their_own_scale() -> None:
    a = Constant(("x", "y"), "x")
    b = Constant(("y", "x"), "y")
    rows = np.zeros((1, 2), np.float32)
    assert Ensemble((a, b), (1.0, 0.25)).score(rows)[0] == pytest.approx([0.5 - 2, -0.5 + 2])
    scores = np.array([[0.0, 2.0], [10.0, 12.0]], np.float32)
    assert spread(scores) == pytest.approx(1.0)
    assert spread(np.ones((3, 2), np.float32)) == 1.0
    assert combine([scores, scores], [1.0, 2.0])[1] == pytest.approx([-1.5, 1.5])
    assert np.array_equal(aligned(a, rows, ["y", "new", "x"])[0], [0, -np.inf, 1])
    with pytest.raises(ValueError, match="same candidates"):
        Ensemble((a, Constant(("x", "z"), "x")), (1.0, 1.0))
    with pytest.raises(ValueError, match="as many scales"):
        Ensemble((a,), (1.0, 1.0))
    with pytest.raises(ValueError, match="above 0"):
        Ensemble((a,), (0.0,))
