"""The torch backend against the float64 reference, and its slots, rows and bounds."""

import threading

import pytest
import torch

from loramux.kernels.lora import ArenaFullError, LaunchTable, ModuleWeights, Segment, Site, SiteSlice, make_backend
from loramux.kernels.lora.cases import (
    Case,
    Weights,
    check,
    large_cases,
    load,
    relative_error,
    scaled_cases,
    single,
    small_cases,
)
from loramux.kernels.lora.reference import add_reference
from loramux.kernels.lora.torch_backend import Products, TorchLoraBackend
from loramux.kernels.lora.torch_bank import bucket
from loramux.kernels.lora.torch_steps import GroupStep, LongStep

CASES = [*small_cases(), *large_cases()]
EVEN = [  # every adapter has as many tokens: products go straight into the output
    Case("even-3", 33, (33, 17, 17), ((4, 4, 4),) * 5, single(5, length=3)),
    Case("even-20", 65, (128, 64, 64), ((8, 8, 8),) * 3, single(3, length=20)),
    Case("even-20-odd", 40, (24, 8, 24), ((4, 0, 6), (4, 0, 6), (4, 0, 6)), single(3, length=20)),
    Case("even-17-base", 33, (70,), ((19,), (3,)), ((2, ()), *single(2, length=17), (1, ()))),
    Case("one-each-sliced", 70, (128, 8, 128), ((16, 0, 3),) * 6, single(6)),
    Case("one-each-apart", 70, (128, 64), ((16, 16),) * 9, tuple((1, ((i, 0.5),)) for i in (7, 0, 5, 2))),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def backend_of(
    case: Case, dtype: torch.dtype = torch.float32, *, budget: int = 1 << 28, slots: int = 128
) -> TorchLoraBackend:
    backend = make_backend(
        [case.site], dtype=dtype, device="cpu", budget_bytes=budget, max_slots=slots, max_tokens=4096, max_set_rank=600
    )
    assert isinstance(backend, TorchLoraBackend)
    return backend


def poison(backend: TorchLoraBackend, slot: int, weights: Weights) -> None:
    """Leaves NaN in the slot's memory and rows before it is released."""
    nan = {
        module: ModuleWeights(torch.full_like(pair.A, torch.nan), torch.full_like(pair.B, torch.nan), torch.nan)
        for module, pair in weights.items()
    }
    backend.release(slot)
    again = load(backend, nan)
    assert again == slot
    plan = backend.plan([Segment(0, 1, ((slot, 1.0),))], 1)
    assert plan is not None
    site = backend.sites[0]
    backend.add(site, torch.ones(1, site.in_features), torch.ones(1, site.out_features), plan)
    backend.release(slot)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    backend, weights = backend_of(case, dtype), case.weights(dtype)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights) <= TOLERANCE[dtype]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "banks"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("products", ["auto", "banks", "own"])
@pytest.mark.parametrize("case", [*CASES, *EVEN], ids=lambda case: case.name)
def test_every_form_matches_the_reference(
    case: Case, products: Products, dtype: torch.dtype, banks: torch.dtype, gated: bool
) -> None:
    backend, weights = backend_of(case, dtype), case.weights(dtype)
    backend.use(products, banks)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, gated=gated) <= TOLERANCE[dtype]
    assert (backend.bank_bytes > 0) or products != "banks"
    assert backend.bank_bytes == 0 or products != "own"


@pytest.mark.parametrize(
    ("banks", "tokens", "others", "own"),
    [
        (torch.float32, 8, 0, False), (torch.float32, 9, 0, True), (torch.bfloat16, 8, 0, False),
        (torch.bfloat16, 9, 0, True), (torch.float32, 16, 1, False), (torch.float32, 17, 1, True),
        (torch.bfloat16, 64, 1, False), (torch.bfloat16, 65, 1, True),
    ],
)  # fmt: skip
def test_the_rule_says_which_weights_are_multiplied(banks: torch.dtype, tokens: int, others: int, own: bool) -> None:
    runs = ((tokens, ((0, 1.0),)), *((1, ((1 + i, 1.0),)) for i in range(others)))
    case = Case("rule", 64, (64,), ((8,),) * (1 + others), runs)
    backend, weights = backend_of(case, torch.bfloat16), case.weights(torch.bfloat16)
    backend.use(bank_dtype=banks)
    slots = [load(backend, adapter) for adapter in weights]
    plan = backend.plan(case.segments(slots), case.num_tokens)
    assert plan is not None
    (steps,) = plan.steps.values()
    assert any(isinstance(step, LongStep) for step in steps) is own
    assert any(isinstance(step, GroupStep) for step in steps) is (not own or others > 0)


