"""Ridge regression of candidates' scores in closed form, kept as sums that grow with every scored query.

    minimise over w, b:  sum_i (y_i - w.phi(x_i) - b)^2 + alpha |w|^2     per candidate, over the rows it was scored on
    w = (Phi' Phi - n m m' + alpha I)^-1 (Phi' y - n m mean(y)),   b = mean(y) - w.m,   m = mean(phi(x))

The intercept is not penalised. Everything is float64. Candidates scored on the same rows share one Gram matrix, so one
factorisation serves all of them; a new candidate is one more column over its own rows. Groups with fewer rows than
features keep the rows instead, which is smaller, and solve the dual, which is the same solution:

    w = Phi_c' (Phi_c Phi_c' + alpha I)^-1 y_c      (_c: centred)
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats
from loramux.router.scores.budget import MAX_BYTES, MAX_TAKEN, NoRoomError
from loramux.router.scores.dataset import Doubles, ScoreTable
from loramux.router.scores.features import Memberships, Partition

Solution = tuple[Doubles, Doubles]
"""Weights [d, c] and intercepts [c] of c candidates."""

_GROUP_ALPHA = 1.0


@dataclass(frozen=True, slots=True)
class RowSums:
    """The rows themselves: features x [n, d], scores y [n, c]. What `GramSums` holds can be had from them."""

    x: Doubles
    y: Doubles

    @property
    def count(self) -> int:
        return len(self.x)

    def add(self, x: Doubles, y: Doubles) -> "RowSums":
        return RowSums(np.concatenate([self.x, x]), np.concatenate([self.y, y]))

    def take(self, columns: Sequence[int]) -> "RowSums":
        return RowSums(self.x, self.y[:, columns])

    def gram(self) -> "GramSums":
        return GramSums(len(self.x), self.x.sum(0), self.y.sum(0), self.x.T @ self.x, self.x.T @ self.y)

    def solve(self, alpha: float) -> tuple[Doubles, Doubles]:
        """Weights [d, c] and intercepts [c]."""
        centre, level = self.x.mean(0), self.y.mean(0)
        x = self.x - centre
        weights = x.T @ np.linalg.solve(x @ x.T + alpha * np.eye(len(x)), self.y - level)
        return weights, level - centre @ weights

    def correct(self, x: Doubles, change: Doubles) -> "RowSums":
        """With `change` [n, c] added to the scores of rows x [n, d] that are there."""
        y = self.y.copy()
        for i in np.flatnonzero(change.any(1)):
            y[((self.x - x[i]) ** 2).sum(1).argmin()] += change[i]
        return RowSums(self.x, y)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        return {"x": self.x, "y": self.y}


@dataclass(frozen=True, slots=True)
class GramSums:
    """Sums over n rows: x [d], y [c], xx = sum of x x' [d, d], xy = sum of x y' [d, c]."""

    count: int
    x: Doubles
    y: Doubles
    xx: Doubles
    xy: Doubles

    def add(self, x: Doubles, y: Doubles) -> "GramSums":
        """The sums with len(x) more rows: an update of rank len(x)."""
        return GramSums(self.count + len(x), self.x + x.sum(0), self.y + y.sum(0), self.xx + x.T @ x, self.xy + x.T @ y)

    def take(self, columns: Sequence[int]) -> "GramSums":
        return GramSums(self.count, self.x, self.y[columns], self.xx, self.xy[:, columns])

    def solve(self, alpha: float) -> tuple[Doubles, Doubles]:
        """Weights [d, c] and intercepts [c]."""
        centre, level = self.x / self.count, self.y / self.count
        scatter = self.xx - self.count * np.outer(centre, centre)
        scatter[np.diag_indices_from(scatter)] += alpha
        weights = np.asarray(np.linalg.solve(scatter, self.xy - self.count * np.outer(centre, level)), np.float64)
        return weights, level - centre @ weights

    def correct(self, x: Doubles, change: Doubles) -> "GramSums":
        """With `change` [n, c] added to the scores of rows x [n, d] that are among those summed."""
        return GramSums(self.count, self.x, self.y + change.sum(0), self.xx, self.xy + x.T @ change)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        return {"count": np.array([self.count], np.int64), "x": self.x, "y": self.y, "xx": self.xx, "xy": self.xy}


Sums = RowSums | GramSums


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates that were scored on exactly the same rows, and the sums over these."""

    candidates: tuple[str, ...]
    sums: Sums

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(tensor.nbytes for tensor in self.sums.tensors().values())


