"""The cost model against the figures of real models, brute force, and what must cost nothing."""

import pytest

from loramux.kernels.attention.interface import AttentionShape
from loramux.kernels.cost import (
    FUSABLE,
    Cost,
    Model,
    Peaks,
    Step,
    adapter_bytes,
    attention,
    decoder,
    expand,
    folded,
    kv_write,
    product,
    scale_input,
    shrink,
    step_costs,
    step_floor,
    visible_keys,
)
from loramux.kernels.lora.interface import Segment, Site, SiteSlice

H200 = Peaks(bandwidth=4.8e12, flops=9.9e14)
LLAMA_2_7B = decoder(
    hidden=4096, intermediate=11008, layers=32, shape=AttentionShape(32, 32, 128, 128), vocabulary=32000
)
LLAMA_31_8B = decoder(
    hidden=4096, intermediate=14336, layers=32, shape=AttentionShape(32, 8, 128, 128), vocabulary=128256
)
QWEN_25_05B = decoder(hidden=896, intermediate=4864, layers=24, shape=AttentionShape(14, 2, 64, 64), vocabulary=151936)
PACKED = Site(0, 40, (SiteSlice("q", 24), SiteSlice("k", 8)))


def uniform(model: Model, adapters: int, rank: int) -> dict[int, dict[str, int]]:
    modules = {part.module: rank for site in model.sites for part in site.slices}
    return dict.fromkeys(range(adapters), modules)


@pytest.mark.parametrize(
    ("model", "rank", "megabytes"),
    [(LLAMA_2_7B, 16, 80), (LLAMA_31_8B, 16, 84), (LLAMA_31_8B, 64, 336), (QWEN_25_05B, 16, 17.6)],
)
def test_bytes_of_an_adapter(model: Model, rank: int, megabytes: float) -> None:
    assert adapter_bytes(model.sites, rank) / 1e6 == pytest.approx(megabytes, rel=5e-3)


@pytest.mark.parametrize(
    ("model", "tied", "milliseconds"),
    [(LLAMA_2_7B, False, 2.81), (LLAMA_31_8B, False, 3.35), (QWEN_25_05B, True, 0.206)],
)
def test_bytes_of_the_base(model: Model, tied: bool, milliseconds: float) -> None:
    embedding = 0 if tied else model.head.in_features * model.head.out_features * model.itemsize
    seconds = (model.weight_bytes + embedding) / H200.bandwidth
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=5e-3)


@pytest.mark.parametrize(("distinct", "milliseconds"), [(1, 0.0175), (32, 0.56)])
def test_adapters_of_a_decode_step(distinct: int, milliseconds: float) -> None:
    segments = tuple(Segment(token, token + 1, ((token % distinct, 1.0),)) for token in range(32))
    costs = step_costs(LLAMA_31_8B, Step(((1, 512),) * 32, segments), uniform(LLAMA_31_8B, distinct, 16))
    weights = costs["shrink"].weight_bytes + costs["expand"].weight_bytes
    assert weights == distinct * adapter_bytes(LLAMA_31_8B.sites, 16)
    assert weights / H200.bandwidth * 1e3 == pytest.approx(milliseconds, rel=5e-3)


def test_a_step_is_the_sum_of_its_parts() -> None:
    segments = (Segment(0, 1, ((0, 1.0),)), Segment(1, 3, ((0, 0.5), (1, 0.5))))
    step = Step(((1, 100), (5, 40)), segments, logit_rows=1)
    costs = step_costs(QWEN_25_05B, step, uniform(QWEN_25_05B, 2, 8))
    products = [product(6, site.in_features, site.out_features) for site in QWEN_25_05B.sites]
    assert costs["base"] == sum(products, Cost())
    assert costs["head"] == product(1, 896, 151936)
    assert costs["kv_write"].bytes == 24 * kv_write(AttentionShape(14, 2, 64, 64), 6).bytes
    assert costs["base"].weight_bytes + costs["head"].weight_bytes == QWEN_25_05B.weight_bytes


PLAIN = {"base", "head", "kv_write", "attention", "embedding", "norm", "residual", "rotary", "activation"}


def test_a_base_step_has_no_lora_cost() -> None:
    for fold in (False, True):
        assert set(step_costs(QWEN_25_05B, Step(((1, 9),)), {}, fold=fold)) == PLAIN


