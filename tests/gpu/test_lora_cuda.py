"""The correctness grid of the LoRA backends on a card."""

import pytest
import torch

from loramux.kernels.lora import LoraBackend, ModuleWeights, Overlap, Segment, add_reference, make_backend
from loramux.kernels.lora.cases import (
    Case,
    Weights,
    check,
    check_folded,
    large_cases,
    load,
    relative_error,
    scaled_cases,
    single,
    small_cases,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIZES = [(1, 8, 8192), (8, 64, 128), (32, 16, 1), (128, 16, 1), (4, 256, 300)]
GRID = [
    Case(f"{count}x{rank}x{length}", 4096, (4096, 1024, 1024), ((rank,) * 3,) * count, single(count, length=length))
    for count, rank, length in SIZES
]
CASES = [*small_cases(), *large_cases(), *GRID]


def backend_of(
    case: Case,
    dtype: torch.dtype,
    implementation: str | None = None,
    overlap: Overlap = "none",
    fold: bool | None = None,
) -> LoraBackend:
    return make_backend(
        [case.site], dtype=dtype, device="cuda", budget_bytes=1 << 31, max_slots=160, max_tokens=8192,
        max_set_rank=600, implementation=implementation, overlap=overlap, fold=fold,
    )  # fmt: skip


def overlaps() -> list[Overlap]:
    """What this card can do."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return ["none", "stream"]
    return ["none", "stream", "launch"]


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


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", scaled_cases(), ids=lambda case: case.name)
def test_scale_vectors_and_gates(case: Case, gated: bool, dtype: torch.dtype, implementation: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backend, weights = backend_of(case, dtype, implementation), case.weights(dtype)
    slots = [load(backend, adapter) for adapter in weights]
    for padded in (False, True):
        assert check(backend, case, slots, weights, gated=gated, padded=padded) <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*small_cases(), large_cases()[2], large_cases()[5]], ids=lambda case: case.name)
def test_padded_plans_match_the_reference(case: Case) -> None:
    backend, weights = backend_of(case, torch.bfloat16), case.weights(torch.bfloat16)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, padded=True) <= 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*CASES, *scaled_cases()], ids=lambda case: case.name)
def test_folded_projections_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    for overlap in overlaps():
        backend, weights = backend_of(case, dtype, overlap=overlap, fold=True), case.weights(dtype)
        for memory in (backend.arena.memory, backend._whole, backend._parts):
            memory.fill_(torch.nan)
        slots = [load(backend, adapter) for adapter in weights]
        for padded in (False, True) if case.num_tokens <= 512 else (False,):
            assert check_folded(backend, case, slots, weights, padded=padded) <= TOLERANCE[dtype]
        if case.scales:
            assert check_folded(backend, case, slots, weights, gated=True) <= TOLERANCE[dtype]


@pytest.mark.parametrize("overlap", overlaps())
def test_a_folded_graph_serves_every_mix_of_adapters(overlap: Overlap) -> None:
    """The same bits as op by op, at any mix, with garbage in what the graph before left behind."""
    dtype, rows = torch.bfloat16, 24
    case, weights = mixed_adapters(dtype)
    backend, site = backend_of(case, dtype, overlap=overlap, fold=True), case.site
    generator = torch.Generator(device="cuda").manual_seed(3)
    x = torch.zeros(rows, 2048, device="cuda", dtype=dtype)
    weight = torch.randn(3072, 2048, device="cuda", dtype=dtype, generator=generator)
    (plan,) = backend.capture_plans(rows)
    assert backend.folds(site, weight, plan)
    backend.project(site, x, weight, None, plan)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.project(site, x, weight, None, plan)
    slots = [load(backend, adapter) for adapter in weights]
    for shift in range(6):
        order = slots[shift:] + slots[:shift]
        segments = [
            Segment(4 * i, 4 * i + 3, ((slot, 1.0), (order[0], 0.5))[: 1 + (i > 0)]) for i, slot in enumerate(order)
        ]
        x.copy_(torch.randn(rows, 2048, device="cuda", generator=generator))
        replayed = backend.plan(segments, rows, padded=True)
        assert replayed is not None
        assert replayed.graph_key == plan.graph_key
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(backend.project(site, x, weight, None, replayed), out)
        expected = torch.nn.functional.linear(x.double(), weight.double()).cpu()
        add_reference(site, x.cpu(), expected, segments, dict(zip(slots, weights, strict=True)))
        assert relative_error(out.cpu(), expected) <= 1e-2


def mixed_adapters(dtype: torch.dtype) -> tuple[Case, list[Weights]]:
    """Adapters of ranks 8 to 256 for a packed site, some of which leave a slice out."""
    ranks = ((8, 8, 8), (16, 0, 16), (64, 64, 64), (256, 8, 0), (16, 16, 16), (33, 1, 7))
    case = Case("mixed", 2048, (2048, 512, 512), ranks, single(6))
    return case, case.weights(dtype)


@pytest.mark.parametrize("overlap", overlaps())
def test_one_graph_serves_every_mix_of_adapters(overlap: Overlap) -> None:
    dtype, rows = torch.bfloat16, 24
    case, weights = mixed_adapters(dtype)
    backend, site = backend_of(case, dtype, overlap=overlap), case.site
    x = torch.zeros(rows, 2048, device="cuda", dtype=dtype)
    base = torch.zeros(rows, site.out_features, device="cuda", dtype=dtype)
    out = torch.zeros_like(base)
    (plan,) = backend.capture_plans(rows)
    key = plan.graph_key

    def step() -> None:
        backend.begin(site, x, plan)
        out.copy_(base)
        backend.finish(site, out, plan)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    slots = [load(backend, adapter) for adapter in weights]
    by_slot = dict(zip(slots, weights, strict=True))
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        count = [rows, 1, 5, rows][number % 4]
        chosen = torch.randint(len(slots), (count,), generator=generator).sort().values.tolist()
        segments = [Segment(token, token + 1, ((slots[c], 1.0),)) for token, c in enumerate(chosen)]
        if number % 3 == 2:
            segments[-1] = Segment(count - 1, count, ((slots[0], 0.5), (slots[2], 0.25), (slots[3], 0.25)))
        x.copy_(torch.randn(rows, 2048, generator=generator))
        base.copy_(torch.randn(rows, site.out_features, generator=generator))
        replayed = backend.plan(segments, rows, padded=True)
        assert replayed is not None
        assert replayed.graph_key == key
        graph.replay()
        expected = base.cpu().double()
        add_reference(site, x.cpu(), expected, segments, by_slot)
        assert relative_error(out.cpu()[:count], expected[:count]) <= 1e-2
        assert torch.equal(out[count:], base[count:])
        eager = base.clone()
        backend.add(site, x, eager, replayed)
        assert torch.equal(eager, out)


@pytest.mark.parametrize("overlap", overlaps()[1:])
def test_overlap_does_not_change_the_result(overlap: Overlap) -> None:
    dtype = torch.bfloat16
    case, weights = mixed_adapters(dtype)
    case = Case("overlap", case.in_features, case.slices, case.adapters, ((90, ((0, 1.0),)), *single(6)[1:]))
    results = []
    for choice in ("none", overlap):
        backend = backend_of(case, dtype, overlap=choice)
        slots = [load(backend, adapter) for adapter in weights]
        generator = torch.Generator(device="cuda").manual_seed(3)
        x = torch.randn(case.num_tokens, 2048, device="cuda", dtype=dtype, generator=generator)
        weight = torch.randn(3072, 2048, device="cuda", dtype=dtype, generator=generator)
        plan = backend.plan(case.segments(slots), case.num_tokens)
        assert plan is not None
        for _ in range(20):
            backend.begin(case.site, x, plan)
            out = torch.nn.functional.linear(x, weight)
            backend.finish(case.site, out, plan)
        results.append(out)
    assert torch.equal(*results)


def test_plans_and_products_never_wait_for_the_card() -> None:
    dtype = torch.bfloat16
    case, weights = mixed_adapters(dtype)
    backend = backend_of(case, dtype, fold=True)
    slots = [load(backend, adapter) for adapter in weights]
    x = torch.randn(6, 2048, device="cuda", dtype=dtype)
    out = torch.zeros(6, 3072, device="cuda", dtype=dtype)
    weight = torch.randn(3072, 2048, device="cuda", dtype=dtype)
    for waiting in ("default", "error"):  # the first round compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            for shift in range(4):
                order = slots[shift:] + slots[:shift]
                segments = [Segment(token, token + 1, ((slot, 1.0),)) for token, slot in enumerate(order)]
                for padded in (False, True):
                    plan = backend.plan(segments, 6, padded=padded)
                    assert plan is not None
                    backend.add(case.site, x, out, plan)
                    backend.project(case.site, x, weight, None, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_metadata_is_not_overwritten_while_it_is_copied() -> None:
    dtype = torch.float32
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case("queue", 256, (256,), ((8,),) * 16, single(16))
    backend, weights = backend_of(case, dtype), case.weights(dtype)
    slots = [load(backend, adapter) for adapter in weights]
    by_slot = dict(zip(slots, weights, strict=True))
    x = torch.randn(16, 256, device="cuda")
    outs, orders = [], []
    busy = torch.randn(8192, 8192, device="cuda")
    for shift in range(8):
        busy = busy @ busy * 1e-4  # the device falls behind the host
        order = slots[shift:] + slots[:shift]
        segments = [Segment(token, token + 1, ((slot, 1.0),)) for token, slot in enumerate(order)]
        plan = backend.plan(segments, 16)
        assert plan is not None
        outs.append(torch.zeros(16, 256, device="cuda"))
        orders.append(segments)
        backend.add(case.site, x, outs[-1], plan)
    for out, segments in zip(outs, orders, strict=True):
        expected = torch.zeros(16, 256, dtype=torch.float64)
        add_reference(case.site, x.cpu(), expected, segments, by_slot)
        assert relative_error(out.cpu(), expected) <= 1e-5


def test_copies_end_and_slots_are_reused() -> None:
    case = Case("reuse", 512, (512, 128), ((16, 16), (8, 0), (64, 64)), single(2))
    backend, weights = backend_of(case, torch.bfloat16), case.weights(torch.bfloat16)
    pinned = [
        {
            module: ModuleWeights(pair.A.pin_memory(), pair.B.pin_memory(), pair.scale)
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