@dataclass(frozen=True, slots=True)
class RidgeStatistics:
    """All that ridge regression needs of the scored queries; adding rows gives new statistics, the old stay valid.

    Memory: min(n, d) d 8 bytes per group of candidates that share their rows. `keep_rows` False turns every group into
    sums at once (the plain twin of keeping few rows; both solve the same equations).
    """

    dim: int
    groups: tuple[Group, ...] = ()
    keep_rows: bool = True

    @property
    def candidates(self) -> tuple[str, ...]:
        """In the order of the groups."""
        return tuple(c for group in self.groups for c in group.candidates)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(group.nbytes for group in self.groups)

    def add(
        self, features: Floats | Doubles, scores: Doubles, candidates: Sequence[str], max_bytes: int | None = None
    ) -> "RidgeStatistics":
        """With the rows features [n, d] and scores [n, c] of `candidates`, NaN where unknown; new ones become columns.

        Raises ValueError for shapes that do not fit, features that are not finite, or a candidate named twice,
        `NoRoomError` when the sums would take more than `max_bytes`.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim or scores.shape != (len(x), len(candidates)):
            raise ValueError(
                f"features {x.shape} and scores {scores.shape} do not fit {self.dim} features "
                f"and {len(candidates)} candidates"
            )
        if not np.isfinite(x).all() or np.isinf(scores).any():
            raise ValueError("features and scores must be finite (NaN marks a score that is unknown)")
        if len(set(candidates)) != len(candidates):
            raise ValueError("a candidate is named twice")
        column = {c: j for j, c in enumerate(candidates)}
        present = set(self.candidates)
        fresh = [c for c in candidates if c not in present]
        empty = Group(tuple(fresh), RowSums(np.zeros((0, self.dim)), np.zeros((0, len(fresh)))))
        groups: list[Group] = []
        held = 0
        for part in (part for group in (*self.groups, empty) for part in self._extend(group, x, scores, column)):
            groups.append(part)
            held += part.nbytes
            if max_bytes is not None and held > max_bytes:
                raise NoRoomError
        return RidgeStatistics(self.dim, tuple(g for g in groups if g.sums.count), self.keep_rows)

    def correct(self, features: Floats | Doubles, change: Doubles, candidates: Sequence[str]) -> "RidgeStatistics":
        """With `change` [n, c] added to the scores that `candidates` were added with on the rows features [n, d]."""
        x = np.asarray(features, np.float64)
        column = {c: j for j, c in enumerate(candidates)}
        groups = []
        for group in self.groups:
            own = np.zeros((len(x), len(group.candidates)))
            for j, candidate in enumerate(group.candidates):
                if candidate in column:
                    own[:, j] = change[:, column[candidate]]
            groups.append(Group(group.candidates, group.sums.correct(x, own)) if own.any() else group)
        return RidgeStatistics(self.dim, tuple(groups), self.keep_rows)

    def without(self, candidates: Sequence[str]) -> "RidgeStatistics":
        """Without these candidates; unknown ones are ignored."""
        groups = []
        for group in self.groups:
            keep = [j for j, c in enumerate(group.candidates) if c not in candidates]
            if keep:
                groups.append(Group(tuple(group.candidates[j] for j in keep), group.sums.take(keep)))
        return RidgeStatistics(self.dim, tuple(groups), self.keep_rows)

    def solve(self, alpha: float) -> tuple[Doubles, Doubles]:
        """Weights [d, c] and intercepts [c], ordered as `candidates`. Raises ValueError for alpha <= 0 or no rows."""
        if not alpha > 0:
            raise ValueError("alpha must be above 0")
        if not self.groups:
            raise ValueError("no candidate has a score yet")
        return joined([group.sums.solve(alpha) for group in self.groups])

    def _extend(self, group: Group, x: Doubles, scores: Doubles, column: Mapping[str, int]) -> Iterator[Group]:
        """The group with its candidates' new rows, split where they were scored on different ones; itself if none."""
        parts: dict[bytes, list[int]] = {}
        for j, candidate in enumerate(group.candidates):
            known = ~np.isnan(scores[:, column[candidate]]) if candidate in column else np.zeros(len(x), bool)
            parts.setdefault(known.tobytes(), []).append(j)
        if len(parts) == 1 and not any(next(iter(parts))):
            yield group
            return
        for pattern, members in parts.items():
            known = np.frombuffer(pattern, bool)
            names = tuple(group.candidates[j] for j in members)
            sums: Sums = group.sums if len(parts) == 1 else group.sums.take(members)
            if known.any():
                sums = sums.add(x[known], scores[known][:, [column[name] for name in names]])
            if isinstance(sums, RowSums) and sums.count and (sums.count >= self.dim or not self.keep_rows):
                sums = sums.gram()
            yield Group(names, sums)


