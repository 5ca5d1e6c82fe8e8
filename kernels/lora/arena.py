"""One flat device arena for all adapters, and the table that says where each module of each slot lies.

    arena    [elements] in the backend's dtype
    offsets  [slots, modules, 4] int64: element offsets of A [rank, in], of B^T [rank, out], and of the scale vectors
             g - 1 [out] and l - 1 [in], -1 where there is none
    ranks    [slots, modules] int32: 0 where the adapter does not touch the module
    scales   [slots, modules] float32

Modules are numbered through all sites in order. B lies transposed, so that a tile of outputs is read in full lines
whatever the rank, and multiplied by g. Matrices and vectors begin at multiples of 16 bytes. Table rows are written
when a slot is published.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import ScaleName

Scales = Collection[tuple[int, ScaleName]]
"""(module number, which) of each scale vector."""

ALIGNMENT_BYTES = 16


class OffsetAllocator:
    """First-fit allocation of ranges of [0, capacity); neighbouring holes are merged. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        """Raises ValueError for a negative capacity."""
        if capacity < 0:
            raise ValueError(f"capacity {capacity} is negative")
        self._starts: list[int] = [0] if capacity else []
        self._sizes: list[int] = [capacity] if capacity else []
        self._taken: dict[int, int] = {}
        self.capacity = capacity
        self.free = capacity

    @property
    def largest_hole(self) -> int:
        """The largest size that `allocate` would grant."""
        return max(self._sizes, default=0)

    def allocate(self, size: int) -> int | None:
        """The offset of `size` units, at the lowest place where they fit, or None. Raises ValueError below 1."""
        if size < 1:
            raise ValueError(f"size {size} is below 1")
        for place, hole in enumerate(self._sizes):
            if hole >= size:
                offset = self._starts[place]
                if hole == size:
                    del self._starts[place], self._sizes[place]
                else:
                    self._starts[place] += size
                    self._sizes[place] -= size
                self._taken[offset] = size
                self.free -= size
                return offset
        return None

    def release(self, offset: int) -> None:
        """Gives a range back. Raises KeyError for an offset that is not allocated."""
        size = self._taken.pop(offset)
        self.free += size
        place = bisect_left(self._starts, offset)
        if place < len(self._starts) and offset + size == self._starts[place]:
            size += self._sizes[place]
            del self._starts[place], self._sizes[place]
        if place and self._starts[place - 1] + self._sizes[place - 1] == offset:
            self._sizes[place - 1] += size
        else:
            self._starts.insert(place, offset)
            self._sizes.insert(place, size)


@dataclass(frozen=True, slots=True)
class Block:
    """Where one module of a slot lies: element offsets of A [rank, in], B^T [rank, out], g - 1 and l - 1 (-1: none)."""

    A: int
    B: int
    rank: int
    out_scale: int = -1
    in_scale: int = -1


