"""Which scorer to use: cross-validation on the training data names it, with its hyperparameters.

    estimate(setting) = mean over repeats of the mean over groups of y_{i, argmax_t f_t(x_i)},  f without i's fold

Rows that know fewer than two candidates cannot tell a good choice from a bad one. With too few others (as with feedback
on answers that were chosen) the estimate is -mean (y - f)^2 over all known scores instead, for the families that
predict scores. Ensembles of the families' best settings are estimated from the same out-of-fold scores.

Chosen is the simplest (families in their order, then ensembles by size) within one standard error of the highest
estimate, the error being that of the paired difference over queries (Breiman et al. 1984, "Classification and
regression trees", 3.4.3). Nothing but the table, the families and `seed` decides. A family whose estimate is not finite
(all queries of every candidate in one fold: nothing was predicted) cannot be chosen.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats, Progress, Scorer
from loramux.router.scores.dataset import Doubles, ScoreTable
from loramux.router.scores.ensemble import Ensemble, aligned, combine, spread
from loramux.router.scores.families import (
    ClusteredRidgeFamily,
    Family,
    GroupedRidgeFamily,
    NeighboursFamily,
    RidgeFamily,
    RouterDCFamily,
)

MIN_ROWS = 10
MIN_COMPARABLE = 50
_SHOWN = 5


def default_families() -> tuple[Family, ...]:
    """The simplest first."""
    return RidgeFamily(), GroupedRidgeFamily(), ClusteredRidgeFamily(), NeighboursFamily(), RouterDCFamily()


@dataclass(frozen=True, slots=True)
class Estimate:
    """The best setting of one family, or an ensemble of these (`parts` of more than one).

    parts: (family's place, setting's place, scale of its scores). value: the cross-validated estimate. by_group: the
    same per group. behind, behind_error: how far it is below the highest estimate, and the standard error of that
    difference over queries. failed: why there is none.
    """

    name: str
    setting: str
    parts: tuple[tuple[int, int, float], ...]
    value: float
    by_group: tuple[float, ...] = ()
    behind: float = 0.0
    behind_error: float = 0.0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """What was compared (`estimates`, families first), by which `criterion`, and which was `chosen`."""

    families: tuple[Family, ...]
    estimates: tuple[Estimate, ...]
    criterion: str
    seed: int

    @property
    def chosen(self) -> Estimate:
        return next(e for e in self.estimates if not e.failed and e.behind <= e.behind_error)

    def named(self, name: str) -> Estimate:
        """The estimate of a family or an ensemble. KeyError for another name."""
        return {estimate.name: estimate for estimate in self.estimates}[name]

    def fit(self, table: ScoreTable, estimate: Estimate | None = None, progress: Progress | None = None) -> Scorer:
        """The scorer of an estimate (None: the chosen one) on the whole table."""
        parts = (estimate or self.chosen).parts
        members = [self.families[family].fit(table, (setting,), self.seed, progress)[0] for family, setting, _ in parts]
        return members[0] if len(members) == 1 else Ensemble(tuple(members), tuple(scale for *_, scale in parts))


def select(
    table: ScoreTable,
    families: Sequence[Family] | None = None,
    *,
    seed: int,
    folds: int = 5,
    repeats: int = 1,
    ensembles: bool = True,
    progress: Progress | None = None,
) -> Selection:
    """Compares the families on the table.

    Raises ValueError for too few rows or folds, when no family fits, or when no candidate has scores in two folds.
    """
    if folds < 2 or repeats < 1:
        raise ValueError("folds must be at least 2 and repeats at least 1")
    if len(table.scores) < max(MIN_ROWS, folds):
        raise ValueError(f"{len(table.scores)} scored queries are too few to compare scorers; {MIN_ROWS} are needed")
    if not table.candidates:
        raise ValueError("there is no candidate to score")
    kinds = default_families() if families is None else tuple(families)
    assigned = [_folds(table, folds, s) for s in np.random.SeedSequence(seed).generate_state(repeats)]
    by_choice = np.isfinite(table.chosen(np.zeros_like(table.scores, np.float32))).sum() >= MIN_COMPARABLE
    estimates: list[Estimate] = []
    values: dict[str, Doubles] = {}  # of each estimate, per row: means over repeats
    held_out: list[list[Floats]] = []  # per usable family and repeat: the best setting's out-of-fold scores
    for place, family in enumerate(kinds):
        if not by_choice and not family.in_score_units:
            estimates.append(_failure(family.name, "too few queries were scored on two candidates"))
            continue
        try:
            scores = _out_of_fold(table, family, assigned, seed, progress)
        except ValueError as error:
            estimates.append(_failure(family.name, str(error)))
            continue
        best, values[family.name] = _best(table, family, scores, place, by_choice)
        if not math.isfinite(best.value):
            estimates.append(_failure(family.name, _too_thin(table, folds)))
            continue
        estimates.append(best)
        held_out.append(scores[best.parts[0][1]])
    usable = [e for e in estimates if not e.failed]
    if not usable:
        raise ValueError(f"no scorer can be fitted: {_reasons(estimates)}")
    if ensembles and by_choice:
        for estimate, rows in _ensembles(table, usable, held_out):
            estimates.append(estimate)
            values[estimate.name] = rows
    best = max((e for e in estimates if not e.failed), key=lambda e: e.value)
    compared = tuple(e if e.failed else _compare(table, e, best, values) for e in estimates)
    criterion = "mean score of the chosen candidate" if by_choice else "minus mean squared error of the scores"
    return Selection(kinds, compared, criterion, seed)


def _folds(table: ScoreTable, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold per row, int64 [n]: each group is spread evenly over all folds."""
    order = np.random.default_rng(int(seed)).permutation(len(table.groups))
    order = order[np.argsort(table.groups[order], kind="stable")]
    assigned = np.empty(len(order), np.int64)
    assigned[order] = np.arange(len(order)) % folds
    return assigned


