"""What the LoRA kernels read and multiply, and what they must not, counted by Triton's interpreter. Collected by
`test_triton_interpreter.py`, which runs this file in a process of its own."""

from collections.abc import Sequence

import pytest
import torch
from support.interpreter import Work

from loramux.kernels.lora import Segment, make_backend
from loramux.kernels.lora.cases import Case, load, single
from loramux.kernels.lora.triton_backend import TritonLoraBackend

CASE = Case("work", 70, (40, 24), ((4, 0), (40, 3), (16, 16), (5, 5)), ())
WAYS = ("exact", "padded", "folded")


class Steps:
    """A backend with the case's adapters, and steps whose reads and products are counted."""

    def __init__(self, way: str, monkeypatch: pytest.MonkeyPatch, case: Case = CASE) -> None:
        self.way, self.case = way, case
        backend = make_backend(
            [case.site], dtype=torch.float32, device="cpu", budget_bytes=1 << 18, max_slots=8, max_tokens=128,
            max_set_rank=64, implementation="triton", fold=way == "folded",
        )  # fmt: skip
        assert isinstance(backend, TritonLoraBackend)
        self.backend = backend
        backend.arena.memory.fill_(torch.nan)
        self.slots = [load(backend, adapter) for adapter in case.weights(torch.float32)]
        self.work = Work(monkeypatch)

    def run(self, segments: Sequence[Segment], tokens: int) -> torch.Tensor:
        """One step; the reads of each element of the arena."""
        site = self.case.site
        x, weight = torch.randn(tokens, site.in_features), torch.randn(site.out_features, site.in_features)
        plan = self.backend.plan(segments, tokens, padded=self.way == "padded")
        assert plan is not None
        self.work.clear()
        if self.way == "folded":
            assert bool((self.backend.project(site, x, weight, None, plan).isfinite()).all())
            assert int(self.work.reads(weight).max()) == -(-tokens // 32), "weights are read once per tile of rows"
        else:
            self.backend.add(site, x, torch.zeros(tokens, site.out_features), plan)
        return self.work.reads(self.backend.arena.memory)

    def parts(self, slot: int, part: int) -> tuple[slice, slice]:
        """Where A and B^T of a slot's module lie in the arena."""
        inputs, outputs = self.case.in_features, self.case.slices[part]
        a, b, _, _ = self.backend.arena.offsets[slot, part].tolist()
        rank = int(self.backend.arena.ranks[slot, part])
        return slice(a, a + rank * inputs), slice(b, b + rank * outputs)


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_read_once_per_segment_and_nothing_else_is_read(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of segments of up to 16 tokens, single or sets; other adapters and what lies between matrices are left alone."""
    steps = Steps(way, monkeypatch)
    first, second, third, _ = steps.slots
    segments = [Segment(0, 3, ((first, 1.0),)), Segment(4, 20, ((second, 0.5), (third, 2.0)))]
    reads = steps.run(segments, 20)
    expected = torch.zeros_like(reads)
    for slot in (first, second, third):
        for part in range(2):
            for place in steps.parts(slot, part):
                expected[place] = 1
    assert torch.equal(reads, expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_read_would_show(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: two segments of one adapter read it twice."""
    steps = Steps(way, monkeypatch)
    slot = steps.slots[1]
    reads = steps.run([Segment(0, 2, ((slot, 1.0),)), Segment(2, 5, ((slot, 1.0),))], 5)
    for part in range(2):
        for place in steps.parts(slot, part):
            assert reads[place].min() == reads[place].max() == 2


def test_long_segments_read_their_weights_once_per_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("exact", monkeypatch)
    slot = steps.slots[2]
    reads = steps.run([Segment(0, 100, ((slot, 1.0),))], 100)
    block_m = steps.backend._tiles["prefill"].block_m
    for place in steps.parts(slot, 0):
        assert reads[place].min() == reads[place].max() == -(-100 // block_m)


def multiplications(steps: Steps, slots: Sequence[int]) -> int:
    """Those of a step of one token per slot; of a folded one without the base product's."""
    steps.run([Segment(token, token + 1, ((slot, 1.0),)) for token, slot in enumerate(slots)], len(slots))
    total = sum(m * n * k * count for (m, n, k), count in steps.work.products.items())
    tiles = sum(-(-width // 32) for width in steps.case.slices)
    return total - (tiles * 3 * 16 * 32 * 32 if steps.way == "folded" else 0)


def expected_multiplications(ranks: Sequence[int], block_n: int) -> int:
    """One token in a tile of 16, ranks in blocks of 16: 3 blocks of 32 inputs, then tiles of `block_n` outputs."""
    total = 0
    for rank, width in zip(ranks, CASE.slices, strict=True):
        total += -(-rank // 16) * 16 * 16 * (3 * 32 + -(-width // block_n) * block_n)
    return total


@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_not_padded_to_the_largest(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small adapter's work is the same beside a large one, and a slice without a pair has none."""
    steps = Steps(way, monkeypatch)
    block_n = 32 if way == "folded" else 64
    for numbers in ([0], [1], [2], [0, 1], [0, 1, 2, 3], [3, 1, 0]):
        work = sum(expected_multiplications(CASE.adapters[number], block_n) for number in numbers)
        assert multiplications(steps, [steps.slots[number] for number in numbers]) == work


def test_a_base_step_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps("padded", monkeypatch, Case("base", 16, (16,), ((4,),), single(1)))
    assert steps.backend.plan([], 4, padded=True) is None
    (empty,) = steps.backend.capture_plans(4)
    steps.backend.add(steps.case.site, torch.randn(4, 16), torch.zeros(4, 16), empty)
    assert not steps.work.products, "programs without records multiply"
