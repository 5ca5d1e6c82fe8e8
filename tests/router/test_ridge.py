"""Ridge regression: the normal equations, updates equal to a refit, candidates that come and go."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.encoders import clustered_table

from loramux.router.scores.budget import NoRoomError
from loramux.router.scores.clusters import fit_clusters, kmeans
from loramux.router.scores.features import Memberships, Partition
from loramux.router.scores.ridge import GramSums, Ridge, RidgeStatistics, RowSums, Sums, collect, fit_groups


def by_gradient(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """The minimiser of sum (y - w.x - b)^2 + alpha |w|^2 as one least-squares problem with an unpenalised column."""
    rows = np.block([[x, np.ones((len(x), 1))], [np.sqrt(alpha) * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))]])
    solution = np.linalg.lstsq(rows, np.concatenate([y, np.zeros(x.shape[1])]), rcond=None)[0]
    return solution[:-1], float(solution[-1])


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("keep_rows", [True, False])
def test_the_minimiser_with_a_free_intercept(rows: int, keep_rows: bool) -> None:
    table = clustered_table(rows)
    statistics = RidgeStatistics(12, keep_rows=keep_rows).add(table.embeddings, table.scores, table.candidates)
    assert isinstance(statistics.groups[0].sums, RowSums) == (keep_rows and rows < 12)
    weights, intercepts = statistics.solve(0.7)
    for j in range(4):
        expected, level = by_gradient(table.embeddings.astype(np.float64), table.scores[:, j], 0.7)
        assert weights[:, j] == pytest.approx(expected, abs=1e-9)
        assert intercepts[j] == pytest.approx(level, abs=1e-9)


def test_updates_are_equal_to_a_refit() -> None:
    """Rows one at a time, in blocks, with gaps, across the change from rows to sums: always the fit on all of them."""
    table = clustered_table(90)
    scores = table.scores.copy()
    generator = np.random.default_rng(3)
    scores[generator.random(scores.shape) < 0.4] = np.nan
    steps = [0, 1, 2, 3, 8, 40, 41, 90]
    grown = RidgeStatistics(12)
    for start, end in itertools.pairwise(steps):
        grown = grown.add(table.embeddings[start:end], scores[start:end], table.candidates)
        whole = Ridge(RidgeStatistics(12).add(table.embeddings[:end], scores[:end], table.candidates), 2.0)
        got = Ridge(grown, 2.0)
        assert set(got.candidates) == set(whole.candidates)
        order = [got.candidates.index(c) for c in whole.candidates]
        assert got.weights[:, order] == pytest.approx(whole.weights, abs=1e-10)
        assert got.intercepts[order] == pytest.approx(whole.intercepts, abs=1e-10)
    for j, candidate in enumerate(table.candidates):
        known = ~np.isnan(scores[:, j])
        expected, level = by_gradient(table.embeddings[known].astype(np.float64), scores[known, j], 2.0)
        place = got.candidates.index(candidate)
        assert got.weights[:, place] == pytest.approx(expected, abs=1e-9)
        assert got.intercepts[place] == pytest.approx(level, abs=1e-9)


def test_a_new_candidate_is_one_more_column() -> None:
    table = clustered_table(200)
    ridge = Ridge.fit(table.columns(["c0", "c1"]), 1.0)
    own = slice(50, 90)  # scored on a part of the queries
    grown = ridge.update(table.embeddings[own], table.scores[own, 2:3], ["c2"])
    assert grown.candidates == ("c0", "c1", "c2")
    assert (grown.weights[:, :2] == ridge.weights).all()
    alone = Ridge.fit(table.rows(np.arange(50, 90)).columns(["c2"]), 1.0)
    assert grown.score(table.embeddings)[:, 2] == pytest.approx(alone.score(table.embeddings)[:, 0], abs=1e-6)
    assert grown.without(["c0", "unknown"]).candidates == ("c1", "c2")
    assert (grown.without(["c0"]).score(table.embeddings) == grown.score(table.embeddings)[:, 1:]).all()
    assert ridge.candidates == ("c0", "c1"), "the scorer in use was changed"


def test_an_update_solves_only_the_groups_with_new_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = clustered_table(60)
    ridge = Ridge.fit(table.columns(["c0", "c1"]), 1.0).update(table.embeddings[:20], table.scores[:20, 2:3], ["c2"])
    solved: list[int] = []
    for kind in (GramSums, RowSums):

        def noting(self: Sums, alpha: float, solve: Any = kind.solve) -> Any:
            solved.append(self.count)
            return solve(self, alpha)

        monkeypatch.setattr(kind, "solve", noting)
    grown = ridge.update(table.embeddings[20:21], table.scores[20:21, 2:3], ["c2"])
    assert solved == [21]
    monkeypatch.undo()
    again = Ridge(grown.statistics, 1.0)
    assert grown.score(table.embeddings) == pytest.approx(again.score(table.embeddings), abs=1e-6)


def test_candidates_with_the_same_rows_share_a_gram_matrix() -> None:
    table = clustered_table(60)
    statistics = collect(table)
    assert [group.candidates for group in statistics.groups] == [table.candidates]
    assert isinstance(statistics.groups[0].sums, GramSums)
    split = statistics.add(table.embeddings[:1], np.array([[0.5]]), ["c2"])
    assert sorted(group.candidates for group in split.groups) == [("c0", "c1", "c3"), ("c2",)]


def test_it_learns_which_candidate_is_good() -> None:
    train, test = clustered_table(240), clustered_table(200, seed=1)
    best = Ridge.fit(train, 1.0).score(test.embeddings).argmax(1)
    assert (best == test.scores.argmax(1)).mean() > 0.95


def test_what_does_not_fit_is_refused() -> None:
    table = clustered_table(20)
    statistics = collect(table)
    with pytest.raises(ValueError, match="do not fit 12 features"):
        statistics.add(table.embeddings[:, :5], table.scores, table.candidates)
    with pytest.raises(ValueError, match="do not fit"):
        statistics.add(table.embeddings, table.scores[:, :2], table.candidates)
    with pytest.raises(ValueError, match="finite"):
        statistics.add(np.full((1, 12), np.nan, np.float32), np.zeros((1, 1)), ["c0"])
    with pytest.raises(ValueError, match="named twice"):
        statistics.add(table.embeddings, table.scores[:, :2], ["a", "a"])
    with pytest.raises(ValueError, match="alpha"):
        statistics.solve(0.0)
    with pytest.raises(ValueError, match="no candidate"):
        Ridge(statistics.without(table.candidates), 1.0)
    with pytest.raises(ValueError, match="no candidate"):
        Ridge(RidgeStatistics(12).add(table.embeddings, np.full((20, 1), np.nan), ["a"]), 1.0)


def test_kmeans_finds_separate_clusters_and_repeats_by_seed() -> None:
    table = clustered_table(300, noise=0.05)
    own = table.scores.argmax(1)
    centroids = kmeans(table.embeddings, 4, seed=0)
    members = Partition.nearest(centroids)(table.embeddings)
    assert len({(int(a), int(b)) for a, b in zip(own, members, strict=True)}) == 4
    assert (centroids == kmeans(table.embeddings, 4, seed=0)).all()
    for j in range(4):
        assert centroids[j] == pytest.approx(table.embeddings[members == j].mean(0), abs=1e-5)
    assert kmeans(table.embeddings[:3], 8, seed=0).shape == (3, 12)
    assert kmeans(np.ones((5, 2), np.float32), 3, seed=0).shape == (1, 2)
    for rows, k in ((table.embeddings, 0), (table.embeddings[:0], 2)):
        with pytest.raises(ValueError, match="k-means needs"):
            kmeans(rows, k, seed=0)


def test_memberships_stand_beside_the_row() -> None:
    two, one = np.array([[1, 0], [0, 1]], np.float32), np.array([[0, 0]], np.float32)
    features = Memberships((Partition.nearest(two), Partition.nearest(one)), scale=2.0)
    half = 2 / np.sqrt(2)
    assert features(np.array([[0.9, 0.2]], np.float32))[0] == pytest.approx([0.9, 0.2, half, 0, half])
    table = clustered_table(100)
    fitted = fit_clusters(table.embeddings, (4, 4, 8), 1.5, seed=1)
    assert fitted.width == 16
    assert not (fitted.partitions[0].weights == fitted.partitions[1].weights).all(), (
        "two clusterings of one size are the same"
    )
    ridge = Ridge.fit(table.rows(np.arange(60)), 1.0, fitted)
    grown = ridge.update(table.embeddings[60:], table.scores[60:], table.candidates)
    whole = Ridge.fit(table, 1.0, fitted)
    assert grown.score(table.embeddings) == pytest.approx(whole.score(table.embeddings), abs=1e-6)


def test_groups_are_learnt_and_give_levels() -> None:
    """Scores depend on the group alone, the rest is noise: with slopes shrunk away the group's best is chosen."""
    table, test = clustered_table(200), clustered_table(200, seed=1)
    generator = np.random.default_rng(0)
    groups, test_groups = table.scores.argmax(1), test.scores.argmax(1)
    scores = np.clip(table.scores[:, ::-1] + generator.normal(0, 0.5, table.scores.shape), 0, 1)
    grouped = replace(table, scores=scores, groups=groups)
    features = fit_groups(grouped, 3.0)
    assert (features.partitions[0](test.embeddings) == test_groups).mean() > 0.95
    best = Ridge.fit(grouped, 100.0, features).score(test.embeddings).argmax(1)
    assert (best == 3 - test_groups).mean() > 0.95
    with pytest.raises(ValueError, match='of one group; "group" in the score file'):
        fit_groups(replace(table, groups=np.zeros(200, np.int64)), 3.0)


