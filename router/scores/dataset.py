"""Per-query scores of candidates: JSON lines that users upload or feedback adds, and the table that scorers train on.

One line per query: `{"query": "...", "scores": {"candidate": 0.8, ...}, "group": "maths"}`. Scores lie in [0, 1],
higher is better; candidates that were not tried are left out; the key "" is the base. `group` is optional: means over a
data set are means over groups, so that a group of many queries does not outweigh one of few.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramux.adapters_store import strict_json
from loramux.router.interface import Floats

MAX_LINE_BYTES = 1 << 20
MAX_CELLS = 64 << 20  # numbers of a table that a server makes: at most 512 MiB
Doubles = npt.NDArray[np.float64]


class DatasetError(ValueError):
    """A line of scores that cannot be used; the message says which, and what a good one looks like."""


@dataclass(frozen=True, slots=True)
class ScoredQuery:
    """One query with the scores that are known of it, each in [0, 1], and the group it belongs to."""

    query: str
    scores: Mapping[str, float]
    group: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.query, str) or not self.query.strip():
            raise DatasetError('"query" must be a text that is not empty')
        if not isinstance(self.group, str):
            raise DatasetError('"group" must be a text')
        if not isinstance(self.scores, Mapping) or not self.scores:
            raise DatasetError('"scores" must map at least one candidate to a number in [0, 1]')
        for candidate, score in self.scores.items():
            if not isinstance(candidate, str):
                raise DatasetError('the keys of "scores" must be texts')
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise DatasetError(f'the score of "{candidate[:80]}" must be a number in [0, 1], got {score!r:.40}')

    @classmethod
    def from_json(cls, line: bytes) -> "ScoredQuery":
        """One line of the file. Raises DatasetError."""
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(f"longer than {MAX_LINE_BYTES} bytes")
        try:
            value = strict_json.loads(line)
        except ValueError as error:
            raise DatasetError(str(error)) from error
        if not isinstance(value, dict) or not {"query", "scores"} <= value.keys() <= {"query", "scores", "group"}:
            raise DatasetError(
                'must be an object {"query": text, "scores": {candidate: number}, "group": text or absent}'
            )
        return cls(**value)


def read_scores(path: Path) -> list[ScoredQuery]:
    """The rows of a JSON-lines file; blank lines are skipped. Raises DatasetError naming file and line."""
    rows = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(ScoredQuery.from_json(line))
                except DatasetError as error:
                    raise DatasetError(f"{path.name}, line {number}: {error}") from error
    except OSError as error:
        raise DatasetError(f"{path.name} cannot be read: {error.strerror}") from error
    return rows


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """What scorers train on: row i is a query, column j a candidate.

    embeddings float32 [n, dim]; scores float64 [n, candidates], NaN where unknown; groups int64 [n], 0 .. g - 1.
    """

    embeddings: Floats
    scores: Doubles
    candidates: tuple[str, ...]
    groups: npt.NDArray[np.int64]

    def rows(self, which: npt.NDArray[Any]) -> "ScoreTable":
        """The table of some rows: indices or a boolean mask."""
        return ScoreTable(self.embeddings[which], self.scores[which], self.candidates, self.groups[which])

    def columns(self, candidates: Sequence[str]) -> "ScoreTable":
        """The table of some candidates, in the order given. Raises KeyError for one that is not there."""
        places = {candidate: j for j, candidate in enumerate(self.candidates)}
        wanted = [places[candidate] for candidate in candidates]
        return ScoreTable(self.embeddings, self.scores[:, wanted], tuple(candidates), self.groups)

    def chosen(self, predicted: Floats) -> Doubles:
        """Each row's score of the candidate predicted best among those whose score is known: float64 [n].

        NaN for rows that know fewer than two candidates, which cannot tell a good choice from a bad one, and where
        none of those known has a finite prediction.
        """
        known = ~np.isnan(self.scores)
        best = np.where(known, predicted, -np.inf).argmax(1)
        values = self.scores[np.arange(len(best)), best]
        chose = (known & np.isfinite(predicted)).any(1)
        return np.where(chose & (known.sum(1) >= 2), values, np.nan)

    def mean(self, values: Doubles) -> float:
        """The mean over groups of the mean over their rows, NaN left out; NaN when nothing is left."""
        means = self.group_means(values)
        return float(np.mean(means)) if len(means) else math.nan

    def group_means(self, values: Doubles) -> Doubles:
        """The mean of each group that has a value, NaN left out, in the groups' order."""
        usable = ~np.isnan(values)
        counts = np.bincount(self.groups[usable])
        sums = np.bincount(self.groups[usable], values[usable])
        return np.asarray(sums[counts > 0] / counts[counts > 0], np.float64)


def merge(rows: Iterable[ScoredQuery]) -> list[ScoredQuery]:
    """One row per query and group, in order of first appearance; a candidate scored repeatedly has the mean score."""
    seen: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        known = seen.setdefault((row.query, row.group), {})
        for candidate, score in row.scores.items():
            known.setdefault(candidate, []).append(float(score))
    return [
        ScoredQuery(query, {c: math.fsum(values) / len(values) for c, values in known.items()}, group)
        for (query, group), known in seen.items()
    ]


def newest(rows: Sequence[ScoredQuery], dim: int, max_cells: int = MAX_CELLS) -> Sequence[ScoredQuery]:
    """The last of the rows, as many as make a table of `max_cells` numbers: `dim` and one per candidate in each row."""
    candidates = {candidate for row in rows for candidate in row.scores}
    return rows[-max(max_cells // (dim + len(candidates)), 1) :]


def build_table(rows: Sequence[ScoredQuery], embeddings: Floats, candidates: Sequence[str] | None = None) -> ScoreTable:
    """The table of rows and their queries' embeddings [len(rows), dim].

    `candidates` picks and orders the columns; None takes all that occur, sorted. Rows without any of them are left out.
    Raises DatasetError when there are none, when nothing is left, or when the lengths differ.
    """
    if len(rows) != len(embeddings):
        raise DatasetError(f"{len(rows)} queries and {len(embeddings)} embeddings")
    if not rows:
        raise DatasetError("there are no scored queries")
    keys = tuple(sorted({c for row in rows for c in row.scores}) if candidates is None else candidates)
    places = {key: j for j, key in enumerate(keys)}
    scores = np.full((len(rows), len(keys)), np.nan)
    for i, row in enumerate(rows):
        for candidate, score in row.scores.items():
            if candidate in places:
                scores[i, places[candidate]] = score
    names = {name: i for i, name in enumerate(sorted({row.group for row in rows}))}
    groups = np.array([names[row.group] for row in rows], np.int64)
    useful = np.flatnonzero((~np.isnan(scores)).any(1))
    if not len(useful):
        raise DatasetError("no query has a score of any candidate")
    return ScoreTable(embeddings, scores, keys, groups).rows(useful)