class Arena:
    """The arena, its allocator, and the table. Shapes are given per module number: (in, out) features."""

    def __init__(
        self, shapes: list[tuple[int, int]], *, dtype: torch.dtype, device: torch.device, budget_bytes: int, slots: int
    ) -> None:
        self._shapes = shapes
        self._unit = ALIGNMENT_BYTES // dtype.itemsize
        self._allocator = OffsetAllocator(budget_bytes // ALIGNMENT_BYTES)
        with torch.inference_mode(False):
            self.memory = torch.empty(self._allocator.capacity * self._unit, dtype=dtype, device=device)
            self.offsets = torch.zeros(slots, len(shapes), 4, dtype=torch.int64, device=device)
            self.ranks = torch.zeros(slots, len(shapes), dtype=torch.int32, device=device)
            self.scales = torch.zeros(slots, len(shapes), dtype=torch.float32, device=device)

    @property
    def bytes_used(self) -> int:
        """Bytes of all allocated blocks."""
        return (self._allocator.capacity - self._allocator.free) * ALIGNMENT_BYTES

    @property
    def bytes_total(self) -> int:
        """Bytes of the arena: the budget, less what does not fill a unit of alignment."""
        return self._allocator.capacity * ALIGNMENT_BYTES

    def _units(self, module: int, rank: int, scales: Scales) -> tuple[int, int, int, int]:
        inputs, outputs = self._shapes[module]
        elements = (
            rank * inputs,
            rank * outputs,
            outputs * ((module, "out") in scales),
            inputs * ((module, "in") in scales),
        )
        a, b, out_scale, in_scale = (-(-number // self._unit) for number in elements)
        return a, b, out_scale, in_scale

    def bytes_needed(self, ranks: Mapping[int, int], scales: Scales = ()) -> int:
        """Bytes of modules {number: rank} and of scale vectors, each rounded up to 16 bytes."""
        return sum(sum(self._units(module, rank, scales)) for module, rank in ranks.items()) * ALIGNMENT_BYTES

    def allocate(self, ranks: Mapping[int, int], scales: Scales = ()) -> dict[int, Block] | None:
        """A block per module, or None (and nothing taken) when they do not all fit.

        A module is one block, so adapters of equal shapes fit each other's holes whatever the order of releases.
        """
        blocks: dict[int, Block] = {}
        for module, rank in ranks.items():
            sizes = self._units(module, rank, scales)
            offset = self._allocator.allocate(sum(sizes))
            if offset is None:
                self.release(blocks)
                return None
            ends = [offset + sum(sizes[:number]) for number in range(4)]
            vectors = (end * self._unit if size else -1 for end, size in zip(ends[2:], sizes[2:], strict=True))
            blocks[module] = Block(ends[0] * self._unit, ends[1] * self._unit, rank, *vectors)
        return blocks

    def free_for(self, needed: int) -> int:
        """Free bytes as a failed allocation of `needed` bytes should report them: always less than `needed`."""
        free = self._allocator.free * ALIGNMENT_BYTES
        return free if free < needed else min(self._allocator.largest_hole * ALIGNMENT_BYTES, needed - 1)

    def release(self, blocks: Mapping[int, Block]) -> None:
        """Gives blocks back."""
        for block in blocks.values():
            self._allocator.release(block.A // self._unit)

    def views(self, module: int, block: Block) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B^T [rank, out]) of a block, as views of the arena."""
        inputs, outputs = self._shapes[module]
        A = self.memory[block.A : block.A + block.rank * inputs].view(block.rank, inputs)
        B = self.memory[block.B : block.B + block.rank * outputs].view(block.rank, outputs)
        return A, B

    def scale_views(self, module: int, block: Block) -> tuple[Tensor | None, Tensor | None]:
        """(g - 1 [out], l - 1 [in]) of a block, as views of the arena; None where there is none."""
        inputs, outputs = self._shapes[module]
        out_scale = None if block.out_scale < 0 else self.memory[block.out_scale : block.out_scale + outputs]
        in_scale = None if block.in_scale < 0 else self.memory[block.in_scale : block.in_scale + inputs]
        return out_scale, in_scale

    def publish(self, slot: int, blocks: Mapping[int, Block], scales: Mapping[int, float]) -> None:
        """Writes the slot's rows of the table, on the current stream, without waiting for the device."""
        count = len(self._shapes)
        offsets, ranks, values = [[0, 0, -1, -1]] * count, [0] * count, [0.0] * count
        for module, block in blocks.items():
            offsets[module] = [block.A, block.B, block.out_scale, block.in_scale]
            ranks[module], values[module] = block.rank, scales[module]
        for table, row in ((self.offsets, offsets), (self.ranks, ranks), (self.scales, values)):
            # Pinned memory is given out again only when the copies from it have ended.
            host = torch.tensor(row, dtype=table.dtype, pin_memory=table.is_cuda)
            table[slot].copy_(host, non_blocking=True)
