"""Nearest neighbours against the formula written out, with gaps in the scores."""

import math

import numpy as np
import pytest
from support.encoders import clustered_table

from loramux.router.scores.budget import NoRoomError
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.knn import Neighbours


def by_hand(table: ScoreTable, query: np.ndarray, j: int, k: int, temperature: float) -> float:
    known = [i for i in range(len(table.scores)) if not math.isnan(table.scores[i, j])]
    if not known:
        return -math.inf
    cosine = {i: float(query @ table.embeddings[i]) / float(np.linalg.norm(query)) for i in known}
    near = sorted(known, key=lambda i: -cosine[i])[:k]
    weights = [math.exp(cosine[i] / temperature) for i in near]
    return sum(w * table.scores[i, j] for w, i in zip(weights, near, strict=True)) / sum(weights)


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (7, 0.05), (500, 0.2)])
def test_the_weighted_mean_over_the_nearest_that_know(k: int, temperature: float) -> None:
    table = clustered_table(60)
    table.scores[np.random.default_rng(0).random(table.scores.shape) < 0.3] = np.nan
    table.scores[:, 3] = np.nan
    queries = 3 * clustered_table(20, seed=5).embeddings
    got = Neighbours.fit(table, k, temperature).score(queries)
    expected = [[by_hand(table, query, j, k, temperature) for j in range(4)] for query in queries]
    assert got.dtype == np.float32
    assert got == pytest.approx(np.array(expected), rel=1e-4)


def test_many_queries_are_scored_as_few_are() -> None:
    table = clustered_table(50)
    neighbours = Neighbours.fit(table, 5, 0.1)
    queries = clustered_table(1100, seed=2).embeddings
    assert neighbours.score(queries)[[0, 600, 1099]] == pytest.approx(
        neighbours.score(queries[[0, 600, 1099]]), abs=1e-6
    )
    assert neighbours.score(queries[:0]).shape == (0, 4)


def test_updates_are_equal_to_a_refit() -> None:
    table = clustered_table(60)
    queries = clustered_table(20, seed=5).embeddings
    first = Neighbours.fit(table.rows(np.arange(40)).columns(["c0", "c1"]), 5, 0.1)
    grown = first.update(table.embeddings[40:], table.scores[40:], table.candidates)
    gaps = table.scores.copy()
    gaps[:40, 2:] = np.nan
    whole = Neighbours.fit(ScoreTable(table.embeddings, gaps, table.candidates, table.groups), 5, 0.1)
    assert grown.candidates == table.candidates
    assert grown.score(queries) == pytest.approx(whole.score(queries), abs=1e-6)
    left = grown.without(["c1", "unknown"])
    assert left.candidates == ("c0", "c2", "c3")
    assert left.score(queries) == pytest.approx(grown.score(queries)[:, [0, 2, 3]], abs=1e-6)


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (1, 0.0), (1, math.nan)])
def test_hyperparameters_are_checked(k: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Neighbours.fit(clustered_table(10), k, temperature)


def test_a_repeated_score_replaces_the_one_before() -> None:
    table = clustered_table(40)
    first = Neighbours.fit(table.rows(np.arange(30)), 5, 0.1)
    grown = first.update(table.embeddings[25:], table.scores[25:] / 2, table.candidates)
    halved = table.scores.copy()
    halved[25:] /= 2
    assert np.array_equal(grown.rows, Neighbours.fit(table, 5, 0.1).rows)
    assert np.array_equal(grown.scores, halved)
    new = clustered_table(1, seed=4)
    opinions = np.array([[0.1, np.nan], [np.nan, 0.2], [0.3, np.nan]])
    last = grown.update(new.embeddings[[0, 0, 0]], opinions, ["c1", "new"])
    assert len(last.rows) == 41
    assert np.array_equal(last.scores[40], [np.nan, 0.3, np.nan, np.nan, 0.2], equal_nan=True)
    assert np.array_equal(first.scores, table.scores[:30]), "the scorer in use was changed"


def test_growth_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    table = clustered_table(40)
    first = Neighbours.fit(table.rows(np.arange(30)), 5, 0.1)
    row = 12 * 4 + 4 * 8
    monkeypatch.setattr("loramux.router.scores.knn.MAX_BYTES", 32 * row)
    grown = first.update(table.embeddings[30:32], table.scores[30:32], table.candidates)
    with pytest.raises(NoRoomError):
        grown.update(table.embeddings[32:33], table.scores[32:33], table.candidates)
    assert len(grown.update(table.embeddings[:20], table.scores[:20], table.candidates).rows) == 32
