"""Folded projections on the CPU, through Triton's interpreter. Collected by `test_triton_interpreter.py`, which runs
this file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

import pytest
import torch
from support.interpreter import multiply_bfloat16
from torch.nn import functional as F

from loramux.kernels.lora import LaunchTable, Segment, Site, fold_launch, make_backend
from loramux.kernels.lora.cases import (
    Case,
    Weights,
    check_folded,
    load,
    relative_error,
    scaled_cases,
    single,
    small_cases,
)
from loramux.kernels.lora.launch import FoldConfig, FoldEntry
from loramux.kernels.lora.triton_backend import TritonLoraBackend

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = small_cases()


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def backend_of(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    fold: bool | None = True,
    table: LaunchTable | None = None,
    tokens: int = 64,
) -> TritonLoraBackend:
    """A backend whose arena and scratch are NaN, so that a read of what nobody wrote shows."""
    backend = make_backend(
        [case.site], dtype=dtype, device="cpu", budget_bytes=1 << 20, max_slots=64, max_tokens=tokens,
        max_set_rank=400, implementation="triton", fold=fold, table=table,
    )  # fmt: skip
    assert isinstance(backend, TritonLoraBackend)
    for memory in (backend.arena.memory, backend._whole, backend._parts):
        memory.fill_(torch.nan)
    return backend


def loaded(
    case: Case, dtype: torch.dtype = torch.float32, **options
) -> tuple[TritonLoraBackend, list[int], list[Weights]]:
    backend, weights = backend_of(case, dtype, **options), case.weights(dtype)
    return backend, [load(backend, adapter) for adapter in weights], weights


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, padded: bool) -> None:
    backend, slots, weights = loaded(case)
    found = check_folded(backend, case, slots, weights, padded=padded, bias=not padded)
    assert found <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("case", scaled_cases(), ids=lambda case: case.name)
def test_scale_vectors_and_gates(case: Case, gated: bool, padded: bool) -> None:
    backend, slots, weights = loaded(case)
    found = check_folded(backend, case, slots, weights, gated=gated, padded=padded)
    assert found <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["touched-slices", "sets"])
def test_matches_the_reference_in_half_precision(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    backend, slots, weights = loaded(case, dtype)
    assert check_folded(backend, case, slots, weights) <= TOLERANCE[dtype]


def test_many_row_tiles_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than share a pass over weights, segments that straddle them, more records than are sought at once."""
    monkeypatch.setattr(fold_launch, "SEARCH_RECORDS", 16)
    runs = [(1 + number % 29, ((number % 5, 1.0),) if number % 4 else ()) for number in range(24)]
    case = Case("tiles", 40, (40, 9), ((3, 0), (16, 16), (0, 5), (20, 1), (4, 4)), tuple(runs))
    backend, slots, weights = loaded(case, tokens=512)
    assert case.num_tokens > 9 * 32
    plan = backend.plan(case.segments(slots), case.num_tokens)
    assert [launch.variant for launch in plan.launches] == ["decode", "prefill"]
    assert check_folded(backend, case, slots, weights) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", [*CASES[5:9], *scaled_cases()], ids=lambda case: case.name)
