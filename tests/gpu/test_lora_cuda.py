"""The correctness grid of the LoRA backends on a card."""

import pytest
import torch

from loramux.kernels.lora import LoraBackend, Segment, make_backend
from loramux.kernels.lora.cases import Case, check, large_cases, load, single, small_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIZES = [(1, 8, 8192), (8, 64, 128), (32, 16, 1), (128, 16, 1), (4, 256, 300)]
GRID = [
    Case(f"{count}x{rank}x{length}", 4096, (4096, 1024, 1024), ((rank,) * 3,) * count, single(count, length=length))
    for count, rank, length in SIZES
]
CASES = [*small_cases(), *large_cases(), *GRID]


def backend_of(case: Case, dtype: torch.dtype, implementation: str | None = None) -> LoraBackend:
    return make_backend(
        [case.site], dtype=dtype, device="cuda", budget_bytes=1 << 31, max_slots=160, max_tokens=8192,
        max_set_rank=600, implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype, implementation: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backend, weights = backend_of(case, dtype, implementation), case.weights(dtype)
    if implementation == "triton":
        for memory in (backend.arena.memory, backend._whole, backend._parts):
            memory.fill_(torch.nan)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights) <= TOLERANCE[dtype]


def test_copies_end_and_slots_are_reused() -> None:
    case = Case("reuse", 512, (512, 128), ((16, 16), (8, 0), (64, 64)), single(2))
    backend, weights = backend_of(case, torch.bfloat16), case.weights(torch.bfloat16)
    pinned = [
        {
            module: type(pair)(pair.A.pin_memory(), pair.B.pin_memory(), pair.scale)
            for module, pair in adapter.items()
        }
        for adapter in weights
    ]  # fmt: skip
    for _ in range(20):
        slots = [load(backend, adapter) for adapter in pinned]
        assert check(backend, case, slots, weights) <= 1e-2
        torch.cuda.synchronize()
        assert all(backend.filled(slot) for slot in slots)
        for slot in slots:
            backend.release(slot)
    assert backend.bytes_used == 0


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    case = Case("alone", 4096, (1024,), ((16,),) * 16, single(16))
    backend, weights = backend_of(case, torch.bfloat16), case.weights(torch.bfloat16)
    slots = [load(backend, adapter) for adapter in weights]
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    together = torch.zeros(16, 1024, device="cuda", dtype=torch.bfloat16)
    plan = backend.plan(case.segments(slots), 16)
    assert plan is not None
    backend.add(case.site, x, together, plan)
    for number, slot in enumerate(slots):
        alone = torch.zeros(1, 1024, device="cuda", dtype=torch.bfloat16)
        plan = backend.plan([Segment(0, 1, ((slot, 1.0),))], 1)
        assert plan is not None
        backend.add(case.site, x[number : number + 1], alone, plan)
        assert torch.equal(alone[0], together[number])
