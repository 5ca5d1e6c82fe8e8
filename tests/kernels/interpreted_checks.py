"""The Triton backend on the CPU, through Triton's interpreter. Collected by `test_triton_interpreter.py`, which runs
this file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

import threading

import pytest
import torch
from support.interpreter import multiply_bfloat16
from torch.utils._python_dispatch import TorchDispatchMode

from loramux.kernels.lora import ArenaFullError, Segment, fold_launch, launch, make_backend, triton_backend
from loramux.kernels.lora import triton_plan as plans
from loramux.kernels.lora.cases import Case, check, load, relative_error, scaled_cases, single, small_cases
from loramux.kernels.lora.interface import ModuleWeights, Site, SiteSlice
from loramux.kernels.lora.reference import add_reference
from loramux.kernels.lora.triton_backend import TritonLoraBackend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = small_cases()


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def backend_of(
    case: Case, dtype: torch.dtype = torch.float32, *, budget: int = 1 << 20, fold: bool = False
) -> TritonLoraBackend:
    """A backend whose arena and scratch are NaN, so that a read of what nobody wrote shows."""
    backend = make_backend(
        [case.site], dtype=dtype, device="cpu", budget_bytes=budget, max_slots=16, max_tokens=64, max_set_rank=400,
        implementation="triton", fold=fold,
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
        assert {each.partials for each in plan.launches} == {rows > 0}
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
    assert plans.build([], lambda slot: 1, backend._tiles, 4)[0] == []


def test_rank_work_is_not_padded_beyond_the_tile() -> None:
    case = Case("ranks", 8, (8,), ((4,), (40,)), single(2))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    plan = backend.plan(case.segments(slots), 2)
    assert plan is not None
    (only,) = plan.launches
    tile = backend._tiles[only.variant].block_r
    assert only.shrink[1] == 1 + -(-40 // tile)
    assert only.expand[1] == 2


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


@pytest.mark.parametrize("case", scaled_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize(("gated", "padded"), [(False, False), (True, False), (True, True)])
def test_scale_vectors_and_gates(case: Case, gated: bool, padded: bool) -> None:
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, gated=gated, padded=padded) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["sets", "mixed-lengths", "many-splits"])
def test_gates_weigh_every_token(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, gated=True) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_padded_plans_match_the_reference(case: Case) -> None:
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, padded=True) <= TOLERANCE[torch.float32]


def tokens_of(slots: list[int]) -> list[Segment]:
    return [Segment(token, token + 1, ((slot, 1.0),)) for token, slot in enumerate(slots)]


def launches_of(backend: TritonLoraBackend, plan, sites: list[Site], rows: int, monkeypatch) -> list[tuple]:
    """Everything that the step's launches are given: grids, pointers, numbers and constants."""
    seen: list[tuple] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **constants):
                theirs = 3 if self.name == "fold_kernel" else 1  # the caller's tensors: out, and x and weights
                plain = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[theirs:])
                if self.name == "fold_kernel":
                    plain = plain[1:]  # no bias: weights stand in for it
                seen.append((self.name, grid, plain, tuple(sorted(constants.items()))))

            return launch

    with monkeypatch.context() as patch:
        for name in ("shrink_kernel", "expand_kernel", "scale_kernel"):
            patch.setattr(triton_backend, name, Recorder(name))
        patch.setattr(fold_launch, "fold_kernel", Recorder("fold_kernel"))
        for site in sites:
            weight = torch.empty(site.out_features, site.in_features)
            if backend.folds(site, weight, plan):
                backend.project(site, torch.zeros(rows, site.in_features), weight, None, plan)
            elif plan.touches(site):
                x = backend.scale_input(site, torch.zeros(rows, site.in_features), plan)
                backend.add(site, x, torch.zeros(rows, site.out_features), plan)
    return seen


def graph_backend(*, fold: bool = False) -> tuple[TritonLoraBackend, list[int]]:
    """Two sites for tokens and a head, with adapters of ranks 4 and 40, one at the head, one with an output scale."""
    sites = [
        Site(0, 24, (SiteSlice("q", 16), SiteSlice("k", 8))),
        Site(1, 16, (SiteSlice("o", 24),)),
        Site(2, 24, (SiteSlice("head", 32),), lane="rows"),
    ]
    backend = make_backend(
        sites, dtype=torch.float32, device="cpu", budget_bytes=1 << 16, max_slots=8, max_tokens=1024,
        max_set_rank=64, implementation="triton", fold=fold,
    )  # fmt: skip
    assert isinstance(backend, TritonLoraBackend)
    shapes = {"q": (24, 16), "k": (24, 8), "o": (16, 24), "head": (24, 32)}

    def pair(name: str, rank: int, scale: bool = False) -> ModuleWeights:
        inputs, outputs = shapes[name]
        return ModuleWeights(
            torch.ones(rank, inputs), torch.ones(outputs, rank), 1.0, torch.ones(outputs) if scale else None
        )

    adapters = [
        {"q": pair("q", 4)},
        {"q": pair("q", 40), "k": pair("k", 40), "o": pair("o", 40)},
        {"o": pair("o", 4), "head": pair("head", 4)},
        {"o": pair("o", 4, scale=True)},
    ]
    return backend, [load(backend, adapter) for adapter in adapters]


