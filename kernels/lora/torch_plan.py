"""How the batched products of a step are laid out: built once per plan, used at every site.

Every slot of a step is one entry: all tokens of the step that use it, with a weight per token. An entry of long ranges
(prefill) is a large product by itself: it runs straight from the adapter's own tensors into the output, range by range;
or in a group with the prompts of the same length before and behind it, if their adapters' rows lie as they do. The
other entries whose adapters share a bank are put into groups of similar token counts, one batched product each:

- a *view* group runs over the bank's rows [lo, hi) in place; rows in between that have no entry are computed and
  thrown away;
- a *gather* group copies its entries' rows first, where fewer bytes are moved that way.

A pattern (the groups of some entries on some rows) depends on row numbers only, so all sites where the same adapters
sit on the same rows share it, index tensors included.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .interface import Segment

SHORT = 8
"""Entries of up to this many tokens cost about the same, since reading the weights dominates."""
_READ = 8
_COPY = 16
_LAUNCH = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """All tokens of the step that use one slot, ascending, and their weights.

    `level` is the position of the slot in the token's set: sums over levels go in that order.
    """

    slot: int
    ranges: tuple[tuple[int, int, float, int], ...]
    tokens: np.ndarray
    weights: np.ndarray
    levels: np.ndarray

    @property
    def is_long(self) -> bool:
        """Whether the ranges, (start, end, weight, level) each, are long enough to be products of their own."""
        return len(self.tokens) > SHORT * len(self.ranges)


def make_entries(segments: Sequence[Segment]) -> dict[int, Entry]:
    """One entry per slot. A slot that a segment names twice has the sum of both weights."""
    parts: dict[int, list[tuple[int, int, float, int]]] = {}
    for segment in segments:
        weights: dict[int, float] = {}
        for slot, weight in segment.adapters:
            weights[slot] = weights.get(slot, 0.0) + weight
        for level, (slot, weight) in enumerate(weights.items()):
            parts.setdefault(slot, []).append((segment.start, segment.end, weight, level))
    entries: dict[int, Entry] = {}
    for slot, ranges in parts.items():
        lengths = [end - start for start, end, _, _ in ranges]
        entries[slot] = Entry(
            slot,
            tuple(ranges),
            np.concatenate([np.arange(start, end) for start, end, _, _ in ranges]),
            np.repeat(np.array([weight for _, _, weight, _ in ranges], dtype=np.float32), lengths),
            np.repeat(np.array([level for _, _, _, level in ranges]), lengths),
        )
    return entries


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor: the range [start, stop), or those of `index`."""

    start: int
    stop: int
    index: Tensor | None

    @staticmethod
    def of(numbers: np.ndarray, device: torch.device) -> "Rows":
        """A range where the numbers are consecutive, an index tensor where not."""
        start, stop = int(numbers[0]), int(numbers[0]) + len(numbers)
        if np.array_equal(numbers, np.arange(start, stop)):
            return Rows(start, stop, None)
        return Rows(start, stop, torch.from_numpy(np.ascontiguousarray(numbers)).to(device))

    def take(self, x: Tensor) -> Tensor:
        """The rows of x: itself or a view for a range, a copy for an index."""
        if self.index is not None:
            return x.index_select(0, self.index)
        return x if self.stop - self.start == len(x) else x[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Group:
    """One batched product: bank rows `rows` (m of them), `length` tokens each, padded by repeating a token.

    `source` are the m * length input rows. `sums` are (rows of out, rows of the product or None for all), one per
    level. `weights` is [m, length, 1] float32, or [m, 1, 1] where equal along a row, or None where all are one.
    `levels` [m * length, 1] are the columns of gates, None where all are 0. `aligned`: product row i is output row
    sums[0][0].start + i, for all i.
    """

    rows: Rows
    count: int
    length: int
    source: Rows
    sums: tuple[tuple[Rows, Rows | None], ...]
    weights: Tensor | None
    levels: Tensor | None
    aligned: bool

    def gates(self, gates: Tensor) -> Tensor:
        """The gates [tokens, n] of the group's rows, [m, length, 1]."""
        rows = self.source.take(gates)
        own = rows[:, :1] if self.levels is None else rows.gather(1, self.levels)
        return own.reshape(self.count, self.length, 1)


@dataclass(frozen=True, slots=True)
class Pattern:
    """The groups of the entries of one bank. `scattered`: a view of their rows would be mostly holes."""

    groups: tuple[Group, ...]
    scattered: bool


def _cost(rows: Sequence[int], length: int) -> tuple[int, bool]:
    """(cost, whether a view is cheaper than a gather), in units of one token of one row."""
    view = (max(rows) - min(rows) + 1) * (_READ + length)
    gather = len(rows) * (_READ + _COPY + length)
    return min(view, gather) + _LAUNCH, view <= gather


def _make_group(entries: Sequence[Entry], rows: Sequence[int], length: int, view: bool, device: torch.device) -> Group:
    lo = min(rows) if view else 0
    count = max(rows) - lo + 1 if view else len(rows)
    places = [row - lo for row in rows] if view else range(len(rows))
    source = np.full((count, length), entries[0].tokens[0], dtype=np.int64)
    weights = np.ones((count, length, 1), dtype=np.float32)
    columns = np.zeros((count, length), dtype=np.int64)
    tokens, positions, levels = [], [], []
    for place, entry in zip(places, entries, strict=True):
        size = len(entry.tokens)
        source[place, :size] = entry.tokens
        weights[place, :size, 0] = entry.weights
        weights[place, size:, 0] = entry.weights[-1]
        columns[place, :size] = entry.levels
        tokens.append(entry.tokens)
        positions.append(np.arange(place * length, place * length + size))
        levels.append(entry.levels)
    token, position, level = np.concatenate(tokens), np.concatenate(positions), np.concatenate(levels)
    sums: list[tuple[Rows, Rows | None]] = []
    for number in range(int(level.max()) + 1):
        chosen = np.flatnonzero(level == number)
        if not len(chosen):
            continue
        chosen = chosen[np.argsort(token[chosen], kind="stable")]
        everything = len(chosen) == count * length and bool(np.all(np.diff(position[chosen]) == 1))
        sums.append((Rows.of(token[chosen], device), None if everything else Rows.of(position[chosen], device)))
    if np.all(weights == 1):
        scale = None
    else:
        same = bool(np.all(weights == weights[:, :1]))
        scale = torch.from_numpy(weights[:, :1] if same else weights).to(device)
    gate_columns = torch.from_numpy(columns.reshape(-1, 1)).to(device) if columns.any() else None
    bank_rows = Rows(lo, lo + count, None) if view else Rows.of(np.array(rows), device)
    aligned = len(sums) == 1 and sums[0][1] is None and sums[0][0].index is None
    return Group(
        bank_rows, count, length, Rows.of(source.reshape(-1), device), tuple(sums), scale, gate_columns, aligned
    )


def even_runs(entries: Mapping[int, Entry], slots: Iterable[int], most: int) -> list[tuple[int, ...]]:
    """Those of the slots whose one range of up to `most` tokens follows another slot's of equal length, run by run."""
    single = sorted((entries[slot].ranges[0][:2], slot) for slot in slots if len(entries[slot].ranges) == 1)
    runs: list[list[int]] = []
    before = (0, 0)
    for (start, end), slot in single:
        if runs and start == before[1] and end - start == before[1] - before[0]:
            runs[-1].append(slot)
        elif end - start <= most:
            runs.append([slot])
        before = (start, end)
    return [tuple(run) for run in runs if len(run) > 1]


def make_pattern(
    entries: Mapping[int, Entry],
    placed: Sequence[tuple[int, int]],
    runs: Sequence[tuple[int, ...]],
    device: torch.device,
) -> Pattern:
    """Groups the entries of the given (row, slot) pairs by length; the slots of a run are a group as they lie.

    Lengths are classed by powers of two, so that padding stays below 2x; entries of up to `SHORT` tokens share a
    group where that is cheaper than one group per class.
    """
    classes: dict[int, list[tuple[int, int]]] = {}
    row_of = {slot: row for row, slot in placed}
    groups = []
    for run in runs:
        chosen = [entries[slot] for slot in run]
        groups.append(_make_group(chosen, [row_of.pop(slot) for slot in run], len(chosen[0].tokens), True, device))
    for row, slot in sorted((row, slot) for slot, row in row_of.items()):
        classes.setdefault((len(entries[slot].tokens) - 1).bit_length(), []).append((row, slot))

    def plan_group(members: Sequence[tuple[int, int]]) -> tuple[int, bool, int]:
        length = max(len(entries[slot].tokens) for _, slot in members)
        cost, view = _cost([row for row, _ in members], length)
        return cost, view, length

    short = [members for size, members in classes.items() if 1 << size <= SHORT]
    long = [members for size, members in sorted(classes.items()) if 1 << size > SHORT]
    if len(short) > 1:
        together = sorted(member for members in short for member in members)
        if plan_group(together)[0] <= sum(plan_group(members)[0] for members in short):
            short = [together]
    for members in (*short, *long):
        _, view, length = plan_group(members)
        chosen = [entries[slot] for _, slot in members]
        groups.append(_make_group(chosen, [row for row, _ in members], length, view, device))
    rows = [row for row, _ in placed]
    return Pattern(tuple(groups), max(rows) - min(rows) + 1 > 2 * len(rows))