@dataclass(frozen=True, slots=True)
class Ridge:
    """A `Scorer`: phi(x).w_t + b_t. `features` is phi, or None for phi(x) = x.

    taken: the scores that came by `update`, by the digest of the query's embedding and the candidate.
    """

    statistics: RidgeStatistics
    alpha: float
    features: Memberships | None = None
    known: InitVar[Mapping[int, Solution] | None] = None
    taken: Mapping[tuple[bytes, str], float] = field(default_factory=dict, repr=False)
    solutions: Mapping[int, Solution] = field(init=False, repr=False)
    weights: Doubles = field(init=False)
    intercepts: Doubles = field(init=False)

    def __post_init__(self, known: Mapping[int, Solution] | None) -> None:
        """Solves the groups that are not `known` (by their identity, of the same alpha)."""
        if not self.alpha > 0:
            raise ValueError("alpha must be above 0")
        if not self.statistics.groups:
            raise ValueError("no candidate has a score yet")
        solved = {id(g): (known or {}).get(id(g)) or g.sums.solve(self.alpha) for g in self.statistics.groups}
        weights, intercepts = joined(list(solved.values()))
        object.__setattr__(self, "solutions", solved)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "intercepts", intercepts)

    @classmethod
    def fit(cls, table: ScoreTable, alpha: float, features: Memberships | None = None) -> Self:
        """From scratch. Raises ValueError."""
        return cls(collect(table, features), alpha, features)

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.statistics.candidates

    def score(self, embeddings: Floats) -> Floats:
        """float32 [n, candidates], in the units of the scores."""
        return (_mapped(embeddings, self.features) @ self.weights + self.intercepts).astype(np.float32)

    def update(self, embeddings: Floats, scores: Doubles, candidates: Sequence[str]) -> "Ridge":
        """With more scored queries, or new candidates; equal to a fit on all rows. See `RidgeStatistics.add`.

        A score of a query (an embedding of the same bits) that came by an update before is replaced. Only groups with
        new rows or scores are solved again. Raises `NoRoomError` beyond `MAX_BYTES` or `MAX_TAKEN`.
        """
        new, change, taken = scores.copy(), np.zeros_like(scores), dict(self.taken)
        queries = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in embeddings]
        for i, j in np.argwhere(~np.isnan(scores)):
            key, score = (queries[i], candidates[j]), float(scores[i, j])
            if key in taken:
                new[i, j], change[i, j] = np.nan, score - taken[key]
            taken[key] = score
        if len(taken) > MAX_TAKEN:
            raise NoRoomError
        features, room = _mapped(embeddings, self.features), max(MAX_BYTES, self.statistics.nbytes)
        grown = self.statistics.add(features, new, candidates, room).correct(features, change, candidates)
        return Ridge(grown, self.alpha, self.features, self.solutions, taken)

    def without(self, candidates: Sequence[str]) -> "Ridge":
        """Without these candidates. Raises ValueError when none is left."""
        taken = {key: score for key, score in self.taken.items() if key[1] not in candidates}
        return Ridge(self.statistics.without(candidates), self.alpha, self.features, taken=taken)


def joined(solutions: Sequence[Solution]) -> Solution:
    """Solutions of several groups of candidates as one."""
    return np.concatenate([w for w, _ in solutions], 1), np.concatenate([b for _, b in solutions])


def collect(table: ScoreTable, features: Memberships | None = None) -> RidgeStatistics:
    """The statistics of a table."""
    mapped = _mapped(table.embeddings, features)
    return RidgeStatistics(mapped.shape[1]).add(mapped, table.scores, table.candidates)


def _mapped(embeddings: Floats, features: Memberships | None) -> Floats:
    return embeddings if features is None else features(embeddings)


def fit_groups(table: ScoreTable, scale: float) -> Memberships:
    """One partition: the group that a query's embedding looks most like, by ridge regression of the groups' indicators.

    A query to be routed has no group; the training queries' groups (the data sets they come from, say) are learnt like
    this. Raises ValueError when the table has fewer than two groups.
    """
    groups = np.unique(table.groups)
    if len(groups) < 2:
        raise ValueError('the queries are of one group; "group" in the score file tells them apart')
    indicators = (table.groups[:, None] == groups).astype(np.float64)
    names = [str(group) for group in groups]
    statistics = RidgeStatistics(table.embeddings.shape[1]).add(table.embeddings, indicators, names)
    weights, intercepts = statistics.solve(_GROUP_ALPHA)
    return Memberships((Partition(weights.T.astype(np.float32), intercepts.astype(np.float32)),), scale)
