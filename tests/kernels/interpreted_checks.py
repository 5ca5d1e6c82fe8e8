"""The Triton backend on the CPU, through Triton's interpreter. Collected by `test_triton_interpreter.py`, which runs
this file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

import threading

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from loramux.kernels.lora import ArenaFullError, Segment, make_backend
from loramux.kernels.lora import triton_plan as plans
from loramux.kernels.lora.cases import Case, check, load, relative_error, single, small_cases
from loramux.kernels.lora.reference import add_reference
from loramux.kernels.lora.triton_backend import TritonLoraBackend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = small_cases()


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies those integers; widen them to float32 first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def backend_of(case: Case, dtype: torch.dtype = torch.float32, *, budget: int = 1 << 20) -> TritonLoraBackend:
    """A backend whose arena and scratch are NaN, so that a read of what nobody wrote shows."""
    backend = make_backend(
        [case.site], dtype=dtype, device="cpu", budget_bytes=budget, max_slots=16, max_tokens=64, max_set_rank=400,
        implementation="triton",
    )  # fmt: skip
    assert isinstance(backend, TritonLoraBackend)
    for memory in (backend.arena.memory, backend._whole, backend._parts):
        memory.fill_(torch.nan)
    return backend


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case) -> None:
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["touched-slices", "sets"])
def test_matches_the_reference_in_half_precision(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    backend, weights = backend_of(case, dtype), case.weights(dtype)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights) <= TOLERANCE[dtype]


def test_partial_sums_and_whole_sums_agree_bit_for_bit() -> None:
    case = Case("splits", 1100, (17, 9), ((9, 4), (20, 0)), ((2, ((0, 1.0),)), (17, ((1, 0.5), (0, 2.0)))))
    weights = case.weights(torch.float32)
    results = []
    for rows in (64, 0):
        backend = backend_of(case)
        backend._partial_rows = rows
        slots = [load(backend, adapter) for adapter in weights]
        plan = backend.plan(case.segments(slots), case.num_tokens)
        assert plan is not None
        assert {launch.partials for launch in plan.launches} == {rows > 0}
        generator = torch.Generator().manual_seed(5)
        out = torch.zeros(case.num_tokens, 26)
        backend.add(case.site, torch.randn(case.num_tokens, 1100, generator=generator), out, plan)
        results.append(out)
    assert torch.equal(*results)


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    case = Case("alone", 70, (40,), ((16,), (5,), (30,)), single(3, length=3))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    x, together = torch.randn(9, 70), torch.zeros(9, 40)
    plan = backend.plan(case.segments(slots), 9)
    assert plan is not None
    backend.add(case.site, x, together, plan)
    for number, slot in enumerate(slots):
        alone = torch.zeros(3, 40)
        plan = backend.plan([Segment(0, 3, ((slot, 1.0),))], 3)
        assert plan is not None
        backend.add(case.site, x[3 * number : 3 * number + 3], alone, plan)
        assert torch.equal(alone, together[3 * number : 3 * number + 3])


def test_released_memory_is_reused_and_not_read() -> None:
    case = Case("reuse", 33, (20, 12), ((8, 3), (4, 4), (8, 0)), single(2))
    weights = case.weights(torch.float32)
    backend = backend_of(case, budget=4000)
    slots = [load(backend, adapter) for adapter in weights[:2]]
    with pytest.raises(ArenaFullError) as full:
        load(backend, weights[2])
    assert full.value.free < full.value.needed == backend.bytes_needed({"module0": 8})
    used = backend.bytes_used
    backend.release(slots[0])
    backend.arena.memory[: 33 * 8].fill_(torch.nan)
    third = load(backend, weights[2])
    assert third == slots[0]
    assert backend.bytes_used < used <= backend.bytes_total
    runs = ((1, ((2, 1.0),)), (1, ((1, 1.0),)))
    now = Case("reuse", 33, (20, 12), case.adapters, runs)
    segments = [Segment(0, 1, ((third, 1.0),)), Segment(1, 2, ((slots[1], 1.0),))]
    x, out = torch.randn(2, 33), torch.zeros(2, 32)
    expected = out.double()
    add_reference(now.site, x, expected, segments, {third: weights[2], slots[1]: weights[1]})
    plan = backend.plan(segments, 2)
    assert plan is not None
    backend.add(now.site, x, out, plan)
    assert relative_error(out, expected) <= 1e-5
    assert not out[0, 20:].any()
    backend.release(third)
    backend.release(slots[1])
    assert backend.bytes_used == 0


def test_fill_runs_on_another_thread_and_an_outdated_plan_is_refused() -> None:
    case = Case("thread", 33, (20,), ((8,), (4,)), single(2))
    backend, weights = backend_of(case), case.weights(torch.float32)
    first = load(backend, weights[0])
    second = backend.reserve({"module0": 4})
    plan = backend.plan([Segment(0, 1, ((first, 1.0),))], 1)
    assert plan is not None
    assert plan is backend.plan([Segment(0, 1, ((first, 1.0),))], 1)
    thread = threading.Thread(target=backend.fill, args=(second, weights[1]))
    thread.start()
    backend.add(case.site, torch.randn(1, 33), torch.zeros(1, 20), plan)
    thread.join()
    assert backend.filled(second)
    backend.publish(second)
    assert check(backend, case, [first, second], weights) <= 1e-5
    with pytest.raises(ValueError, match="outdated"):
        backend.add(case.site, torch.randn(1, 33), torch.zeros(1, 20), plan)


def test_base_steps_have_no_plan_and_no_launch() -> None:
    case = Case("nothing", 8, (8,), ((4,),), single(1))
    backend = backend_of(case)
    assert backend.plan([], 4) is None
    assert plans.build([], lambda slot: 1, backend._variants, 4)[0] == []


def test_rank_work_is_not_padded_beyond_the_tile() -> None:
    case = Case("ranks", 8, (8,), ((4,), (40,)), single(2))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    plan = backend.plan(case.segments(slots), 2)
    assert plan is not None
    (launch,) = plan.launches
    tile = launch.variant.shrink.block_r
    assert launch.shrink[1] - launch.shrink[0] == 1 + -(-40 // tile)
    assert launch.expand[1] - launch.expand[0] == 2


def test_a_full_step_fits_the_static_buffers() -> None:
    case = Case("full", 8, (8,), ((1,),) * 8, single(1))
    backend = make_backend(
        [case.site], dtype=torch.float32, device="cpu", budget_bytes=1 << 16, max_slots=8, max_tokens=16,
        max_set_size=8, max_set_rank=8, implementation="triton",
    )  # fmt: skip
    slots = [load(backend, adapter) for adapter in case.weights(torch.float32)]
    everyone = tuple((slot, 1.0) for slot in slots)
    assert backend.plan([Segment(t, t + 1, everyone) for t in range(16)], 16) is not None


def test_other_dtypes_are_refused() -> None:
    case = CASES[0]
    with pytest.raises(ValueError, match="float64"):
        make_backend(
            [case.site], dtype=torch.float64, device="cpu", budget_bytes=0, max_slots=1, max_tokens=1,
            implementation="triton",
        )  # fmt: skip