@pytest.mark.parametrize("fold", [False, True], ids=["apart", "folded"])
def test_equal_graph_keys_mean_equal_launches(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, (small, large, head, scaled) = graph_backend(fold=fold)
    sites, rows = list(backend.sites), 6
    dummies = {}
    for lane, mine in (("tokens", sites[:2]), ("rows", sites[2:])):
        for plan in backend.capture_plans(rows, lane, scaled=True):
            dummies[plan.graph_key] = launches_of(backend, plan, mine, rows, monkeypatch)
    assert len(dummies) == 4
    assert {name for launches in dummies.values() for name, *_ in launches} == (
        {"shrink_kernel", "scale_kernel", "fold_kernel" if fold else "expand_kernel"}
    )
    for slots in ([small], [large, small], [large] * 6, [head] * 6, [small, large, head, head, large, small]):
        plan = backend.plan(tokens_of(slots), rows, padded=True)
        assert plan is not None
        assert launches_of(backend, plan, sites[:2], rows, monkeypatch) == dummies[plan.graph_key]
        assert plan.touches(sites[2]) == (head in slots)
    one = dummies[plan.graph_key]
    plan = backend.plan(tokens_of([scaled, large]), rows, padded=True)
    assert plan is not None
    assert launches_of(backend, plan, sites[:2], rows, monkeypatch) == dummies[plan.graph_key] != one
    plan = backend.plan(tokens_of([small, head]), rows, "rows", padded=True)
    assert plan is not None
    assert launches_of(backend, plan, sites[2:], rows, monkeypatch) == dummies[plan.graph_key]


def test_steps_without_adapters_of_a_lane_have_no_padded_plan() -> None:
    backend, (small, _, head, _) = graph_backend()
    assert backend.plan([], 4, padded=True) is None
    assert backend.plan(tokens_of([small]), 4, "rows", padded=True) is None
    assert backend.plan(tokens_of([head]), 4, "rows", padded=True) is not None


def test_long_steps_get_exact_plans_and_no_capture() -> None:
    backend, (small, *_) = graph_backend()
    limit = backend._partial_rows
    assert backend.plan(tokens_of([small]), limit, padded=True).graph_key is not None
    assert backend.plan(tokens_of([small]), limit + 1, padded=True).graph_key is None
    assert list(backend.capture_plans(limit + 1)) == []
    assert len(list(backend.capture_plans(limit))) == 1
    with pytest.raises(ValueError, match="max_tokens 1024"):
        list(backend.capture_plans(1025))


def test_an_empty_padded_plan_writes_nothing() -> None:
    backend, _ = graph_backend()
    for plan in backend.capture_plans(5, scaled=True):
        for site in backend.sites[:2]:
            x, out = torch.full((5, site.in_features), torch.nan), torch.full((5, site.out_features), torch.nan)
            backend.arena.memory.fill_(torch.nan)
            x = backend.scale_input(site, x, plan)
            backend.add(site, x, out, plan)
            assert bool(out.isnan().all())


def test_padded_and_exact_plans_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("bits", 600, (40, 9), ((16, 5), (30, 0), (3, 3)), single(3, length=3))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    x, results = torch.randn(9, 600), []
    for padded, programs in ((False, 2048), (True, 2048), (True, 1)):
        monkeypatch.setattr(launch, "PADDED_PROGRAMS", programs)
        plan = backend.plan(case.segments(slots), 9, padded=padded)
        assert plan is not None
        results.append(torch.zeros(9, 49))
        backend.add(case.site, x, results[-1], plan)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_each_rank_block_of_a_short_segment_is_read_once() -> None:
    case = Case("once", 64, (64,), ((40,), (16,)), ((16, ((0, 1.0),)), (3, ((1, 1.0), (0, 0.5)))))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    for padded in (False, True):
        plan = backend.plan(case.segments(slots), 19, padded=padded)
        assert plan is not None
        (only,) = plan.launches
        records = backend._lanes["tokens"].records.tensor[only.shrink[0] :]
        read = records[1 : 1 + int(records[0, 0]), 2:4].tolist()
        assert len(read) == len({tuple(pair) for pair in read}) == 3 + 1 + 3


def test_begin_and_finish_belong_together() -> None:
    backend, (small, large, *_) = graph_backend()
    q, o = backend.sites[:2]
    plan = backend.plan(tokens_of([small, large]), 2)
    assert plan is not None
    x, out, together = torch.randn(2, 24), torch.zeros(2, 24), torch.zeros(2, 24)
    backend.begin(q, x, plan)
    backend.finish(q, out, plan)
    backend.add(q, x, together, plan)
    assert torch.equal(out, together)
    with pytest.raises(ValueError, match="without its begin"):
        backend.finish(q, out, plan)
    backend.begin(q, x, plan)
    with pytest.raises(ValueError, match="without its begin"):
        backend.finish(o, out, plan)


@pytest.mark.parametrize("overlap", ["stream", "launch"])
def test_overlap_needs_a_card(overlap) -> None:
    with pytest.raises(ValueError, match="needs a CUDA card"):
        make_backend(
            [CASES[0].site], dtype=torch.float32, device="cpu", budget_bytes=0, max_slots=1, max_tokens=1,
            implementation="triton", overlap=overlap,
        )  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails at operations that would wait for a card's results."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
        assert function.overloadpacket.__name__ not in waits, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def test_plan_and_add_do_not_wait_for_the_device() -> None:
    case = scaled_cases()[2]
    backend, weights = backend_of(case, fold=True), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    x, out, gates = torch.randn(case.num_tokens, 65), torch.zeros(case.num_tokens, 70), case.gates()
    with NoWaiting():
        for padded in (False, True):
            plan = backend.plan(case.segments(slots), case.num_tokens, padded=padded)
            assert plan is not None
            x = backend.scale_input(case.site, x, plan, gates)
            backend.add(case.site, x, out, plan, gates)
            backend.project(case.site, x, torch.zeros(70, 65), None, plan, gates)