@pytest.mark.parametrize("rows", [4, 90])
def test_a_repeated_score_replaces_the_one_before(rows: int) -> None:
    """In rows and in sums, across updates and within one; scores of the training are not known one by one."""
    table = clustered_table(rows)
    first = Ridge.fit(table.columns(["c0", "c1"]), 2.0)
    new = clustered_table(3, seed=4)
    grown = first.update(new.embeddings, new.scores[:, :2], ["c0", "c1"])
    once = first.update(new.embeddings, np.array([[0.25, 0.5], [0.75, *new.scores[1, 1:2]], new.scores[2, :2]]),
                        ["c0", "c1"])  # fmt: skip
    repeated = np.array([[0.0, 0.5], [0.75, np.nan], [0.25, np.nan]])
    twice = grown.update(new.embeddings[[0, 1, 0]], repeated, ["c0", "c1"])
    assert [group.sums.count for group in twice.statistics.groups] == [rows + 3]
    assert twice.score(new.embeddings) == pytest.approx(once.score(new.embeddings), abs=1e-6)
    assert grown.score(new.embeddings) != pytest.approx(once.score(new.embeddings), abs=1e-3), "it was changed itself"
    again = twice.without(["c0"]).update(new.embeddings[:1], np.array([[1.0]]), ["c0"])
    assert again.score(new.embeddings)[:, again.candidates.index("c0")] == pytest.approx([1, 1, 1])


def test_growth_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    table = clustered_table(60)
    ridge = Ridge.fit(table, 1.0)
    one = ridge.statistics.nbytes
    monkeypatch.setattr("loramux.router.scores.ridge.MAX_BYTES", 2 * one)
    new = clustered_table(5, seed=4)
    split = ridge.update(new.embeddings[:1], new.scores[:1, :1], ["c0"])
    assert one < split.statistics.nbytes <= 2 * one
    with pytest.raises(NoRoomError):
        split.update(new.embeddings[1:2], new.scores[1:2, 1:2], ["c1"])
    more = split.update(new.embeddings[1:4], new.scores[1:4, :1], ["c0"])  # sums take no more for more rows
    assert more.statistics.nbytes == split.statistics.nbytes
    monkeypatch.setattr("loramux.router.scores.ridge.MAX_BYTES", 0)
    assert ridge.update(new.embeddings, new.scores, table.candidates).statistics.nbytes == one
    monkeypatch.setattr("loramux.router.scores.ridge.MAX_TAKEN", 4)
    with pytest.raises(NoRoomError):
        more.update(new.embeddings[4:], new.scores[4:, :1], ["c0"])
    more.update(new.embeddings[:1], new.scores[:1, :1], ["c0"])