@pytest.mark.parametrize(
    ("lengths", "order", "grouped"),
    [
        ((40, 40, 40), (0, 1, 2), 3), ((40, 40, 40), (2, 1, 0), 0), ((40, 41, 40), (0, 1, 2), 0),
        ((40, 40, 23), (0, 1, 2), 2), ((40, 40, 1, 1), (0, 1, 2, 3), 4), ((256, 256), (0, 1), 2),
        ((257, 257), (0, 1), 0),
    ],
)  # fmt: skip
def test_equal_prompts_in_the_order_of_rows_are_one_product(
    lengths: tuple[int, ...], order: tuple[int, ...], grouped: int
) -> None:
    adapters = ((8,),) * len(lengths)
    case = Case("even", 64, (64,), adapters, tuple((n, ((i, 1.0),)) for n, i in zip(lengths, order, strict=True)))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    backend.plan([Segment(i, i + 1, ((slot, 1.0),)) for i, slot in enumerate(slots)], len(slots))  # gives out the rows
    plan = backend.plan(case.segments(slots), case.num_tokens)
    assert plan is not None
    (steps,) = plan.steps.values()
    assert sum(isinstance(step, LongStep) for step in steps) == len(lengths) - grouped
    assert check(backend, case, slots, weights) <= 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_equal_prompts_of_sets_match_the_reference(gated: bool) -> None:
    runs = ((40, ((0, 0.5), (1, 1.5))), (40, ((2, 1.0),)), (40, ((3, -2.0), (4, 1.0), (5, 0.25))), (3, ((6, 1.0),)))
    ranks = ((8, 8), (16, 4), (4, 0), (0, 8), (8, 8), (40, 3), (8, 8))
    case = Case("sets", 64, (64, 32), ranks, runs)
    for dtype in (torch.float32, torch.float64):
        backend, weights = backend_of(case, dtype), case.weights(dtype)
        slots = [load(backend, adapter) for adapter in weights]
        for _ in range(2):
            assert check(backend, case, slots, weights, gated=gated) <= 1e-5


def test_float64_is_exact_to_rounding() -> None:
    case = CASES[9]
    backend, weights = backend_of(case, torch.float64), case.weights(torch.float64)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights) <= 1e-6  # s w is float32


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", scaled_cases(), ids=lambda case: case.name)
def test_scale_vectors(case: Case, gated: bool, dtype: torch.dtype) -> None:
    backend, weights = backend_of(case, dtype), case.weights(dtype)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, gated=gated) <= TOLERANCE[dtype]
    free = backend.bytes_used
    for slot in slots:
        backend.release(slot)
    assert backend.bytes_used == 0 < free


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gates_weigh_every_token(case: Case) -> None:
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    assert check(backend, case, slots, weights, gated=True) <= TOLERANCE[torch.float32]