def test_every_operation_of_a_small_step_by_hand() -> None:
    """Hidden 8, one layer, 2 query heads and 1 key head of 4, intermediate 6, vocabulary 10; 3 tokens, 2 sequences."""
    model = decoder(hidden=8, intermediate=6, layers=1, shape=AttentionShape(2, 1, 4, 4), vocabulary=10)
    segments = (Segment(0, 2, ((5, 1.0),)),)
    ranks = {5: {"model.layers.0.mlp.up_proj": 2}}
    scales = {(5, "model.layers.0.mlp.down_proj", "in"), (5, "model.layers.0.mlp.up_proj", "out")}
    costs = step_costs(model, Step(((1, 4), (2, 2)), segments), ranks, scales=scales, gated=True)
    weights = 8 * 16 + 8 * 8 + 8 * 12 + 6 * 8
    assert costs == {
        "base": Cost(2 * weights, 2 * 3 * (8 + 16 + 8 + 8 + 8 + 12 + 6 + 8), 2 * 3 * weights),
        "head": Cost(2 * 80, 2 * 2 * 18, 2 * 2 * 80),
        "embedding": Cost(2 * 24, 2 * 24, 0),
        "norm": Cost(3 * 2 * 8, 2 * (2 * 2 * 24 + 2 * 16), 4 * (24 + 24 + 16)),
        "residual": Cost(0, 2 * 3 * 2 * 24, 2 * 24),
        "rotary": Cost(0, 2 * 2 * 3 * (12 + 4), 3 * 3 * 12),
        "activation": Cost(0, 2 * 3 * 18, 5 * 18),
        "kv_write": Cost(0, 2 * 2 * 3 * 8, 0),
        "attention": Cost(2 * 8 * (4 + 2), 2 * 3 * 2 * 8, 2 * 2 * 8 * (4 + 1 + 2)),
        "shrink": Cost(2 * 2 * 8, 2 * 2 * 8 + 4 * 4, 2 * 4 * 8),
        "expand": Cost(2 * (2 + 1) * 6, 2 * 2 * 2 * 6 + 4 * 4 + 4 * 2, 2 * 4 * 6 + 3 * 2 * 6 + 4),
        "scale_input": Cost(2 * 6, 2 * 2 * 2 * 6 + 4 * 2, (2 * 2 + 2) * 6),
    }
    assert set(costs) == PLAIN | {"shrink", "expand", "scale_input"}


def test_a_folded_step_writes_its_outputs_once() -> None:
    segments = (Segment(0, 4, ((0, 1.0),)), Segment(4, 6, ((0, 0.5), (1, 0.5))))
    step, ranks = Step(((6, 40),), segments), uniform(LLAMA_31_8B, 2, 8)
    apart, one = (step_costs(LLAMA_31_8B, step, ranks, fold=fold) for fold in (False, True))
    assert set(apart) - set(one) == {"base", "expand"}
    assert set(one) - set(apart) == {"folded"}
    together = apart["base"] + apart["expand"]
    outputs = sum(site.out_features for site in LLAMA_31_8B.sites)
    assert one["folded"].weight_bytes == together.weight_bytes
    assert one["folded"].flops == together.flops
    assert together.activation_bytes - one["folded"].activation_bytes == 2 * 2 * 6 * outputs
    assert {kind: cost for kind, cost in one.items() if kind in apart} == {
        kind: cost for kind, cost in apart.items() if kind in one
    }


def test_a_folded_projection_by_hand() -> None:
    """5 tokens through 40 -> 24 + 8 with a bias; ranks 4 and 3 at `q` for 2 and 1 tokens, nothing at `k`."""
    ranks = {0: {"q": 4}, 1: {"q": 3}}
    segments = [Segment(0, 2, ((0, 1.0),)), Segment(3, 4, ((1, 1.0),))]
    cost = folded(PACKED, 5, segments, ranks, bias=True)
    assert cost.weight_bytes == 2 * (41 * 32 + 7 * 24)
    assert cost.activation_bytes == 2 * 5 * 72 + 4 * 11
    assert cost.flops == 5 * 81 * 32 + 2 * 11 * 24
    assert folded(PACKED, 5, [], {}) == product(5, 40, 32)


