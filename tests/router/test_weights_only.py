"""Routing by weights alone: factors against the plain product, calibration on a reference, and the stacked form."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.interface import Floats
from loramux.router.weights_only import AdapterFactors, Reference, WeightsScorer, default_layers
from loramux.router.weights_only.factors import Method, arrow_factor, balanced_factor, exact_norms, norm_factor
from loramux.router.weights_only.modules import attention_inputs

IN, OUT = 24, 40
Q, V, DEEP = (f"model.layers.{place}" for place in ("0.self_attn.q_proj", "0.self_attn.v_proj", "5.attn.c_attn"))
NOWHERE = "model.layers.0.mlp.up_proj"


def pair(seed: int, rank: int = 4, scale: float = 1.5, out: int = OUT, width: int = IN) -> ModuleWeights:
    g = torch.Generator().manual_seed(seed)
    return ModuleWeights(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), scale)


def tokens(seed: int, n: int = 5) -> torch.Tensor:
    return torch.randn(n, IN, generator=torch.Generator().manual_seed(1000 + seed))


def reference(*, own: bool = False, prompts: int = 12) -> Reference:
    """Of two layers, of prompts of different lengths, far from the origin and long in one direction."""
    stretch = torch.ones(IN)
    stretch[0] = 20
    made = [{layer: (tokens(50 * layer + i, 3 + i % 4) * stretch + 5).numpy() for layer in (0, 5)}
            for i in range(prompts)]  # fmt: skip
    return Reference.fit(made, own=own)


def factors(weights: dict[str, ModuleWeights], ground: Reference, method: Method = "balanced") -> AdapterFactors:
    found = AdapterFactors.of(weights, ground, method)
    assert found is not None
    return found


def scores(scorer: WeightsScorer, states: dict[int, Floats], *keys: str) -> Floats:
    return scorer.score_at(states, np.array([scorer.places[key] for key in keys or scorer.candidates], np.int64))


@pytest.mark.parametrize(("rank", "out"), [(1, OUT), (4, OUT), (16, OUT), (30, OUT), (8, 3)])
def test_the_factor_gives_the_exact_norm(rank: int, out: int) -> None:
    weights, x = pair(0, rank, out=out), tokens(0).double()
    factor = torch.from_numpy(norm_factor(weights)).double()
    assert len(factor) == min(rank, IN, out)
    torch.testing.assert_close((x @ factor.T).norm(dim=1), exact_norms(weights, x), rtol=1e-5, atol=1e-5)


def test_the_factor_is_the_svd_and_a_smaller_rank_its_best_part() -> None:
    weights = pair(1)
    product = (weights.scale * weights.B @ weights.A).double()
    _, singular, rotation = torch.linalg.svd(product, full_matrices=False)
    for made, power in ((norm_factor, 1.0), (balanced_factor, 0.5)):
        factor = torch.from_numpy(made(weights, 2)).double()
        torch.testing.assert_close(factor.norm(dim=1), singular[:2] ** power, rtol=1e-5, atol=1e-5)
        cosines = (factor / factor.norm(dim=1, keepdim=True) * rotation[:2]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(2).double(), rtol=1e-5, atol=1e-5)


def test_arrow_is_the_top_right_singular_vector_whatever_the_scale() -> None:
    weights = pair(2)
    top = torch.linalg.svd(weights.B @ weights.A)[2][0].numpy()
    for scale in (0.1, -3.0):
        v = arrow_factor(ModuleWeights(weights.A, weights.B, scale))[0]
        assert abs(float(v @ top)) == pytest.approx(1, abs=1e-5)
    zero = ModuleWeights(weights.A, torch.zeros(OUT, 4), 1.0)
    assert not arrow_factor(zero).any()
    assert not balanced_factor(zero).any()


def test_bfloat16_weights_are_taken() -> None:
    weights = ModuleWeights(pair(3).A.bfloat16(), pair(3).B.bfloat16(), 1.0)
    x = tokens(3).double()
    factor = torch.from_numpy(norm_factor(weights)).double()
    torch.testing.assert_close((x @ factor.T).norm(dim=1), exact_norms(weights, x), rtol=1e-5, atol=1e-5)


def test_whitened_reference_tokens_have_no_mean_and_no_long_direction() -> None:
    ground = reference()
    assert ground.layers == (0, 5)
    for layer in ground.layers:
        whitened = ground.tokens[layer]
        np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-4)
        lengths = np.linalg.svd(whitened, compute_uv=False)
        assert lengths[0] < 3 * lengths[len(lengths) // 2]
        assert ground.whiten({layer: whitened})[layer].shape == whitened.shape
    with pytest.raises(ValueError, match="at least 2 prompts"):
        Reference.fit([{0: tokens(0).numpy()}], own=True)


def test_prompts_that_never_differ_are_no_ground() -> None:
    same = {0: np.ones((3, IN), np.float32)}
    assert AdapterFactors.of({Q: pair(0)}, Reference.fit([same, same], own=True)) is None


@pytest.mark.parametrize("method", get_args(Method))
def test_score_is_the_formula(method: Method) -> None:
    ground = reference()
    weights = {Q: pair(4), V: pair(5, rank=2), DEEP: pair(6)}
    scorer = WeightsScorer(ground).with_adapters({"a": factors(weights, ground, method)})
    states = {layer: tokens(7 + layer).numpy() for layer in (0, 5)}
    expected = []
    for module, layer in ((Q, 0), (V, 0), (DEEP, 5)):
        made = {"balanced": balanced_factor, "norm": norm_factor}.get(method)
        rows = arrow_factor(weights[module]) if made is None else made(weights[module], 4)

        def raw(w: Floats, rows: Floats = rows) -> float:
            return float(np.sqrt(((w @ rows.T) ** 2).sum(axis=1).mean()))

        ends = [*ground.starts[1:], len(ground.tokens[layer])]
        seen = [raw(ground.tokens[layer][a:b]) for a, b in zip(ground.starts, ends, strict=True)]
        expected.append((raw(ground.whiten(states)[layer]) - np.mean(seen)) / np.std(seen))
    assert scores(scorer, states)[0] == pytest.approx(np.mean(expected), rel=1e-4)
    assert scores(scorer, {5: states[5]})[0] == pytest.approx(expected[2], rel=1e-4)
    assert scores(scorer, {})[0] == -math.inf


def test_scores_do_not_depend_on_the_adapters_size_nor_on_who_else_is_there() -> None:
    ground, states = reference(), {0: tokens(6).numpy()}
    weights = pair(6)
    one = factors({Q: weights}, ground)
    large = factors({Q: ModuleWeights(weights.A, weights.B * 100, weights.scale)}, ground)
    scorer = WeightsScorer(ground).with_adapters({"a": one, "b": large, "c": factors({V: pair(8, rank=1)}, ground)})
    found = scores(scorer, states)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    alone = WeightsScorer(ground).with_adapters({"a": one})
    assert scores(alone, states)[0] == pytest.approx(found[0], rel=1e-5)
    assert scores(scorer.without(["a"]), states, "c")[0] == pytest.approx(found[2], rel=1e-5)
    np.testing.assert_array_equal(scores(scorer, states, "c", "a"), found[[2, 0]])


@pytest.mark.parametrize("method", get_args(Method))
def test_the_adapter_whose_inputs_these_are_wins(method: Method) -> None:
    ground = reference()
    made = {}
    for i in range(1, 7):
        A = torch.cat([torch.eye(IN)[i : i + 1], 0.1 * pair(20 + i, 3).A])
        made[str(i)] = factors({Q: ModuleWeights(A, pair(30 + i).B * 10 ** (i - 3), 2.0)}, ground, method)
    scorer = WeightsScorer(ground).with_adapters(made)
    for i in range(1, 7):
        x = (6 * torch.eye(IN)[i] + tokens(40 + i)).numpy() + 5
        assert scorer.candidates[int(scores(scorer, {0: x}).argmax())] == str(i)


def test_the_threshold_leaves_the_base_four_fifths_of_its_own() -> None:
    ground = reference(own=True, prompts=20)
    made = {str(i): factors({Q: pair(i)}, ground) for i in range(5)}
    scorer = WeightsScorer(ground).with_adapters(made)
    places = np.arange(5)
    bar = scorer.threshold(places)
    assert bar is not None
    best = [max(made[str(i)].reference_scores[p] for i in range(5)) for p in range(20)]
    assert sum(score >= bar for score in best) == 4
    alone = scorer.threshold(places[:1])
    assert alone is not None
    assert alone < bar
    assert scorer.threshold(places[:0]) is None
    assert WeightsScorer(reference()).with_adapters(made).threshold(places) is None


def test_adapters_of_which_nothing_is_known_are_no_candidates() -> None:
    ground = reference()
    zero = ModuleWeights(pair(1).A, torch.zeros(OUT, 4), 1.0)
    for weights in ({NOWHERE: pair(1)}, {Q: zero}, {Q: pair(1, width=IN + 1)}, {}):
        assert AdapterFactors.of(weights, ground) is None
    part = factors({Q: pair(1), V: zero}, ground)
    assert len(part.modules) == 1
    empty = WeightsScorer(ground)
    assert (empty.candidates, empty.bytes, len(scores(empty, {0: tokens(0).numpy()}))) == ((), 0, 0)
    scorer = empty.with_adapters({"a": part})
    assert scorer.bytes == part.bytes == 2 * 4 * IN * 4
    assert scorer.without(["b"]) is scorer
    assert (scorer.without(["a"]).candidates, scorer.candidates) == ((), ("a",))


def test_where_the_router_looks() -> None:
    assert default_layers(32) == (4, 12, 20, 28)
    assert default_layers(4) == (0, 1, 2, 3)
    assert default_layers(6) == (0, 2, 3, 5)
    assert default_layers(1) == (0,)
    leaves = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    modules = [f"model.layers.{i}.{leaf}" for i in range(32) for leaf in leaves]
    found = attention_inputs([*modules, "lm_head", "q_proj"], (4, 12))
    assert found == {"model.layers.12.self_attn.q_proj": 12, "model.layers.4.self_attn.q_proj": 4}