def test_equals_the_product_and_the_expand(case: Case) -> None:
    """The same value as apart, but for one rounding, of gated sets with scale vectors, too."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for fold in (True, False):
            backend, slots, _ = loaded(case, dtype, fold=fold)
            generator = torch.Generator().manual_seed(3)
            x = torch.randn(case.num_tokens, case.in_features, generator=generator).to(dtype)
            weight = torch.randn(case.site.out_features, case.in_features, generator=generator).to(dtype)
            bias = torch.randn(case.site.out_features, generator=generator).to(dtype)
            plan = backend.plan(case.segments(slots), case.num_tokens)
            gates = case.gates()
            assert backend.folds(case.site, weight, plan) == fold
            if fold:
                results.append(backend.project(case.site, x, weight, bias, plan, gates))
                continue
            out = F.linear(backend.scale_input(case.site, x, plan, gates), weight, bias)
            backend.add(case.site, x, out, plan, gates)
            results.append(out)
        assert relative_error(*results) <= TOLERANCE[dtype]


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    """Nor on infinities of an adapter whose tokens share its tile."""
    case = Case("alone", 70, (40,), ((16,), (5,), (30,)), single(3, length=3))
    backend, slots, weights = loaded(case)
    broken = next(iter(weights[1].values()))
    broken.A.fill_(torch.inf)
    broken.B[::2].fill_(torch.nan)
    backend.release(slots[1])
    slots[1] = load(backend, weights[1])
    x, weight = torch.randn(9, 70), torch.randn(40, 70)
    together = backend.project(case.site, x, weight, None, backend.plan(case.segments(slots), 9))
    assert together[3:6].isnan().any()
    for number in (0, 2):
        rows = slice(3 * number, 3 * number + 3)
        plan = backend.plan([Segment(0, 3, ((slots[number], 1.0),))], 3)
        assert torch.equal(backend.project(case.site, x[rows], weight, None, plan), together[rows])


def test_base_tokens_and_empty_padded_plans_are_products_alone() -> None:
    case = Case("base", 33, (20, 12), ((8, 3),), single(1))
    backend, _, _ = loaded(case)
    x, weight, bias = torch.randn(5, 33), torch.randn(32, 33), torch.randn(32)
    (plan,) = backend.capture_plans(5)
    backend.arena.memory.fill_(torch.nan)
    found = backend.project(case.site, x, weight, bias, plan)
    assert relative_error(found, F.linear(x.double(), weight.double(), bias.double())) <= 1e-6


def test_the_table_says_where_folding_is_quicker() -> None:
    case = Case("table", 40, (24, 8), ((4, 4),), single(1))

    def entry(outs: int, tokens: int, ratio: float) -> FoldEntry:
        return FoldEntry("float32", 40, outs, tokens, ratio, FoldConfig(16, 16, 32, 16, 4, 2))

    table = LaunchTable(folds=[entry(32, 2, 0.9), entry(32, 4, 1.1), entry(32, 8, 0.99), entry(24, 16, 0.5)])
    x, weight = torch.randn(16, 40), torch.randn(32, 40)
    for fold, expected in ((None, [1, 1, 0, 0, 1, 1, 0]), (True, [1] * 7), (False, [0] * 7)):
        backend, (slot,), _ = loaded(case, fold=fold, table=table)
        found = []
        for tokens in (1, 2, 3, 4, 5, 8, 9):
            plan = backend.plan([Segment(0, 1, ((slot, 1.0),))], tokens)
            found.append(backend.folds(case.site, weight, plan))
            if found[-1]:
                rows = backend.project(case.site, x[:tokens], weight, None, plan)
                assert relative_error(rows[1:], F.linear(x[1:tokens].double(), weight.double())) <= 1e-6 or tokens == 1
        assert found == [bool(each) for each in expected]


def test_what_the_kernel_does_not_serve_is_not_folded() -> None:
    case = Case("refused", 16, (16,), ((4,), (4,)), single(2))
    backend, slots, _ = loaded(case)
    plan = backend.plan(case.segments(slots), 2)
    x, weight = torch.randn(2, 16), torch.randn(16, 16)
    assert backend.folds(case.site, weight, plan)
    for other in (weight.half(), weight.t(), weight.to("meta")):
        assert not backend.folds(case.site, other, plan)
        with pytest.raises(ValueError, match="site 0 is not folded"):
            backend.project(case.site, x, other, None, plan)
    with pytest.raises(ValueError, match="gates"):
        backend.project(case.site, x, weight, None, plan, torch.ones(1, 1))


def test_sites_that_no_adapter_touches_are_not_folded() -> None:
    case = Case("untouched", 16, (16,), ((4,),), single(1))
    other = Site(1, 16, (type(case.site.slices[0])("other", 16),))
    backend = make_backend(
        [case.site, other], dtype=torch.float32, device="cpu", budget_bytes=1 << 12, max_slots=1, max_tokens=4,
        implementation="triton", fold=True,
    )  # fmt: skip
    slot = load(backend, case.weights(torch.float32)[0])
    plan = backend.plan([Segment(0, 1, ((slot, 1.0),))], 1)
    weight = torch.zeros(16, 16)
    assert [backend.folds(site, weight, plan) for site in backend.sites] == [True, False]


def test_partial_sums_and_whole_sums_agree_bit_for_bit() -> None:
    case = Case("splits", 1100, (17, 9), ((9, 4), (20, 0)), ((2, ((0, 1.0),)), (17, ((1, 0.5), (0, 2.0)))))
    results = []
    for rows in (64, 0):
        backend, slots, _ = loaded(case)
        backend._partial_rows = rows
        plan = backend.plan(case.segments(slots), case.num_tokens)
        generator = torch.Generator().manual_seed(5)
        x, weight = torch.randn(19, 1100, generator=generator), torch.randn(26, 1100, generator=generator)
        results.append(backend.project(case.site, x, weight, None, plan))
    assert torch.equal(*results)