def test_gates_and_scale_vectors_by_hand() -> None:
    ranks = {0: {"q": 4, "k": 2}, 1: {"q": 0}, 2: {}}
    scales = {(0, "q", "out"), (1, "q", "out"), (1, "q", "in"), (9, "k", "out")}
    segments = [Segment(0, 3, ((0, 1.0), (1, 0.5))), Segment(5, 6, ((1, 1.0),)), Segment(6, 9, ((2, 1.0),))]
    plain = expand(PACKED, segments, ranks)
    scaled = expand(PACKED, segments, ranks, scales=scales)
    assert scaled.weight_bytes - plain.weight_bytes == 2 * 2 * 24
    assert scaled.activation_bytes - plain.activation_bytes == 2 * 2 * 1 * 24  # the token that adapter 1 alone touches
    assert scaled.flops - plain.flops == 3 * (3 * 2 + 1) * 24
    gated = expand(PACKED, segments, ranks, scales=scales, gated=True)
    assert gated.weight_bytes == scaled.weight_bytes
    assert gated.activation_bytes - scaled.activation_bytes == 4 * (3 * 2 + 1)
    assert gated.flops - scaled.flops == 3 * (4 + 2)
    only = Site(0, 40, (SiteSlice("q", 24),))
    assert scale_input(only, segments, scales) == Cost(2 * 40, 2 * 2 * 4 * 40, (2 * 4 + 4) * 40)
    assert scale_input(only, segments, scales, gated=True).activation_bytes == 2 * 2 * 4 * 40 + 4 * 4
    assert scale_input(only, segments, frozenset()) == Cost()


def test_a_floor_leaves_out_what_may_be_fused() -> None:
    costs = step_costs(QWEN_25_05B, Step(((1, 9),)), {})
    kept = sum(cost.floor(H200) for kind, cost in costs.items() if kind in PLAIN - FUSABLE)
    assert step_floor(costs, H200) == kept < sum(cost.floor(H200) for cost in costs.values())


def test_shared_adapters_are_read_once_and_untouched_slices_cost_nothing() -> None:
    ranks = {0: {"q": 4, "k": 2}, 1: {"k": 3}, 2: {}}
    segments = [Segment(0, 2, ((0, 1.0),)), Segment(2, 3, ((1, 1.0),)), Segment(3, 7, ((2, 1.0),))]
    again = [*segments, Segment(7, 9, ((0, 0.5), (1, 0.5)))]
    first, second = shrink(PACKED, segments, ranks), shrink(PACKED, again, ranks)
    assert first.weight_bytes == second.weight_bytes == 2 * 40 * (4 + 2 + 3)
    assert first.activation_bytes == 2 * 3 * 40 + 4 * (2 * 6 + 3)
    assert first.flops == 2 * 40 * (2 * 6 + 3)
    assert second.flops - first.flops == 2 * 40 * 2 * (6 + 3)
    cost = expand(PACKED, segments, ranks)
    assert cost.weight_bytes == 2 * (24 * 4 + 8 * (2 + 3))
    assert cost.activation_bytes == 2 * 2 * (2 * 24 + 3 * 8) + 4 * (2 * 6 + 3)
    assert cost.flops == 2 * (24 * 2 * 4 + 8 * (2 * 2 + 3))
    untouched = [Segment(0, 5, ((2, 1.0),))]
    assert shrink(PACKED, untouched, ranks) == expand(PACKED, untouched, ranks) == Cost()


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("queries", "context"), [(1, 1), (1, 20), (5, 5), (7, 30), (20, 24)])
def test_visible_keys_by_brute_force(queries: int, context: int, window: int | None) -> None:
    pairs = {
        (i, j)
        for i in range(context - queries, context)
        for j in range(i + 1)
        if window is None or j > i - window
    }  # fmt: skip
    assert visible_keys(queries, context, window) == (len({j for _, j in pairs}), len(pairs))


def test_attention_reads_the_cache_once_for_all_heads() -> None:
    shape = AttentionShape(32, 8, 128, 128)
    decode = attention(shape, [(1, 1000)] * 4)
    assert decode.weight_bytes == 4 * 1000 * 8 * 256 * 2
    assert attention(shape, [(1, 1000)] * 4, window=100).weight_bytes == 4 * 100 * 8 * 256 * 2
    assert decode.flops == 4 * 1000 * 32 * 256 * 2
    assert decode.activation_bytes == 4 * 32 * 256 * 2
    assert decode.intensity == pytest.approx(4.0, rel=0.01)


def test_floors_are_by_bytes_or_by_flops() -> None:
    peaks = Peaks(bandwidth=1e12, flops=1e15)
    decode, prefill = product(1, 4096, 4096), product(4096, 4096, 4096)
    assert decode.floor(peaks) == decode.bytes / 1e12
    assert prefill.floor(peaks) == prefill.flops / 1e15
    assert Cost().floor(peaks) == Cost().intensity == 0.0