def _out_of_fold(
    table: ScoreTable, family: Family, assigned: list[npt.NDArray[np.int64]], seed: int, progress: Progress | None
) -> list[list[Floats]]:
    """Scores [n, candidates] per setting and repeat, each row's by scorers that were fitted without its fold."""
    grid = tuple(range(len(family.settings())))
    shape = table.scores.shape
    scores = [[np.empty(shape, np.float32) for _ in assigned] for _ in grid]
    rounds = [(repeat, fold) for repeat, folds in enumerate(assigned) for fold in range(int(folds.max()) + 1)]
    for done, (repeat, fold) in enumerate(rounds):
        if progress is not None:
            progress(f"comparing {family.name}", done, len(rounds))
        held = assigned[repeat] == fold
        scorers = family.fit(table.rows(~held), grid, seed + fold, None)
        for setting, scorer in enumerate(scorers):
            scores[setting][repeat][held] = aligned(scorer, table.embeddings[held], table.candidates)
    if progress is not None:
        progress(f"comparing {family.name}", len(rounds), len(rounds))
    return scores


def _best(
    table: ScoreTable, family: Family, scores: list[list[Floats]], place: int, by_choice: bool
) -> tuple[Estimate, Doubles]:
    found = []
    for setting, label in enumerate(family.settings()):
        values = np.mean([_utility(table, part, by_choice) for part in scores[setting]], axis=0)
        parts = ((place, setting, float(np.mean([spread(_finite(part)) for part in scores[setting]]))),)
        found.append((_estimate(table, family.name, label, parts, values), values))
    return max(found, key=lambda pair: pair[0].value)


def _ensembles(
    table: ScoreTable, usable: list[Estimate], held_out: list[list[Floats]]
) -> Iterator[tuple[Estimate, Doubles]]:
    """Every set of two or more families, each at its best setting."""
    for size in range(2, len(usable) + 1):
        for members in combinations(range(len(usable)), size):
            parts = tuple(usable[m].parts[0] for m in members)
            scales = [scale for *_, scale in parts]
            combined = [
                combine([_finite(held_out[m][repeat]) for m in members], scales) for repeat in range(len(held_out[0]))
            ]
            values = np.mean([_utility(table, scores, True) for scores in combined], axis=0)
            name = " + ".join(usable[m].name for m in members)
            setting = "; ".join(usable[m].setting for m in members)
            yield _estimate(table, name, setting, parts, values), values


def _compare(table: ScoreTable, estimate: Estimate, best: Estimate, values: Mapping[str, Doubles]) -> Estimate:
    """The estimate with its distance d from the best: the mean over groups, error^2 = sum of var_g(d) / n_g / G^2."""
    difference = values[best.name] - values[estimate.name]
    errors = []
    for group in np.unique(table.groups):
        rows = difference[(table.groups == group) & np.isfinite(difference)]
        if len(rows):
            errors.append(float(rows.var()) / len(rows))
    error = math.sqrt(sum(errors)) / max(len(errors), 1)
    return replace(estimate, behind=best.value - estimate.value, behind_error=error)


def _utility(table: ScoreTable, scores: Floats, by_choice: bool) -> Doubles:
    """Per row what is to be maximised, NaN where the row says nothing: float64 [n]."""
    if by_choice:
        return table.chosen(scores)
    known = np.isfinite(table.scores) & np.isfinite(scores)
    errors = np.where(known, (np.where(known, scores, 0) - np.where(known, table.scores, 0)) ** 2, 0)
    counts = known.sum(1)
    return np.where(counts > 0, -errors.sum(1) / np.maximum(counts, 1), np.nan)


def _estimate(
    table: ScoreTable, name: str, setting: str, parts: tuple[tuple[int, int, float], ...], values: Doubles
) -> Estimate:
    by_group = tuple(float(v) for v in table.group_means(values))
    return Estimate(name, setting, parts, table.mean(values), by_group)


def _failure(name: str, reason: str) -> Estimate:
    return Estimate(name, "", (), -math.inf, failed=reason)


def _reasons(failures: Sequence[Estimate]) -> str:
    """Why families failed, each reason once."""
    names: dict[str, list[str]] = {}
    for failure in failures:
        names.setdefault(failure.failed, []).append(failure.name)
    return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())


def _too_thin(table: ScoreTable, folds: int) -> str:
    """Which candidates lack scores, the fewest first, and how many scored queries are needed."""
    counts = (~np.isnan(table.scores)).sum(0)
    order = np.argsort(counts, kind="stable")
    few = [f"{table.candidates[j] or 'the base'} has {counts[j]}" for j in order[:_SHOWN]]
    more = f", {len(order) - _SHOWN} more have too few" if len(order) > _SHOWN else ""
    return f"score each adapter on {folds} queries or more ({', '.join(few)}{more})"


def _finite(scores: Floats) -> Floats:
    """-inf (a candidate that a fold had no score of) replaced by the row's lowest finite score, or 0."""
    known = np.isfinite(scores)
    lowest = np.where(known, scores, np.inf).min(1, keepdims=True)
    return np.where(known, scores, np.where(np.isfinite(lowest), lowest, 0)).astype(np.float32)
