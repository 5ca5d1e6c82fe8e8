"""The dense kernels on the CPU, through Triton's interpreter. Collected by `test_dense_interpreter.py`, which runs this
file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

import pytest
import torch
from support.interpreter import multiply_bfloat16

from loramux.kernels.attention import AttentionBatch, AttentionLimits, AttentionShape
from loramux.kernels.attention import make_backend as make_attention
from loramux.kernels.attention.cases import Case, check
from loramux.kernels.dense import product_reference, row_mean_reference
from loramux.kernels.dense.cases import SMALL_PRODUCTS, ProductCase, error, make_product
from loramux.kernels.dense.launch import PARTIAL_ROWS, product_config, splits
from loramux.kernels.dense.lora import make_invariant_backend
from loramux.kernels.dense.triton_product import triton_product, triton_row_mean
from loramux.kernels.lora import ModuleWeights, Segment, Site, SiteSlice

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SMALL_PRODUCTS, ids=str)
def test_products_match_the_reference(case: ProductCase, dtype: torch.dtype) -> None:
    x, weight, bias = make_product(case, dtype)
    expected = product_reference(x.double(), weight.double(), None if bias is None else bias.double())
    for partials in (False, True):
        assert error(triton_product(x, weight, bias, partials=partials), expected) <= TOLERANCE[dtype]


def test_splits_cover_the_columns_and_depend_on_the_weights_alone() -> None:
    for dtype in TOLERANCE:
        config = product_config(dtype)
        for outs, inner in ((64, 64), (4096, 4096), (128256, 4096), (1152, 896), (17, 2049), (4096, 14336)):
            columns, number = splits(outs, inner, config)
            assert columns % config.block_k == 0
            assert (number - 1) * columns < inner <= number * columns


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_in_any_product(dtype: torch.dtype) -> None:
    """Alone, at every place of a longer product, with splits side by side and one after the other."""
    x, weight, bias = make_product(ProductCase(PARTIAL_ROWS + 9, 40, 1100, True), dtype)
    assert splits(40, 1100, product_config(dtype))[1] == 3
    whole = triton_product(x, weight, bias)
    assert torch.equal(triton_product(x, weight, bias, partials=True), whole)
    for row in (0, 15, 16, PARTIAL_ROWS, PARTIAL_ROWS + 8):
        assert torch.equal(triton_product(x[row : row + 1], weight, bias)[0], whole[row])
    assert torch.equal(triton_product(x.flip(0), weight, bias).flip(0), whole)


def test_rows_may_be_strided_and_weights_must_fit() -> None:
    x, weight, _ = make_product(ProductCase(5, 24, 96, False), torch.float32)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)
    assert torch.equal(triton_product(wide[:, :96], weight), triton_product(x, weight))
    assert torch.equal(triton_product(x.t().contiguous().t(), weight), triton_product(x, weight))
    with pytest.raises(ValueError, match="do not fit"):
        triton_product(x[:, :95], weight)
    with pytest.raises(ValueError, match="do not fit"):
        triton_product(x, weight.half())
    with pytest.raises(ValueError, match="float64"):
        triton_product(x.double(), weight.double())


@pytest.mark.parametrize("features", [1, 16, 96, 1024, 2049])
def test_row_means(features: int) -> None:
    x = torch.randn(3, 5, features, generator=torch.Generator().manual_seed(1))
    found = triton_row_mean(x)
    assert error(found, row_mean_reference(x.double())) <= 1e-6
    assert torch.equal(triton_row_mean(x[1, 2]), found[1, 2])
    assert triton_row_mean(x[:0]).shape == (0, 5)


SHAPE = AttentionShape(6, 2, 24, 40)


def _attention(limits: AttentionLimits):
    return make_attention([SHAPE], dtype=torch.float32, device="cpu", block_size=4, limits=limits, tiles_only=True)


@pytest.mark.parametrize("features", [(None, None, False), (7, 5.0, True)], ids=["plain", "window-softcap-sinks"])
def test_attention_in_tiles_only_has_the_same_bits_for_any_cut(features: tuple[int | None, float | None, bool]) -> None:
    """A prompt at once, in chunks, and token by token beside another sequence and padding."""
    window, softcap, with_sinks = features
    tokens, blocks = 70, 20
    generator = torch.Generator().manual_seed(2)
    q, key, value = (torch.randn(tokens, heads, dim, generator=generator) for heads, dim in ((6, 24), (2, 24), (2, 40)))
    sinks = torch.randn(6, generator=generator) if with_sinks else None
    table = torch.randperm(blocks, generator=generator).tolist()[:18]
    slots = [table[i // 4] * 4 + i % 4 for i in range(tokens)]
    backend = _attention(AttentionLimits(80, 4, 64))

    def compute(cuts: list[int], rows: int | None) -> torch.Tensor:
        k, v = torch.full((blocks + 2, 4, 2, 24), torch.nan), torch.full((blocks + 2, 4, 2, 40), torch.nan)
        parts, start = [], 0
        for end in cuts:
            lens, contexts, tables, places = [end - start], [end], [table], slots[start:end]
            mine = slice(0, end - start)
            inputs = [q[start:end], key[start:end], value[start:end]]
            if rows is not None:  # another sequence before it, and padding behind
                lens, contexts, tables = [1, *lens], [1, *contexts], [[blocks], table]
                places, mine = [blocks * 4, *places], slice(1, 1 + end - start)
                inputs = [torch.cat([x[:1], x, x[:1].expand(rows - 1 - len(x), -1, -1)]) for x in inputs]
            plan = backend.plan(AttentionBatch(lens, contexts, tables, places), decode_rows=rows)
            assert plan.num_decodes == 0
            backend.write(k, v, inputs[1], inputs[2], plan)
            out = torch.full((plan.num_tokens, 6, 40), torch.nan)
            backend.attend(inputs[0], k, v, plan, 0.2, window, softcap, sinks, out=out)
            if rows is not None:
                assert not out[mine.stop :].any()
            parts.append(out[mine])
            start = end
        return torch.cat(parts)

    whole = compute([tokens], None)
    assert torch.equal(compute([3, 40, 41, 70], None), whole)
    assert torch.equal(compute(list(range(1, tokens + 1)), 4), whole)


def test_attention_in_tiles_only_matches_the_reference() -> None:
    case = Case("mixed", SHAPE, ((1, 30), (1, 3), (9, 21), (17, 17)))
    backend = make_attention(
        [SHAPE], dtype=torch.float32, device="cpu", block_size=case.block_size, limits=case.limits, tiles_only=True
    )
    assert check(backend, case, torch.float32, torch.device("cpu")) <= 1e-6


def test_adapters_have_the_same_bits_in_short_and_long_segments() -> None:
    """A token alone, among 10 and among 40 of its adapter set."""
    generator = torch.Generator().manual_seed(4)
    site = Site(0, 600, (SiteSlice("q", 48), SiteSlice("k", 24)))
    backend = make_invariant_backend(
        [site], dtype=torch.float32, device="cpu", budget_bytes=1 << 22, max_slots=4, max_tokens=64,
        implementation="triton",
    )  # fmt: skip
    slots = []
    for rank in (5, 40):
        modules = {
            part.module: ModuleWeights(
                torch.randn(rank, 600, generator=generator),
                torch.randn(part.out_features, rank, generator=generator),
                0.5,
            )
            for part in site.slices
        }
        slot = backend.reserve(dict.fromkeys(modules, rank))
        backend.fill(slot, modules)
        assert backend.filled(slot)
        backend.publish(slot)
        slots.append(slot)
    x = torch.randn(40, 600, generator=generator)
    adapters = ((slots[0], 0.5), (slots[1], 1.5))

    def compute(count: int) -> torch.Tensor:
        out = torch.zeros(count, 72)
        plan = backend.plan([Segment(0, count, adapters)], count)
        assert plan is not None
        backend.add(site, x[:count], out, plan)
        return out

    whole = compute(40)
    for count in (1, 10, 16, 17):
        assert torch.equal(compute(count), whole[:count])
