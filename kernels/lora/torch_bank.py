"""Active banks: the weights of the adapters in current use, stacked so that one batched product serves them all.

An adapter's own tensors (`AdapterTensors`) are what the byte budget counts. For each site, adapters with the same
signature (the bucketed rank of every slice, 0 where untouched) share a `Bank`, whose rows are copies of them:

    A [rows, R, in]          R = sum of the buckets; slices one after the other
    B [rows, chunks, r, g]   per run of neighbouring slices; chunk c produces outputs [c g, (c+1) g) of the run
    scale [rows, R]          float32, the module's scale repeated over its rank; None where A lies multiplied by it,
                             which half precision would round

An adapter keeps its row from step to step; nothing is copied for an adapter that already has one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import Site

Signature = tuple[int, ...]

_MIN_ROW_ELEMENTS = 16384
"""A row smaller than this is not worth a product of its own: ranks are padded up until it is reached."""
_MAX_FLOOR = 64
_MIN_CHUNK = 64


@dataclass(slots=True)
class SiteTensors:
    """One adapter's weights at one site: A of its slices concatenated [sum r, in], B per slice [r, out]."""

    A: Tensor
    B: dict[int, Tensor]
    ranks: dict[int, int]
    scales: dict[int, float]


def bucket(rank: int, features: int) -> int:
    """The rank that a slice is padded to: a power of two up to 64, then a multiple of 32.

    `features` is in + out of the site: small sites start at a higher floor, since a product of its own costs more
    than the padding. Padding stays below 2x, except under the floor.
    """
    floor = 4
    while floor < _MAX_FLOOR and floor * features < _MIN_ROW_ELEMENTS:
        floor *= 2
    if rank > 64:
        return -(-rank // 32) * 32
    return max(floor, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slices of equal bucket whose expands are one product.

    The run covers outputs [column, column + chunks * width) of the site and rank rows [offset, offset + slices * rank)
    of the shrink's output. `spread` repeats a slice's rank rows for each of its chunks, or is None when each slice
    is one chunk.
    """

    column: int
    offset: int
    rank: int
    slices: tuple[int, ...]
    width: int
    chunks: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole run."""
        return sum(self.chunks)

    @property
    def out_features(self) -> int:
        """Outputs of the whole run."""
        return self.width * self.num_chunks


def split_runs(site: Site, signature: Signature) -> tuple[Run, ...]:
    """Cuts the touched slices of a signature into runs whose slices have a useful common chunk width."""
    groups: list[list[int]] = []
    for number, rank in enumerate(signature):
        if not rank:
            continue
        if groups and groups[-1][-1] == number - 1 and signature[number - 1] == rank:
            groups[-1].append(number)
        else:
            groups.append([number])
    runs: list[Run] = []
    offset = 0
    for group in groups:
        widths = [site.slices[number].out_features for number in group]
        common = math.gcd(*widths)
        parts = [group] if common >= _MIN_CHUNK or common == max(widths) else [[number] for number in group]
        for part in parts:
            rank = signature[part[0]]
            widths = [site.slices[number].out_features for number in part]
            common = math.gcd(*widths)
            column = sum(s.out_features for s in site.slices[: part[0]])
            chunks = tuple(width // common for width in widths)
            runs.append(Run(column, offset, rank, tuple(part), common, chunks))
            offset += rank * len(part)
    return tuple(runs)


class Bank:
    """Rows of stacked weights for one site and signature. Engine thread only."""

    def __init__(self, site: Site, signature: Signature, dtype: torch.dtype, device: torch.device) -> None:
        self.site = site
        self.signature = signature
        self.rank = sum(signature)
        self.runs = split_runs(site, signature)
        self.slots: list[int | None] = []
        self.row_of: dict[int, int] = {}
        self.generation = 0
        self._dtype, self._device = dtype, device
        self.spread = tuple(
            torch.tensor([i for i, c in enumerate(run.chunks) for _ in range(c)], device=device)
            if max(run.chunks) > 1
            else None
            for run in self.runs
        )
        self._allocate(0)

    def _allocate(self, rows: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.A = torch.zeros(rows, self.rank, self.site.in_features, dtype=self._dtype, device=self._device)
            self.B = [
                torch.zeros(rows, run.num_chunks, run.rank, run.width, dtype=self._dtype, device=self._device)
                for run in self.runs
            ]
            self.scale: Tensor | None = None
            if self._dtype.itemsize < 4:
                self.scale = torch.zeros(rows, self.rank, dtype=torch.float32, device=self._device)
        self.capacity = rows

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [self.A, *self.B, *([] if self.scale is None else [self.scale])]

    def _resize(self, capacity: int, rows: Sequence[int]) -> None:
        """Moves `rows`, in that order, to the front of new tensors. Old plans keep the old tensors."""
        before = self._tensors()
        self._allocate(capacity)
        if rows:
            index = torch.tensor(rows, device=self._device)
            with torch.inference_mode(False), torch.no_grad():
                for new, old in zip(self._tensors(), before, strict=True):
                    torch.index_select(old, 0, index, out=new[: len(rows)])
        kept = [self.slots[row] for row in rows]
        self.slots = [*kept, *[None] * (capacity - len(kept))]
        self.row_of = {slot: row for row, slot in enumerate(self.slots) if slot is not None}
        self.generation += 1

    def grow(self, needed: int) -> None:
        """Makes room for `needed` rows in all, at least doubling."""
        if needed > self.capacity:
            self._resize(max(needed, min(2 * self.capacity, self.capacity + 64)), range(len(self.slots)))

    def pack(self, slots: Sequence[int]) -> None:
        """Keeps only the rows of `slots`, from row 0 in their order, and gives the rest of the memory back."""
        self._resize(len(slots), [self.row_of[slot] for slot in slots])

    def load(self, slot: int, row: int, tensors: SiteTensors) -> None:
        """Copies an adapter's weights of this site into a row; rank padding becomes zero."""
        before = self.slots[row]
        if before is not None:
            del self.row_of[before]
        A = self.A[row]
        source = 0
        with torch.inference_mode(False), torch.no_grad():
            for run, stacked in zip(self.runs, self.B, strict=True):
                chunk, target = 0, run.offset
                for number, count in zip(run.slices, run.chunks, strict=True):
                    rank = tensors.ranks[number]
                    A[target : target + rank] = tensors.A[source : source + rank]
                    A[target + rank : target + run.rank] = 0
                    if self.scale is None:
                        A[target : target + rank] *= tensors.scales[number]
                    else:
                        self.scale[row, target : target + run.rank] = tensors.scales[number]
                    B = stacked[row, chunk : chunk + count]
                    B[:, :rank] = tensors.B[number].view(rank, count, run.width).transpose(0, 1)
                    B[:, rank:] = 0
                    source, target, chunk = source + rank, target + run.rank, chunk + count
        self.slots[row] = slot
        self.row_of[slot] = row

    def in_a_row(self, slots: Sequence[int]) -> bool:
        """Whether the slots have rows that follow one another."""
        rows = [self.row_of[slot] for slot in slots]
        return rows == list(range(rows[0], rows[0] + len(rows)))

    def drop(self, slot: int) -> None:
        """Frees the row of a slot; gives memory back when the bank is empty or three quarters of it are holes."""
        row = self.row_of.pop(slot, None)
        if row is None:
            return
        self.slots[row] = None
        if 4 * len(self.row_of) <= self.capacity:
            self.pack(list(self.row_of))
