"""Products on the CPU whose rows have the same bits in any batch."""

import pytest
import torch
from torch.nn import functional as F

from loramux.kernels.dense.torch_lora import InvariantTorchLoraBackend
from loramux.kernels.dense.torch_tiles import (
    SIZES,
    BatchedTiles,
    TiledProduct,
    TiledProducts,
    agreeing_sizes,
    cover,
    trial,
)
from loramux.kernels.lora import ModuleWeights, Segment, Site, SiteSlice, add_reference
from loramux.kernels.lora.modules import SetLimits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 100, 511])
def test_cover_holds_the_rows_with_padding_in_the_last_call_only(rows: int) -> None:
    for sizes in ((1,), (16, 32, 64), (4, 8, 256), (64,)):
        tiles = cover(rows, sizes)
        assert set(tiles) <= set(sizes)
        assert tiles == sorted(tiles, reverse=True)
        assert sum(tiles[:-1]) < rows <= sum(tiles)


def test_sizes_that_disagree_or_depend_on_the_position_are_found_out() -> None:
    """A product that sums otherwise from 16 rows on, and at 64 rows otherwise in the last row."""
    rows, weight, _ = trial(24, 100, torch.float32)

    def product(x: torch.Tensor) -> torch.Tensor:
        columns = weight.t() if len(x) < 16 else weight.t().flip(0)
        inputs = x if len(x) < 16 else x.flip(1)
        out = torch.stack([(inputs[:, i : i + 1] * columns[i]) for i in range(100)])
        total = torch.zeros(len(x), 24)
        for term in out:
            total = total + term
        if len(x) == 64:
            total[-1] += 1
        return total

    sizes = agreeing_sizes(product, rows, SIZES)
    assert sizes in ((16, 32, 128, 256), (1, 2, 4, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 96), (192, 64), (300, 513), (96, 1408), (16, 512), (512, 5), (1, 16), (72, 3), (8, 1)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_has_the_same_bits_in_any_product(shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    outs, inner = shape
    weight = torch.randn(outs, inner, generator=generator).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    bias = torch.randn(outs, generator=generator).to(dtype)
    x = torch.randn(333, inner, generator=generator).to(dtype)
    products = TiledProducts()
    whole = products(x, weight, bias)
    for low, high in ((0, 1), (332, 333), (5, 7), (100, 117), (3, 203)):
        assert torch.equal(products(x[low:high], weight, bias), whole[low:high])
    assert torch.equal(products(x.t().contiguous().t(), weight, bias), whole)
    torch.testing.assert_close(
        whole, F.linear(x, weight, bias), rtol=2 * torch.finfo(dtype).eps, atol=2e-3 * inner**0.5
    )


def test_plain_products_differ() -> None:
    """The test above can fail."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(300, 513, generator=generator), torch.randn(333, 513, generator=generator)
    assert not torch.equal(F.linear(x[:1], weight), F.linear(x, weight)[:1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trial_shows_another_order(dtype: torch.dtype, bias: bool) -> None:
    rows, weight, added = trial(64, 512, dtype, bias=bias)
    row, wide = rows[:1].float(), None if added is None else added.float()
    exact = row.double() @ weight.double().t() + (0 if added is None else added.double())
    assert exact.abs().max() < 1e-12
    order = torch.randperm(512, generator=torch.Generator().manual_seed(2))
    found = F.linear(row, weight.float(), wide)
    assert (found != F.linear(row[:, order], weight.float()[:, order], wide)).float().mean() > 0.5


def test_a_size_by_itself_is_always_a_choice() -> None:
    calls = iter(range(100))
    sizes = agreeing_sizes(lambda x: torch.full((len(x), 2), float(next(calls))), torch.ones(1, 4), SIZES)
    assert len(sizes) == 1
    assert len(TiledProduct(64, 96, torch.float32, max_size=1).sizes) == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 128), (64, 128), (128, 80), (128, 16)], ids=str)
def test_batched_products_have_the_same_bits_for_any_rows_and_matrices(
    shape: tuple[int, int], transposed: bool
) -> None:
    inner, columns = shape
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 100, inner, generator=generator)
    y = torch.randn(37, inner, columns, generator=generator)
    y = y.transpose(1, 2).contiguous().transpose(1, 2) if transposed else y
    product = BatchedTiles(inner, columns, transposed=transposed)
    whole = product(x, y)
    for matrices, rows in (((0, 1), (0, 1)), ((36, 37), (99, 100)), ((2, 9), (3, 20)), ((0, 37), (50, 51))):
        (a, b), (c, d) = matrices, rows
        assert torch.equal(product(x[a:b, c:d], y[a:b]), whole[a:b, c:d])
    product.batched = False
    assert torch.equal(product(x, y), whole)
    torch.testing.assert_close(whole, torch.bmm(x, y), rtol=1e-4, atol=1e-4)


def _backend(sites: list[Site], dtype: torch.dtype) -> InvariantTorchLoraBackend:
    return InvariantTorchLoraBackend(
        sites, dtype=dtype, device=torch.device("cpu"), budget_bytes=1 << 24, max_slots=4, limits=SetLimits(64, 4, 256)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_have_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Against float64, and a token by itself against the same token among others, its set here and there in a step."""
    generator = torch.Generator().manual_seed(5)
    site = Site(0, 96, (SiteSlice("q", 48), SiteSlice("k", 24)))
    backend = _backend([site], dtype)
    weights: dict[int, dict[str, ModuleWeights]] = {}
    for modules, rank in ((("q", "k"), 8), (("k",), 3), (("q",), 40)):
        adapter = {
            name: ModuleWeights(
                torch.randn(rank, 96, generator=generator).to(dtype),
                (torch.randn({"q": 48, "k": 24}[name], rank, generator=generator) / 8).to(dtype),
                0.5,
            )
            for name in modules
        }
        slot = backend.reserve(dict.fromkeys(adapter, rank))
        backend.fill(slot, adapter)
        backend.publish(slot)
        weights[slot] = adapter
    a, b, c = weights
    sets = [((a, 1.0), (b, 0.5)), ((c, 1.0),), ((a, 1.0), (b, 0.5)), ((b, 1.0), (a, 0.25)), ((a, 1.0),)]
    edges = [(0, 1), (1, 20), (20, 33), (33, 34), (40, 60)]
    segments = [Segment(low, high, adapters) for (low, high), adapters in zip(edges, sets, strict=True)]
    x = torch.randn(64, 96, generator=generator).to(dtype)
    base = torch.randn(64, 72, generator=generator).to(dtype)
    gates = torch.rand(64, 2, generator=generator)
    for given in (None, gates):
        out, expected = base.clone(), base.double()
        plan = backend.plan(segments, 64)
        assert plan is not None
        backend.add(site, x, out, plan, given)
        add_reference(site, x, expected, segments, weights, gates=given)
        assert (out.double() - expected).norm() / expected.norm() < {4: 1e-6, 2: 6e-3}[dtype.itemsize]
        for segment in segments:
            for token in (segment.start, segment.end - 1):
                single = base[token : token + 1].clone()
                alone = backend.plan([Segment(0, 1, segment.adapters)], 1)
                assert alone is not None
                backend.add(
                    site, x[token : token + 1], single, alone, None if given is None else given[token : token + 1]
                )
                assert torch.equal(single[0], out[token])


def test_adapters_on_a_card_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        InvariantTorchLoraBackend(
            [], dtype=torch.float32, device=torch.device("meta"), budget_bytes=1, max_slots=1, limits=SetLimits(1, 1, 1)
        )
