"""The decoding sequences as arrays that are kept from step to step, so that a step touches none of them in Python.

A running sequence whose tokens are computed but for the last is a row here from its first decode to its end; its
length, newest tokens and block table are then the row's, and `leave` brings them back to the sequence. Rows change
when sequences come, go, begin a block, or end; everything else is arithmetic on columns.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from loramux.kernels.lora.interface import Segment
from loramux.server.engine.sampler import INVALID_TOKEN, SamplingColumns
from loramux.server.engine.sequence import PENDING, Sequence
from loramux.server.engine.step import Decodes, Ints, Layout, Tables, segment

_FREE = -1
_FIRST_BLOCKS = 64


@dataclass(slots=True)
class _Group:
    """The rows with one adapter set: its number among the groups, how many rows, and (slot, weight) of its adapters."""

    number: int
    rows: int
    adapters: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a step's decodes, by their index in the step.

    `plain` go on with their token (None stands for all decodes of the step), `asking` may have ended with it, want its
    log-probability or are constrained, and `left` are not in the batch any more. `full` have filled a block with the
    tokens before this one.
    """

    plain: Ints | None
    asking: list[int]
    left: list[int]
    full: list[int]


class Batch:
    """Columns of the decoding sequences, by row. Engine thread only.

    A row's tokens from `len(seq.tokens)` on are in `_recent`, the token at position p in column p % block_size; they
    are handed to the sequence when it begins another block or leaves. `seq.tokens` of a row therefore lacks the newest
    tokens, and never holds `PENDING`.
    """

    def __init__(
        self, max_rows: int, block_size: int, *, vocab_size: int, eos_token_ids: Iterable[int],
        order: Callable[[int], tuple[int, ...]],
    ) -> None:  # fmt: skip
        """`order` sorts adapter slots as the kernels like to meet them."""
        self._block_size = block_size
        self._order = order
        self._free = list(range(max_rows - 1, -1, -1))
        self._next_serial = 0
        self._seqs = np.full(max_rows, None, dtype=object)
        self._request_ids = np.full(max_rows, None, dtype=object)
        self._serial = np.full(max_rows, _FREE, dtype=np.int64)
        self._length, self._limit, self._last, self._source, self._held, self._free_at, self._group = (
            np.zeros(max_rows, dtype=np.int64) for _ in range(7)
        )
        self._is_plain, self._is_adjusted, self._is_scored, self._is_constrained = (
            np.zeros(max_rows, dtype=bool) for _ in range(4)
        )
        self._sampling = SamplingColumns.zeros(max_rows)
        self._recent = np.zeros((max_rows, block_size), dtype=np.int64)
        self._tables: Tables = np.zeros((max_rows, _FIRST_BLOCKS), dtype=np.int32)
        self._groups: dict[bytes, _Group] = {}
        self._free_groups = list(range(max_rows - 1, -1, -1))
        self._end_uses = np.zeros(vocab_size + 1, dtype=np.int64)  # the last is that of `INVALID_TOKEN`, which is -1
        self._end_uses[[*(t for t in eos_token_ids if t < vocab_size), INVALID_TOKEN]] = 1
        self._layout: Layout | None = None
        self._partial: Layout | None = None
        self._places = np.zeros(max_rows, dtype=np.int64)
        self._sorts_due = 0

    def __len__(self) -> int:
        """How many rows are in use."""
        return len(self._serial) - len(self._free)

    def enter(self, seq: Sequence) -> None:
        """Takes in a sequence that holds its adapters, with all tokens computed but the last, which may be pending."""
        row = self._free.pop()
        seq.row = row
        known = len(seq.tokens)
        self._seqs[row], self._request_ids[row] = seq, seq.request_id
        self._serial[row], self._next_serial = self._next_serial, self._next_serial + 1
        self._length[row], self._limit[row], self._last[row] = known, seq.limit, seq.tokens[-1]
        self._source[row], self._held[row] = seq.source, 0
        if seq.tokens[-1] == PENDING:
            seq.tokens.pop()
        sampling = seq.request.sampling
        self._free_at[row] = seq.free_at
        self._is_plain[row] = seq.is_plain
        self._is_adjusted[row] = sampling.is_adjusted
        self._is_scored[row] = sampling.logprobs is not None
        self._is_constrained[row] = seq.matcher is not None
        self._sampling.put(row, sampling)
        self.take_blocks(seq)
        key = seq.current_span.key
        group = self._groups.get(key)
        if group is None:
            adapters = segment(0, 1, seq, seq.current_span).adapters
            group = self._groups[key] = _Group(self._free_groups.pop(), 0, adapters)
            self._sorts_due = 2
        group.rows += 1
        self._group[row] = group.number
        self._count_ends(sampling.stop_token_ids, 1)
        self._layout = None

    def leave(self, seq: Sequence) -> None:
        """Gives the sequence back what is known of it, and the row to others."""
        row = seq.row
        if row is None:
            raise ValueError(f"request {seq.request_id} is in no row")
        length, last = int(self._length[row]), int(self._last[row])
        self._hand_over(row, length - (last == PENDING))
        if last == PENDING:
            seq.tokens.append(PENDING)
        seq.num_computed, seq.source = length - 1, int(self._source[row])
        seq.row = None
        self._seqs[row] = self._request_ids[row] = None
        self._serial[row] = _FREE
        self._free.append(row)
        key = seq.current_span.key
        group = self._groups[key]
        group.rows -= 1
        if not group.rows:
            del self._groups[key]
            self._free_groups.append(group.number)
        self._count_ends(seq.request.sampling.stop_token_ids, -1)
        self._layout = self._partial = None

    def sort(self) -> None:
        """Adapter sets in the kernels' order, for the step that comes: base, single adapters, larger sets.

        Twice after a set is new, since that order may change with the first plan that has the set.
        """
        if not self._sorts_due:
            return
        self._sorts_due -= 1
        places = np.zeros_like(self._places)
        for place, (_, group) in enumerate(sorted(self._groups.items(), key=self._place)):
            places[group.number] = place
        if not np.array_equal(self._places, places):
            self._places = places
            self._layout = None

    def ready(self) -> Ints:
        """The rows that the next step computes: all but those whose last token will be pending until they end."""
        rows = self._arranged().rows
        ready = self._length[rows] < self._limit[rows]
        return rows if ready.all() else rows[ready]

    def short(self, rows: Ints) -> Ints:
        """Those of the rows whose blocks do not hold their last token."""
        return rows[self._length[rows] > self._held[rows] * self._block_size]

    def length(self, seq: Sequence) -> int:
        """Tokens of a sequence in the batch."""
        return int(self._length[seq.row])

    def sequences(self, rows: Ints) -> list[Sequence]:
        """The sequences of the rows."""
        found: list[Sequence] = self._seqs[rows].tolist()
        return found

    def give_blocks(self, rows: Ints, blocks: Seq[int]) -> None:
        """One more block for each of the rows, and for their sequences."""
        held = self._held[rows]
        self._widen(int(held.max()) + 1)
        self._tables[rows, held] = blocks
        self._held[rows] = held + 1
        for seq, block in zip(self._seqs[rows].tolist(), blocks, strict=True):
            seq.blocks.append(block)

    def take_blocks(self, seq: Sequence) -> None:
        """Reads the blocks that the sequence was given itself."""
        held, new = int(self._held[seq.row]), len(seq.blocks)
        self._widen(new)
        self._tables[seq.row, held:new] = np.asarray(seq.blocks)[held:]
        self._held[seq.row] = new

    def decodes(self, rows: Ints) -> Decodes:
        """The next step of rows that `ready` gave."""
        layout = self._arranged()
        if rows is not layout.rows:
            if self._partial is None or not np.array_equal(self._partial.rows, rows):
                self._partial = self._lay_out(rows)
            layout = self._partial
        ends = self._length[rows]
        block, offset = np.divmod(ends - 1, self._block_size)
        slots = self._tables[rows, block] * np.int64(self._block_size) + offset
        return Decodes(
            layout, self._serial[rows], self._last[rows], ends, self._source[rows], slots, self._tables
        )  # fmt: skip

    def advance(self, decodes: Decodes) -> None:
        """The step was launched: its tokens count as computed, and the next ones, in its order, are pending."""
        rows = decodes.layout.rows
        self._length[rows] = decodes.ends + 1
        self._last[rows] = PENDING
        self._source[rows] = np.arange(len(rows))

    def accept(self, decodes: Decodes, tokens: Ints) -> Accepted:
        """Puts the tokens of a step into their places, where the sequences are still rows."""
        rows, ends = decodes.layout.rows, decodes.ends
        here = self._serial[rows] == decodes.serials
        index = None if here.all() else np.flatnonzero(here)
        if index is not None:
            rows, ends, tokens = rows[index], ends[index], tokens[index]
        column = ends % self._block_size
        full = np.flatnonzero(column == 0)
        for row, end in zip(rows[full].tolist(), ends[full].tolist(), strict=True):
            self._hand_over(row, end)
            self._seqs[row].num_computed = end
        self._recent[rows, column] = tokens
        newest = self._length[rows] == ends + 1
        self._last[rows[newest]] = tokens[newest]
        tells = self._is_scored[rows] | self._is_constrained[rows]
        asks = (ends + 1 >= self._limit[rows]) | (self._end_uses[tokens] > 0) | tells
        asking = np.flatnonzero(asks)
        if index is None:
            plain = None if not len(asking) else np.flatnonzero(~asks)
            return Accepted(plain, asking.tolist(), [], full.tolist())
        return Accepted(
            index[~asks], index[asking].tolist(), np.flatnonzero(~here).tolist(), index[full].tolist()
        )  # fmt: skip

    def put(self, seq: Sequence, position: int, token: int) -> None:
        """One token into its place, where a pending one stands, wherever the sequence is."""
        row = seq.row
        if row is None:
            seq.tokens[position] = token
            return
        self._hand_over(row, position)
        self._recent[row, position % self._block_size] = token
        if self._length[row] == position + 1:
            self._last[row] = token

    def _hand_over(self, row: int, end: int) -> None:
        """The sequence's tokens up to `end`, which are known, into its own list."""
        tokens = self._seqs[row].tokens
        known = len(tokens)
        if known < end:
            first = known % self._block_size
            tokens.extend(self._recent[row, first : first + end - known].tolist())

    def _widen(self, blocks: int) -> None:
        """Makes room for block tables of so many blocks."""
        rows, width = self._tables.shape
        if blocks > width:
            tables = np.zeros((rows, max(blocks, 2 * width)), dtype=np.int32)
            tables[:, :width] = self._tables
            self._tables = tables

    def _count_ends(self, token_ids: Iterable[int], change: int) -> None:
        """Rows for which these tokens are an end come or go; ids outside the vocabulary are never chosen."""
        for token in token_ids:
            if token < len(self._end_uses) - 1:
                self._end_uses[token] += change

    def _arranged(self) -> Layout:
        """The layout of all rows."""
        if self._layout is None:
            rows = np.flatnonzero(self._serial != _FREE)
            self._layout = self._lay_out(rows[np.argsort(self._places[self._group[rows]], kind="stable")])
        return self._layout

    def _place(self, item: tuple[bytes, _Group]) -> tuple[int, list[tuple[int, ...]], bytes]:
        key, group = item
        return len(group.adapters), [self._order(slot) for slot, _ in group.adapters], key

    def _lay_out(self, rows: Ints) -> Layout:
        """The layout of these rows."""
        groups = self._group[rows]
        starts = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist()] if len(rows) else []
        adapters = {group.number: group.adapters for group in self._groups.values()}
        runs = zip(starts, [*starts[1:], len(rows)], groups[starts].tolist(), strict=True) if starts else ()
        return Layout(
            rows,
            tuple(self._seqs[rows].tolist()),
            tuple(self._request_ids[rows].tolist()),
            tuple([Segment(start, end, adapters[group]) for start, end, group in runs if adapters[group]]),
            self._sampling.take(rows),
            self._free_at[rows],
            bool(self._is_plain[rows].all()),
            bool(self._is_adjusted[rows].any()),
            bool(self._is_scored[rows].any()),
            bool(self._is_constrained[rows].any()),
        )
