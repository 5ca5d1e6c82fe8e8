"""Nearest neighbours: a candidate's score is the weighted mean of its scores on the most similar known queries.

    f_t(x) = sum_{i in N_t(x)} w_i y_it / sum_{i in N_t(x)} w_i,     w_i = exp(cos(x, x_i) / temperature)

N_t(x): the k queries of largest cosine among those on which candidate t was scored (all of them when they are fewer).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats
from loramux.router.scores.budget import MAX_BYTES, NoRoomError
from loramux.router.scores.dataset import Doubles, ScoreTable

_QUERIES_AT_ONCE = 512
_CELLS_AT_ONCE = 1 << 22  # of neighbours' scores, 8 bytes each


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A `Scorer` that keeps its queries: rows float32 [n, dim] of norm 1, scores float64 [n, c], NaN where unknown."""

    rows: Floats
    scores: Doubles
    candidates: tuple[str, ...]
    k: int
    temperature: float

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError("k must be at least 1")
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0")

    @classmethod
    def fit(cls, table: ScoreTable, k: int, temperature: float) -> "Neighbours":
        """Nothing is fitted; the table's rows are kept. Raises ValueError for k < 1 or temperature <= 0."""
        return cls(unit(table.embeddings), table.scores, table.candidates, k, temperature)

    def score(self, embeddings: Floats) -> Floats:
        """float32 [n, candidates], in the units of the scores; -inf for a candidate without any score."""
        parts = [
            self._score(embeddings[start : start + _QUERIES_AT_ONCE])
            for start in range(0, len(embeddings), _QUERIES_AT_ONCE)
        ]
        return np.concatenate([np.zeros((0, len(self.candidates)), np.float32), *parts])

    def update(self, embeddings: Floats, scores: Doubles, candidates: Sequence[str]) -> "Neighbours":
        """With more scored queries [n, dim], [n, c] of `candidates`; new ones become columns.

        Scores of a query whose row is there already replace those of the same candidates. Raises `NoRoomError` beyond
        `MAX_BYTES`.
        """
        rows = unit(embeddings)
        keys = (*self.candidates, *(c for c in candidates if c not in self.candidates))
        columns = np.array([keys.index(c) for c in candidates], np.int64)
        places, new = self._places(rows)
        size = len(self.rows) + len(new)
        room = max(MAX_BYTES, self.rows.nbytes + self.scores.nbytes)
        if size * (rows.shape[1] * rows.itemsize + len(keys) * self.scores.itemsize) > room:
            raise NoRoomError
        grown = np.full((size, len(keys)), np.nan)
        grown[: len(self.rows), : len(self.candidates)] = self.scores
        for place, row in zip(places, scores, strict=True):
            known = ~np.isnan(row)
            grown[place, columns[known]] = row[known]
        return Neighbours(np.concatenate([self.rows, rows[new]]), grown, keys, self.k, self.temperature)

    def without(self, candidates: Sequence[str]) -> "Neighbours":
        """Without these candidates; unknown ones are ignored."""
        keep = [j for j, c in enumerate(self.candidates) if c not in candidates]
        keys = tuple(self.candidates[j] for j in keep)
        return Neighbours(self.rows, self.scores[:, keep], keys, self.k, self.temperature)

    def _places(self, rows: Floats) -> tuple[list[int], list[int]]:
        """Where unit rows [n, dim] are among those kept, new ones behind them; and which of `rows` are new."""
        kept: dict[int, int] = {}
        for start in range(0, len(rows) if len(self.rows) else 0, _QUERIES_AT_ONCE):
            part = rows[start : start + _QUERIES_AT_ONCE]
            nearest = (part @ self.rows.T).argmax(1)
            same = np.flatnonzero((self.rows[nearest] == part).all(1))
            kept |= {start + int(i): int(nearest[i]) for i in same}
        new: dict[bytes, int] = {}
        firsts, places = [], []
        for i, row in enumerate(rows):
            if i not in kept:
                if row.tobytes() not in new:
                    new[row.tobytes()] = len(self.rows) + len(new)
                    firsts.append(i)
                kept[i] = new[row.tobytes()]
            places.append(kept[i])
        return places, firsts

    def _score(self, embeddings: Floats) -> Floats:
        cosines = unit(embeddings) @ self.rows.T
        values = np.full((len(embeddings), len(self.candidates)), -np.inf, np.float32)
        for rows, columns in same_rows(self.scores):
            if len(rows):
                values[:, columns] = self._average(cosines[:, rows], self.scores[rows][:, columns])
        return values

    def _average(self, cosines: Floats, scores: Doubles) -> Doubles:
        """[queries, c] from cosines [queries, rows] and scores [rows, c] without gaps."""
        k = min(self.k, cosines.shape[1])
        at_once = max(1, _CELLS_AT_ONCE // (k * scores.shape[1]))
        if len(cosines) > at_once:
            parts = [cosines[i : i + at_once] for i in range(0, len(cosines), at_once)]
            return np.concatenate([self._average(part, scores) for part in parts])
        near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        close = np.take_along_axis(cosines, near, 1).astype(np.float64)
        weights = np.exp((close - close.max(1, keepdims=True)) / self.temperature)
        weights /= weights.sum(1, keepdims=True)
        return np.asarray(np.einsum("qk,qkc->qc", weights, scores[near]), np.float64)


def unit(rows: Floats) -> Floats:
    """Each row over its Euclidean norm; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)


def same_rows(scores: Doubles) -> list[tuple[npt.NDArray[np.int64], list[int]]]:
    """Candidates by the rows that know their score: (row indices, columns) for each set of rows."""
    parts: dict[bytes, list[int]] = {}
    for j in range(scores.shape[1]):
        parts.setdefault((~np.isnan(scores[:, j])).tobytes(), []).append(j)
    return [(np.flatnonzero(np.frombuffer(pattern, bool)), columns) for pattern, columns in parts.items()]
