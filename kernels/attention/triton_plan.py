"""A step's metadata for the Triton kernels: built on the host, written into two static device buffers.

    contexts [max_sequences]       of the decodes; 0 for padding
    first_entries [max_sequences]  where each decode's block table begins in `tables`
    slots [max_tokens]             where each token's key and value go; -1 for padding
    tables                         the block tables, end to end

    tiles [n, 8] per tiling        first token, queries, context, first entry of the table, first packed row, zeros

All int32. The buffers are bounded by the limits and never move, so a captured graph may refer to them. A step copies
the first one up to the end of its tables, and the second one when it has tiles.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.kernels.buffers import StaticBuffer

from .interface import AttentionBatch, AttentionLimits, Ints
from .launch import TILE_WIDTH

Array = npt.NDArray[np.int64]
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """How prefill cuts a sequence: packed rows of `group` heads per query, `block_m` rows per tile."""

    group: int
    block_m: int


@dataclass(frozen=True, slots=True)
class TritonAttentionPlan:
    """The launches of a step. Its metadata lies in the backend's static buffer until the next plan is written.

    `longest` bounds the contexts of the decodes; None where the launches must not depend on it. `num_decodes` is 0
    where decodes are tiles like the rest. `padded`: the last rows may belong to no sequence.
    """

    num_tokens: int
    num_decodes: int
    longest: int | None
    tiles: dict[Tiling, int]
    padded: bool = False


Table = Sequence[int] | Ints


class TableRows(Sequence[Table]):
    """Block tables for `AttentionBatch`: rows of one matrix, which are packed without looking at each, then others.

    matrix is int32 [any, width], rows [n] are numbers of its rows; what lies behind a table's end may be anything.
    """

    def __init__(self, matrix: npt.NDArray[np.int32], rows: Array, others: Sequence[Table] = ()) -> None:
        self._matrix = np.ascontiguousarray(matrix)
        self._rows = rows
        self._others = tuple(others)

    @staticmethod
    def of(tables: Sequence[Table]) -> "TableRows":
        """Tables of any kind."""
        if isinstance(tables, TableRows):
            return tables
        return TableRows(np.zeros((0, 0), dtype=np.int32), np.zeros(0, dtype=np.int64), tables)

    def followed_by(self, others: "TableRows") -> "TableRows":
        """These tables, then the other ones."""
        return TableRows(self._matrix, self._rows, (*self._others, *others))

    def __len__(self) -> int:
        return len(self._rows) + len(self._others)

    @overload
    def __getitem__(self, index: int) -> Table: ...
    @overload
    def __getitem__(self, index: slice) -> list[Table]: ...
    def __getitem__(self, index: int | slice) -> Table | list[Table]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        inside = number < len(self._rows)
        return self._matrix[self._rows[number]] if inside else self._others[number - len(self._rows)]

    @property
    def capacities(self) -> Array:
        """The entries that each table has at most, int64 [n]."""
        capacities = np.full(len(self), self._matrix.shape[1])
        if self._others:
            capacities[len(self._rows) :] = [len(table) for table in self._others]
        return capacities

    def padded(self, numbers: Array, widths: Array) -> Array:
        """The first widths[i] entries of table numbers[i], int64 [n, largest width]; its first entry fills the rest."""
        inside, width = numbers < len(self._rows), int(widths.max())
        found = np.zeros((len(numbers), width), dtype=np.int64)
        share = min(width, self._matrix.shape[1])
        found[inside, :share] = self._matrix[self._rows[numbers[inside]], :share]
        for row in np.flatnonzero(~inside).tolist():
            found[row, : widths[row]] = self[int(numbers[row])][: int(widths[row])]
        return np.where(np.arange(width) < widths[:, None], found, found[:, :1])

    def pack(self, widths: Array, out: npt.NDArray[np.int32]) -> None:
        """The first widths[i] entries of each table, end to end, into out [sum of widths]."""
        inside = widths[: len(self._rows)]
        ends = np.cumsum(inside)
        total = int(ends[-1]) if len(ends) else 0
        if total:
            places = np.arange(total)
            places += np.repeat(self._rows * self._matrix.shape[1] - ends + inside, inside)
            np.take(self._matrix.reshape(-1), places, out=out[:total], mode="clip")
        if self._others:
            flat = array("i")  # joins tables that are arrays themselves by copying memory
            for table, width in zip(self._others, widths[len(self._rows) :].tolist(), strict=True):
                flat.extend(table[:width])
            out[total:] = flat


class Metadata:
    """The static buffers and their regions as tensors: `contexts`, `first_entries`, `slots`, `tables`; `tiles`."""

    def __init__(self, limits: AttentionLimits, block_size: int, tilings: Iterable[Tiling], device: torch.device, *,
                 tiles_only: bool = False) -> None:  # fmt: skip
        """With `tiles_only` decodes are tiles like the rest."""
        self._limits = limits
        self._tiles_only = tiles_only
        self._block_size = block_size
        self._offsets = _offsets([limits.max_sequences, limits.max_sequences, limits.max_tokens])
        self._buffer = StaticBuffer(self._offsets[-1] + limits.max_table_entries, 1, device)
        flat = self._buffer.tensor.view(-1)
        self.contexts, self.first_entries, self.slots, self.tables = (flat[offset:] for offset in self._offsets)
        tilings = sorted(set(tilings), key=lambda tiling: (tiling.group, tiling.block_m))
        most = [limits.max_tokens * tiling.group // tiling.block_m + limits.max_sequences for tiling in tilings]
        starts = _offsets([count * TILE_WIDTH for count in most])
        self._tile_buffer = StaticBuffer(starts[-1], 1, device)
        self._tile_starts = dict(zip(tilings, starts, strict=False))
        flat = self._tile_buffer.tensor.view(-1)
        self.tiles: dict[Tiling, Tensor] = {tiling: flat[start:] for tiling, start in self._tile_starts.items()}

    @property
    def nbytes(self) -> int:
        """Device bytes of the buffers."""
        return self._buffer.tensor.nbytes + self._tile_buffer.tensor.nbytes

    def write(self, batch: AttentionBatch, decode_rows: int | None) -> TritonAttentionPlan:
        """Checks the batch, copies its metadata on the current stream, and returns its plan."""
        lens, contexts = _array(batch.query_lens), _array(batch.contexts)
        slots, tables = _array(batch.slots), TableRows.of(batch.tables)
        decodes = self._check(lens, contexts, slots, tables)
        tokens, rows = len(slots), decodes
        if decode_rows is not None:
            if decodes < len(lens) or not decodes <= decode_rows <= self._limits.max_sequences:
                raise ValueError(f"{decode_rows} decode rows cannot hold {decodes} decodes of {len(lens)} sequences")
            tokens = rows = decode_rows
            if tokens > self._limits.max_tokens:
                raise ValueError(f"{tokens} decode rows exceed {self._limits.max_tokens} tokens")
        widths = -(-contexts // self._block_size)
        behind = np.cumsum(widths)
        first_entries, entries = behind - widths, int(behind[-1]) if len(behind) else 0
        if entries > self._limits.max_table_entries:
            raise ValueError(f"{entries} block table entries exceed {self._limits.max_table_entries}")
        _, second, third, header = self._offsets
        values = self._buffer.begin(header + entries)[:, 0]
        values[:decodes] = contexts[:decodes]
        values[decodes:second] = 0
        values[second : second + decodes] = first_entries[:decodes]
        values[second + decodes : third] = 0
        values[third : third + len(slots)] = slots
        values[third + len(slots) : third + tokens] = -1
        tables.pack(widths, values[header:])
        self._buffer.end(header + entries)
        longest = int(contexts[:decodes].max(initial=0)) if decode_rows is None else None
        return TritonAttentionPlan(
            tokens,
            0 if self._tiles_only else rows,
            longest,
            self._write_tiles(lens, contexts, first_entries, 0 if self._tiles_only else decodes, decode_rows),
            padded=decode_rows is not None,
        )

    def _write_tiles(
        self, lens: Array, contexts: Array, first_entries: Array, split: int, decode_rows: int | None
    ) -> dict[Tiling, int]:
        """Copies the tiles of the sequences from number `split` on; their counts by tiling, padding included."""
        padded = self._tiles_only and decode_rows is not None
        if not self._tile_starts or (split == len(lens) and not padded):
            return {}
        starts = np.cumsum(lens) - lens
        sequences = np.stack([starts, lens, contexts, first_entries], axis=1)[split:]
        records = {tiling: _tile_records(sequences, tiling) for tiling in self._tile_starts}
        counts = {tiling: len(tiles) for tiling, tiles in records.items()}
        if padded and decode_rows is not None:  # records behind those of the batch are zeros: no queries
            counts = {tiling: decode_rows * -(-tiling.group // tiling.block_m) for tiling in records}
        used = max(start + counts[tiling] * TILE_WIDTH for tiling, start in self._tile_starts.items())
        values = self._tile_buffer.begin(used)[:, 0]
        for tiling, start in self._tile_starts.items():
            tiles = records[tiling].reshape(-1)
            values[start : start + len(tiles)] = tiles
            values[start + len(tiles) : start + counts[tiling] * TILE_WIDTH] = 0
        self._tile_buffer.end(used)
        return counts

    def _check(self, lens: Array, contexts: Array, slots: Array, tables: TableRows) -> int:
        """The number of decodes. Raises ValueError for a batch that is malformed or passes a limit."""
        if not len(lens) == len(contexts) == len(tables):
            raise ValueError(f"{len(lens)} sequences have {len(contexts)} contexts and {len(tables)} tables")
        if len(lens) > self._limits.max_sequences:
            raise ValueError(f"{len(lens)} sequences exceed {self._limits.max_sequences}")
        if len(slots) > self._limits.max_tokens:
            raise ValueError(f"{len(slots)} tokens exceed {self._limits.max_tokens}")
        if int(lens.sum()) != len(slots):
            raise ValueError(f"{int(lens.sum())} queries have {len(slots)} slots")
        if len(lens) and (lens.min() < 1 or bool((contexts < lens).any())):
            raise ValueError("every sequence needs a query, and a context that includes its queries")
        if len(slots) and slots.min() < 0:
            raise ValueError("slots must not be negative")
        held = tables.capacities
        short = np.flatnonzero(held * self._block_size < contexts)
        if len(short):
            number = int(short[0])
            raise ValueError(f"sequence {number}: {held[number]} blocks do not hold {contexts[number]} tokens")
        longer = np.flatnonzero(lens > 1)
        decodes = int(longer[0]) if len(longer) else len(lens)
        if len(longer) != len(lens) - decodes:
            raise ValueError("sequences of one token come first")
        return decodes


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where regions of these sizes begin, and where the last one ends; all are multiples of the alignment."""
    return [0, *np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()]


def _array(values: object) -> Array:
    return np.asarray(values, dtype=np.int64)


def _tile_records(sequences: Array, tiling: Tiling) -> npt.NDArray[np.int32]:
    """[tiles, 8] of sequences [n, 4] (first token, queries, context, first entry); those with most keys come first,
    so that the last programs to run are short ones."""
    counts = -(-sequences[:, 1] * tiling.group // tiling.block_m)
    owners = np.repeat(np.arange(len(sequences)), counts)
    rows = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * tiling.block_m
    tiles = np.zeros((len(owners), TILE_WIDTH), dtype=np.int32)
    tiles[:, :4] = sequences[owners]
    tiles[:, 4] = rows
    ends = sequences[owners, 2] - sequences[owners, 1] + rows // tiling.group
    return tiles[np.argsort(-ends, kind="stable")]
