"""A step's metadata for the Triton kernels: built on the host, written into one static device buffer.

    contexts [max_sequences]       of the decodes; 0 for padding
    first_entries [max_sequences]  where each decode's block table begins in `tables`
    slots [max_tokens]             where each token's key and value go; -1 for padding
    tiles [n, 8] per tiling        first token, queries, context, first entry of the table, first packed row, zeros
    tables                         the block tables, end to end

All int32. The buffer is bounded by the limits and never moves, so a captured graph may refer to it; a step is one copy.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.kernels.buffers import StaticBuffer

from .interface import AttentionBatch, AttentionLimits
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


def _round(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


class Metadata:
    """The static buffer and its regions as tensors: `contexts`, `first_entries`, `slots`, `tiles`, `tables`."""

    def __init__(self, limits: AttentionLimits, block_size: int, tilings: Iterable[Tiling], device: torch.device, *,
                 tiles_only: bool = False) -> None:  # fmt: skip
        """With `tiles_only` decodes are tiles like the rest."""
        self._limits = limits
        self._tiles_only = tiles_only
        self._block_size = block_size
        sizes: list[int] = [limits.max_sequences, limits.max_sequences, limits.max_tokens]
        self._tilings = sorted(set(tilings), key=lambda tiling: (tiling.group, tiling.block_m))
        for tiling in self._tilings:
            most = limits.max_tokens * tiling.group // tiling.block_m + limits.max_sequences
            sizes.append(most * TILE_WIDTH)
        self._offsets = [int(offset) for offset in np.cumsum([0] + [_round(size) for size in sizes])]
        self._buffer = StaticBuffer(self._offsets[-1] + limits.max_table_entries, 1, device)
        flat = self._buffer.tensor.view(-1)
        regions = [flat[offset:] for offset in self._offsets]
        self.contexts, self.first_entries, self.slots = regions[:3]
        self.tiles: dict[Tiling, Tensor] = dict(zip(self._tilings, regions[3:-1], strict=True))
        self.tables = regions[-1]

    @property
    def nbytes(self) -> int:
        """Device bytes of the buffer."""
        return self._buffer.tensor.nbytes

    def write(self, batch: AttentionBatch, decode_rows: int | None) -> TritonAttentionPlan:
        """Checks the batch, copies its metadata on the current stream, and returns its plan."""
        lens, contexts = _array(batch.query_lens), _array(batch.contexts)
        slots = _array(batch.slots)
        decodes = self._check(batch, lens, contexts, slots)
        tokens, rows = len(slots), decodes
        if decode_rows is not None:
            if decodes < len(lens) or not decodes <= decode_rows <= self._limits.max_sequences:
                raise ValueError(f"{decode_rows} decode rows cannot hold {decodes} decodes of {len(lens)} sequences")
            tokens = rows = decode_rows
            if tokens > self._limits.max_tokens:
                raise ValueError(f"{tokens} decode rows exceed {self._limits.max_tokens} tokens")
        widths = -(-contexts // self._block_size)
        first_entries = np.cumsum(widths) - widths
        entries = int(widths.sum())
        if entries > self._limits.max_table_entries:
            raise ValueError(f"{entries} block table entries exceed {self._limits.max_table_entries}")
        header = self._offsets[-1]
        values = np.zeros(header + entries, dtype=np.int32)
        values[:decodes] = contexts[:decodes]
        values[self._offsets[1] :][:decodes] = first_entries[:decodes]
        values[self._offsets[2] :][:tokens] = -1
        values[self._offsets[2] :][: len(slots)] = slots
        counts: dict[Tiling, int] = {}
        split = 0 if self._tiles_only else decodes
        if split < len(lens):
            starts = np.cumsum(lens) - lens
            sequences = np.stack([starts, lens, contexts, first_entries], axis=1)[split:]
            for tiling, offset in zip(self._tilings, self._offsets[3:-1], strict=True):
                tiles = _tile_records(sequences, tiling)
                counts[tiling] = len(tiles)
                values[offset : offset + tiles.size] = tiles.reshape(-1)
        flat = array("i")  # joins tables that are arrays themselves by copying memory
        for table, width in zip(batch.tables, widths.tolist(), strict=True):
            flat.extend(table[:width])
        values[header:] = flat
        self._buffer.write(values.reshape(-1, 1))
        longest = int(contexts[:decodes].max(initial=0)) if decode_rows is None else None
        if self._tiles_only and decode_rows is not None:  # records behind those of the batch are zeros: no queries
            counts = {tiling: decode_rows * -(-tiling.group // tiling.block_m) for tiling in self._tilings}
        return TritonAttentionPlan(
            tokens, 0 if self._tiles_only else rows, longest, counts, padded=decode_rows is not None
        )

    def _check(self, batch: AttentionBatch, lens: Array, contexts: Array, slots: Array) -> int:
        """The number of decodes. Raises ValueError for a batch that is malformed or passes a limit."""
        if not len(lens) == len(contexts) == len(batch.tables):
            raise ValueError(f"{len(lens)} sequences have {len(contexts)} contexts and {len(batch.tables)} tables")
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
        held = np.fromiter(map(len, batch.tables), dtype=np.int64, count=len(lens))
        short = np.flatnonzero(held * self._block_size < contexts)
        if len(short):
            number = int(short[0])
            raise ValueError(f"sequence {number}: {held[number]} blocks do not hold {contexts[number]} tokens")
        single = lens == 1
        decodes = int(np.logical_and.accumulate(single).sum())
        if bool(single[decodes:].any()):
            raise ValueError("sequences of one token come first")
        return decodes


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