def test_gates_that_do_not_fit_are_refused() -> None:
    case = Case("gates", 8, (8,), ((2,), (2,)), ((2, ((0, 1.0), (1, 1.0))),))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    x, out = torch.ones(2, 8), torch.zeros(2, 8)
    plan = backend.plan(case.segments(slots), 2)
    assert plan is not None
    for gates, message in [
        (torch.ones(2, 2, dtype=torch.float64), "float32"),
        (torch.ones(2, 2).T, "unit stride"),
        (torch.ones(2, 1), "do not hold 2 tokens x 2"),
        (torch.ones(1, 2), "do not hold 2 tokens x 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.add(case.site, x, out, plan, gates)
    twice = backend.plan([Segment(0, 2, ((slots[0], 1.0), (slots[0], 1.0)))], 2)
    assert twice is not None
    with pytest.raises(ValueError, match="each adapter once"):
        backend.add(case.site, x, out, twice, torch.ones(2, 2))
    assert not out.any()


def test_scale_vectors_must_be_those_reserved() -> None:
    backend = backend_of(Case("vectors", 8, (8, 4), ((4, 4),), single(1)))
    A, B, g = torch.zeros(2, 8), torch.zeros(8, 2), torch.ones(8)
    one = backend.bytes_needed({"module0": 2})
    assert backend.bytes_needed({"module0": 2}, [("module0", "out")]) == one + 8 * 4
    for ranks, scales, message in [
        ({"module0": 0}, [], "below 1"),
        ({"module0": -1}, [("module0", "out")], "below 0"),
        ({"module0": 2}, [("module1", "out")], "needs a rank"),
        ({"module0": 2}, [("module0", "in")], "shares its input"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.reserve(ranks, scales)
    slot = backend.reserve({"module0": 2}, [("module0", "out")])
    for weights, message in [
        (ModuleWeights(A, B, 1.0), r"out scale none, reserved \(8,\)"),
        (ModuleWeights(A, B, 1.0, out_scale=g[:4]), r"out scale \(4,\), reserved \(8,\)"),
        (ModuleWeights(A, B, 1.0, out_scale=g, in_scale=g), r"in scale \(8,\), reserved none"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.fill(slot, {"module0": weights})
    backend.fill(slot, {"module0": ModuleWeights(A, B, 1.0, out_scale=g)})
    assert backend.filled(slot)


def test_plans_have_no_graph_keys() -> None:
    case = Case("keys", 8, (8,), ((2,),), single(1))
    backend, weights = backend_of(case), case.weights(torch.float32)
    plan = backend.plan(case.segments([load(backend, weights[0])]), 1, padded=True)
    assert plan is not None
    assert plan.graph_key is None
    assert list(backend.capture_plans(1)) == []


@pytest.mark.parametrize(
    "extra", [{"overlap": "stream"}, {"fold": True}, {"table": LaunchTable()}], ids=["overlap", "fold", "table"]
)
def test_options_of_triton_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="triton implementation"):
        make_backend(
            [CASES[0].site], dtype=torch.float32, device="cpu", budget_bytes=0, max_slots=1, max_tokens=1, **extra
        )


def test_output_may_be_a_column_view() -> None:
    case = Case("view", 64, (64, 64), ((16, 16),) * 3, single(3))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    segments = case.segments(slots)
    plan = backend.plan(segments, 3)
    assert plan is not None
    x, wide = torch.randn(3, 64), torch.zeros(3, 200)
    expected = torch.zeros(3, 128, dtype=torch.float64)
    add_reference(case.site, x, expected, segments, dict(zip(slots, weights, strict=True)))
    backend.add(case.site, x, wide[:, 7:135], plan)
    assert relative_error(wide[:, 7:135], expected) <= 1e-5
    assert not wide[:, :7].any()
    assert not wide[:, 135:].any()


def test_rows_survive_changing_batches_and_reused_slots() -> None:
    generator = torch.Generator().manual_seed(3)
    adapters = 24
    case = Case("churn", 64, (64, 32), tuple((4 + 3 * (i % 7), 8) for i in range(adapters)), single(adapters))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    for step in range(60):
        victim = int(torch.randint(adapters, (), generator=generator))
        if step % 3 == 0:
            poison(backend, slots[victim], weights[victim])
            slots[victim] = load(backend, weights[victim])
        order = torch.randperm(adapters, generator=generator).tolist()[: 1 + step % 10]
        lengths = torch.randint(1, 12, (len(order),), generator=generator).tolist()
        runs = tuple((length, ((number, 1.0),)) for number, length in zip(order, lengths, strict=True))
        now = Case("churn", 64, (64, 32), case.adapters, runs)
        assert check(backend, now, slots, weights, seed=step) <= 1e-5
    for slot in slots:
        backend.release(slot)
    assert backend.bytes_used == 0
    assert backend.bank_bytes == 0


def test_a_steady_batch_copies_nothing_and_keeps_its_plan() -> None:
    case = Case("steady", 64, (64,), ((8,),) * 6, single(4))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    segments = case.segments(slots)
    plan = backend.plan(segments, 4)
    bank = backend.bank_bytes
    assert backend.plan(list(segments), 4) is plan
    other = backend.plan([Segment(0, 2, ((slots[4], 1.0),))], 2)
    assert other is not None
    assert other is not plan
    assert backend.bank_bytes >= bank


def test_tokens_in_the_backends_order_are_used_where_they_lie() -> None:
    case = Case("order", 64, (64,), ((8,),) * 8, single(8))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    for arrived in ([5, 2], [5, 2, 7, 0], [3, 5, 2, 7, 0, 1, 6, 4]):  # rows are given out as adapters come
        backend.plan([Segment(i, i + 1, ((slots[n], 1.0),)) for i, n in enumerate(arrived)], len(arrived))
    ordered = sorted(slots, key=backend.order)
    assert ordered != slots
    plan = backend.plan([Segment(i, i + 1, ((slot, 1.0),)) for i, slot in enumerate(ordered)], 8)
    assert plan is not None
    ((step,),) = plan.steps.values()
    assert isinstance(step, GroupStep)
    assert step.direct
    assert list(plan.steady) == [0]


@pytest.mark.parametrize("slices", [(64,), (64, 64), (64, 32)])
@pytest.mark.parametrize("how", ["as it is", "gated", "a column view", "weighted", "not all tokens"])
def test_steady_steps_are_those_of_the_general_path(slices: tuple[int, ...], how: str) -> None:
    weight = 0.5 if how == "weighted" else 1.0
    case = Case("steady", 64, slices, ((8,) * len(slices),) * 6, tuple((1, ((i, weight),)) for i in range(6)))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    tokens = 7 if how == "not all tokens" else 6
    plan = backend.plan(case.segments(slots), tokens)
    assert plan is not None
    assert bool(plan.steady) is (how not in ("weighted", "not all tokens") and slices != (64, 32))
    gates = torch.rand(tokens, 1) if how == "gated" else None
    x, wide = torch.randn(tokens, 64), torch.randn(tokens, sum(slices) + (8 if how == "a column view" else 0))
    out, general = wide[:, : sum(slices)], wide.clone()[:, : sum(slices)]
    backend.add(case.site, x, out, plan, gates)
    expected = general.double()
    add_reference(case.site, x, expected, case.segments(slots), dict(zip(slots, weights, strict=True)), gates=gates)
    plan.steady.clear()
    backend.add(case.site, x, general, plan, gates)
    assert relative_error(out, expected) <= 1e-5
    assert torch.equal(out, general)


def test_an_older_plan_still_works_after_the_banks_grow() -> None:
    case = Case("older", 64, (64,), ((8,),) * 40, single(2))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    by_slot = dict(zip(slots, weights, strict=True))
    segments = case.segments(slots)
    plan = backend.plan(segments, 2)
    assert plan is not None
    backend.plan([Segment(i, i + 1, ((slots[i], 1.0),)) for i in range(40)], 40)
    x, out = torch.randn(2, 64), torch.zeros(2, 64)
    expected = out.double()
    add_reference(case.site, x, expected, segments, by_slot)
    backend.add(case.site, x, out, plan)
    assert relative_error(out, expected) <= 1e-5


def test_banks_stay_near_what_recent_steps_use() -> None:
    adapters = 64
    case = Case("turns", 512, (512,), ((16,),) * adapters, single(1))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights]
    one = backend.bytes_needed({"module0": 16})
    for slot in slots:
        backend.plan([Segment(0, 1, ((slot, 1.0),))], 1)
    assert backend.bytes_used == adapters * one
    assert backend.bank_bytes <= 20 * one


def test_untouched_sites_and_base_steps_cost_nothing() -> None:
    sites = [Site(0, 8, (SiteSlice("a", 8),)), Site(1, 8, (SiteSlice("b", 8),))]
    backend = make_backend(sites, dtype=torch.float32, device="cpu", budget_bytes=1 << 16, max_slots=2, max_tokens=8)
    slot = load(backend, {"a": ModuleWeights(torch.ones(1, 8), torch.ones(8, 1), 1.0)})
    assert backend.plan([], 8) is None
    plan = backend.plan([Segment(0, 1, ((slot, 1.0),))], 8)
    assert plan is not None
    assert plan.num_tokens == 8
    nothing = torch.empty(0)
    backend.add(sites[1], nothing, nothing, plan)  # would fail if it looked at its arguments


def test_fill_runs_beside_add() -> None:
    case = Case("threads", 128, (128, 128), ((16, 16),) * 8, single(4))
    backend, weights = backend_of(case), case.weights(torch.float32)
    slots = [load(backend, adapter) for adapter in weights[:4]]
    late = [backend.reserve({module: pair.rank for module, pair in adapter.items()}) for adapter in weights[4:]]
    assert not any(backend.filled(slot) for slot in late)

    def fill() -> None:
        for slot, adapter in zip(late, weights[4:], strict=True):
            backend.fill(slot, adapter)

    thread = threading.Thread(target=fill)
    with torch.inference_mode():
        thread.start()
        for seed in range(20):
            assert check(backend, case, [*slots, *late], weights, seed=seed) <= 1e-5
        thread.join()
        assert all(backend.filled(slot) for slot in late)
        for slot in late:
            backend.publish(slot)
        everyone = Case("threads", 128, (128, 128), case.adapters, single(8))
        assert check(backend, everyone, [*slots, *late], weights) <= 1e-5


def test_reserving_inside_inference_mode_leaves_ordinary_tensors() -> None:
    case = CASES[2]
    backend, weights = backend_of(case), case.weights(torch.float32)
    with torch.inference_mode():
        slots = [backend.reserve({module: pair.rank for module, pair in adapter.items()}) for adapter in weights]
    for slot, adapter in zip(slots, weights, strict=True):
        backend.fill(slot, adapter)
        backend.publish(slot)
    with torch.inference_mode():
        assert check(backend, case, slots, weights) <= 1e-5
    fewer = Case("fewer", case.in_features, case.slices, case.adapters, case.runs[:2])
    assert check(backend, fewer, slots, weights) <= 1e-5


def test_bytes_and_slots_are_bounded() -> None:
    case = Case("bounds", 8, (8,), ((4,),), single(1))
    one = 4 * (8 + 8) * 4
    backend = backend_of(case, budget=2 * one + 8, slots=2)
    assert backend.bytes_needed({"module0": 4}) == one
    assert backend.bytes_total == 2 * one + 8
    first = backend.reserve({"module0": 4})
    with pytest.raises(ArenaFullError) as full:
        backend.reserve({"module0": 8})
    assert (full.value.needed, full.value.free) == (2 * one, one + 8)
    backend.reserve({"module0": 1})
    with pytest.raises(ArenaFullError) as full:
        backend.reserve({"module0": 1})
    assert full.value.free == 0
    backend.release(first)
    assert backend.bytes_used == one // 4
    with pytest.raises(KeyError):
        backend.reserve({"nowhere": 1})
    with pytest.raises(ValueError, match="at least one module"):
        backend.reserve({})
    with pytest.raises(ValueError, match="below 1"):
        backend.reserve({"module0": 0})


def test_weights_must_be_those_reserved() -> None:
    backend = backend_of(Case("fill", 8, (8, 8), ((4, 4),), single(1)))
    slot = backend.reserve({"module0": 4})
    good = ModuleWeights(torch.zeros(4, 8), torch.zeros(8, 4), 1.0)
    with pytest.raises(ValueError, match="module1"):
        backend.fill(slot, {"module0": good, "module1": good})
    with pytest.raises(ValueError, match=r"reserved A \(4, 8\)"):
        backend.fill(slot, {"module0": ModuleWeights(torch.zeros(2, 8), torch.zeros(8, 2), 1.0)})
    with pytest.raises(ValueError, match="not filled"):
        backend.publish(slot)


def test_plans_refuse_what_passes_a_bound() -> None:
    case = Case("limits", 8, (8,), ((4,),) * 3, single(3))
    backend = make_backend(
        [case.site], dtype=torch.float32, device="cpu", budget_bytes=1 << 16, max_slots=4, max_tokens=8,
        max_set_size=2, max_set_rank=6,
    )  # fmt: skip
    slots = [load(backend, adapter) for adapter in case.weights(torch.float32)]
    a, b, c = ((slot, 1.0) for slot in slots)
    for segments, tokens, message in [
        ([Segment(0, 1, (a,))], 9, "max_tokens 8"),
        ([Segment(0, 1, (a, b, c))], 8, "max_set_size 2"),
        ([Segment(0, 1, (a, b))], 8, "max_set_rank 6"),
        ([Segment(0, 2, (a,)), Segment(1, 3, (b,))], 8, "out of order"),
        ([Segment(7, 9, (a,))], 8, "out of range"),
        ([Segment(0, 1, ())], 8, "no adapter"),
        ([Segment(0, 1, ((3, 1.0),))], 8, "not reserved"),
        ([Segment(0, 1, ((-1, 1.0),))], 8, "not reserved"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.plan(segments, tokens)
    unpublished = backend.reserve({"module0": 1})
    with pytest.raises(ValueError, match="not published"):
        backend.plan([Segment(0, 1, ((unpublished, 1.0),))], 8)


def test_sites_must_be_numbered_and_modules_unique() -> None:
    part = (SiteSlice("a", 8),)
    for sites, message in [
        ([Site(1, 8, part)], "carries index 1"),
        ([Site(0, 8, part), Site(1, 8, part)], "two sites"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_backend(sites, dtype=torch.float32, device="cpu", budget_bytes=0, max_slots=1, max_tokens=1)


@pytest.mark.parametrize(("rank", "features", "padded"), [(1, 8192, 4), (5, 8192, 8), (16, 1024, 16), (65, 8192, 96)])
def test_rank_buckets(rank: int, features: int, padded: int) -> None:
    assert bucket(rank, features) == padded


def test_small_sites_share_one_bucket() -> None:
    assert {bucket(rank, 64) for rank in (1, 4, 8, 16, 32, 64)} == {64}


@pytest.mark.parametrize("rank", range(1, 300, 7))
def test_buckets_hold_their_rank(rank: int) -> None:
    assert rank <= bucket(rank, 4096) <= max(4, 2 * rank)
