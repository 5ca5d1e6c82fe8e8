"""The arena's allocator: ranges never overlap, holes merge, first fit."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux.kernels.lora.arena import Arena, OffsetAllocator
from loramux.kernels.lora.interface import ScaleName

CAPACITY = 64


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=80))
def test_ranges_are_disjoint_and_holes_merge(steps: list[tuple[bool, int]]) -> None:
    allocator = OffsetAllocator(CAPACITY)
    taken: dict[int, int] = {}
    for take, number in steps:
        if take:
            occupied = [any(start <= unit < start + size for start, size in taken.items()) for unit in range(CAPACITY)]
            fits = [unit for unit in range(CAPACITY - number + 1) if not any(occupied[unit : unit + number])]
            offset = allocator.allocate(number)
            assert offset == (fits[0] if fits else None)
            if offset is not None:
                taken[offset] = number
        elif taken:
            offset = sorted(taken)[number % len(taken)]
            allocator.release(offset)
            del taken[offset]
        assert allocator.free == CAPACITY - sum(taken.values())
    for offset in taken:
        allocator.release(offset)
    assert allocator.allocate(CAPACITY) == 0


def test_misuse_is_refused() -> None:
    allocator = OffsetAllocator(4)
    with pytest.raises(ValueError, match="below 1"):
        allocator.allocate(0)
    with pytest.raises(KeyError):
        allocator.release(0)
    with pytest.raises(ValueError, match="negative"):
        OffsetAllocator(-1)


def test_empty_capacity_grants_nothing() -> None:
    assert OffsetAllocator(0).allocate(1) is None


def test_arena_takes_nothing_when_a_module_does_not_fit() -> None:
    arena = Arena([(8, 8), (8, 8)], dtype=torch.float32, device=torch.device("cpu"), budget_bytes=1024, slots=2)
    blocks = arena.allocate({0: 8})
    assert blocks is not None
    assert arena.bytes_used == arena.bytes_needed({0: 8}) == 512
    assert arena.allocate({0: 4, 1: 8}) is None
    assert arena.bytes_used == 512
    assert arena.free_for(768) == 512
    arena.release(blocks)
    assert arena.bytes_used == 0


def test_failed_allocation_reports_less_than_it_needs_when_fragmented() -> None:
    arena = Arena([(8, 8)], dtype=torch.float32, device=torch.device("cpu"), budget_bytes=64 * 4, slots=4)
    blocks = [arena.allocate({0: 1}) for _ in range(4)]
    assert blocks[0] is not None
    assert blocks[2] is not None
    arena.release(blocks[0])
    arena.release(blocks[2])
    assert arena.allocate({0: 2}) is None
    assert arena.free_for(128) == 64


def test_blocks_are_views_at_their_offsets() -> None:
    arena = Arena([(3, 5), (4, 2)], dtype=torch.bfloat16, device=torch.device("cpu"), budget_bytes=4096, slots=2)
    arena.memory.fill_(float("nan"))
    blocks = arena.allocate({0: 3, 1: 2})
    assert blocks is not None
    for module, block in blocks.items():
        A, B = arena.views(module, block)
        assert block.A % 8 == block.B % 8 == 0
        A.fill_(module + 1)
        B.fill_(module + 1)
    assert arena.scale_views(0, blocks[0]) == arena.scale_views(1, blocks[1]) == (None, None)
    arena.publish(1, blocks, {0: 0.5, 1: 2.0})
    for module, block in blocks.items():
        A, B = arena.views(module, block)
        assert bool((module + 1 == A).all())
        assert bool((module + 1 == B).all())
        assert arena.offsets[1, module].tolist() == [block.A, block.B, -1, -1]
    assert arena.ranks[1].tolist() == [3, 2]
    assert arena.scales[1].tolist() == [0.5, 2.0]


def test_scale_vectors_lie_beside_their_matrices_and_are_counted() -> None:
    arena = Arena([(3, 5), (4, 2)], dtype=torch.bfloat16, device=torch.device("cpu"), budget_bytes=4096, slots=1)
    scales: list[tuple[int, ScaleName]] = [(0, "out"), (1, "in")]
    assert arena.bytes_needed({0: 3, 1: 0}, scales) == arena.bytes_needed({0: 3}) + 2 * 16
    blocks = arena.allocate({0: 3, 1: 0}, scales)
    assert blocks is not None
    assert arena.bytes_used == arena.bytes_needed({0: 3, 1: 0}, scales)
    (g, nothing), (neither, ell) = (arena.scale_views(module, block) for module, block in blocks.items())
    assert nothing is neither is None
    assert g is not None
    assert ell is not None
    assert (len(g), len(ell)) == (5, 4)
    places = [arena.views(0, blocks[0]), (g, ell)]
    spans = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for pair in places for part in pair)
    assert all(before[1] <= after[0] and after[0] % 16 == 0 for before, after in itertools.pairwise(spans))
    arena.publish(0, blocks, {0: 1.0, 1: 0.0})
    assert arena.offsets[0, :, 2:].tolist() == [[blocks[0].out_scale, -1], [-1, blocks[1].in_scale]]
    arena.release(blocks)
    assert arena.bytes_used == 0
