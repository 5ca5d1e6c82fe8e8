"""Routing by weights alone: factors against the plain product, calibration, and the batched form."""

import itertools
import math

import numpy as np
import pytest
import torch

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.weights_only import (
    Reference,
    StackedScorer,
    WeightsScorer,
    arrow_factor,
    default_modules,
    exact_norms,
    norm_factor,
)

IN, OUT = 24, 40


def pair(seed: int, rank: int = 4, scale: float = 1.5, out: int = OUT) -> ModuleWeights:
    g = torch.Generator().manual_seed(seed)
    return ModuleWeights(torch.randn(rank, IN, generator=g), torch.randn(out, rank, generator=g), scale)


def tokens(seed: int, n: int = 5) -> torch.Tensor:
    return torch.randn(n, IN, generator=torch.Generator().manual_seed(1000 + seed))


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
    factor = torch.from_numpy(norm_factor(weights, 2)).double()
    torch.testing.assert_close(factor.norm(dim=1), singular[:2], rtol=1e-5, atol=1e-5)
    cosines = (factor / factor.norm(dim=1, keepdim=True) * rotation[:2]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(2).double(), rtol=1e-5, atol=1e-5)


def test_arrow_is_the_top_right_singular_vector_whatever_the_scale() -> None:
    weights = pair(2)
    top = torch.linalg.svd(weights.B @ weights.A)[2][0].numpy()
    for scale in (0.1, -3.0):
        v = arrow_factor(ModuleWeights(weights.A, weights.B, scale))[0]
        assert abs(float(v @ top)) == pytest.approx(1, abs=1e-5)
    assert not arrow_factor(ModuleWeights(weights.A, torch.zeros(OUT, 4), 1.0)).any()


def test_bfloat16_weights_are_taken() -> None:
    weights = ModuleWeights(pair(3).A.bfloat16(), pair(3).B.bfloat16(), 1.0)
    exact = exact_norms(weights, tokens(3).double())
    torch.testing.assert_close(
        (tokens(3).double() @ torch.from_numpy(norm_factor(weights)).double().T).norm(dim=1),
        exact,
        rtol=1e-5,
        atol=1e-5,
    )


def test_score_is_the_formula_with_a_reference() -> None:
    prompts = tuple({"m": tokens(10 + i, 3 + i).numpy()} for i in range(4))
    scorer = WeightsScorer(("m",), reference=Reference(prompts)).with_adapter("a", {"m": pair(4)})
    raw = [float(exact_norms(pair(4), torch.from_numpy(p["m"]).double()).square().mean().sqrt()) for p in prompts]
    x = tokens(5)
    own = float(exact_norms(pair(4), x.double()).square().mean().sqrt())
    expected = (own - np.mean(raw)) / np.std(raw)
    assert scorer.score({"m": x.numpy()})[0] == pytest.approx(expected, rel=1e-4)


def test_without_a_reference_scores_do_not_depend_on_the_adapters_or_the_inputs_size() -> None:
    weights = pair(6)
    scorer = WeightsScorer(("m",)).with_adapter("a", {"m": weights})
    scorer = scorer.with_adapter("b", {"m": ModuleWeights(weights.A, weights.B * 100, weights.scale)})
    small, large = scorer.score({"m": tokens(6).numpy()}), scorer.score({"m": 7 * tokens(6).numpy()})
    assert small[0] == pytest.approx(small[1], rel=1e-5)
    np.testing.assert_allclose(small, large, rtol=1e-5)


@pytest.mark.parametrize("method", ["norm", "arrow"])
def test_the_adapter_whose_inputs_these_are_wins(method: str) -> None:
    directions = torch.eye(IN)[:6]
    scorer = WeightsScorer(("m",), method=method, rank=2)  # type: ignore[arg-type]
    for i, direction in enumerate(directions):
        noise = 0.1 * pair(20 + i, 3).A
        A = torch.cat([direction[None], noise])
        scorer = scorer.with_adapter(str(i), {"m": ModuleWeights(A, pair(30 + i).B * 10 ** (i - 3), 2.0)})
    for i, direction in enumerate(directions):
        x = (direction + 0.1 * tokens(40 + i)).numpy()
        assert scorer.candidates[int(scorer.score({"m": x}).argmax())] == str(i)


def test_the_batched_form_scores_as_the_plain_one() -> None:
    prompts = tuple({m: tokens(50 + i).numpy() for m in ("m", "n")} for i in range(3))
    lengths = [4, 1, 6]
    features = {m: torch.cat([tokens(60 + i + 10 * j, n) for i, n in enumerate(lengths)]) for j, m in enumerate("mn")}
    for reference in (None, Reference(prompts)):
        for method in ("norm", "arrow"):
            scorer = WeightsScorer(("m", "n", "unused"), method=method, reference=reference)  # type: ignore[arg-type]
            for i in range(5):
                modules = {"m": pair(i, rank=i + 1), "n": pair(9 + i)}
                scorer = scorer.with_adapter(str(i), dict(list(modules.items())[: 1 + i % 2]))
            scorer = scorer.with_adapter("only-n", {"n": pair(99)})
            for given in (features, {"m": features["m"]}):
                batched = StackedScorer.stack(scorer).score(given, lengths).numpy()
                starts = np.cumsum([0, *lengths])
                plain = [
                    scorer.score({m: x.numpy()[a:b] for m, x in given.items()}) for a, b in itertools.pairwise(starts)
                ]
                np.testing.assert_allclose(batched, np.stack(plain), rtol=1e-4, atol=1e-4)


def test_the_batched_form_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = WeightsScorer(("m",))
    for i in range(7):
        scorer = scorer.with_adapter(str(i), {"m": pair(i)})
    stacked = StackedScorer.stack(scorer)
    whole = stacked.score({"m": tokens(0)}, [5])
    monkeypatch.setattr("loramux.router.weights_only.stacked._MAX_PRODUCT", 45)
    torch.testing.assert_close(stacked.score({"m": tokens(0)}, [5]), whole)


def test_the_batched_form_refuses_tokens_that_do_not_add_up() -> None:
    stacked = StackedScorer.stack(WeightsScorer(("m",)).with_adapter("a", {"m": pair(0)}))
    with pytest.raises(ValueError, match="5 tokens for prompts of 6"):
        stacked.score({"m": tokens(0)}, [6])
    with pytest.raises(ValueError, match="at least one token"):
        stacked.score({"m": tokens(0)}, [5, 0])


def test_adapters_of_which_nothing_is_known_are_no_candidates() -> None:
    empty = WeightsScorer(("m",))
    scorer = empty.with_adapter("a", {"m": pair(0)})
    assert scorer.with_adapter("elsewhere", {"q": pair(1)}).candidates == ("a",)
    zero = ModuleWeights(pair(1).A, torch.zeros(OUT, 4), 1.0)
    assert scorer.with_adapter("zero", {"m": zero}).candidates == ("a",)
    assert scorer.with_adapter("a", {"m": zero}).candidates == ()
    assert scorer.score({"other": tokens(0).numpy()})[0] == -math.inf
    assert scorer.without("b") is scorer
    assert (scorer.without("a").candidates, empty.candidates) == ((), ())
    with pytest.raises(KeyError):
        scorer.score({"m": tokens(0).numpy()}, ["b"])


@pytest.mark.parametrize("settings", [{"modules": ()}, {"rank": 0}, {"method": "svd"}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"modules|rank|method"):
        WeightsScorer(**{"modules": ("m",), **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two prompts"):
        Reference(({},))


def test_default_modules_are_the_middle_layers_attention_inputs() -> None:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    modules = [f"model.layers.{i}.{leaf}" for i in range(32) for leaf in leaves]
    chosen = default_modules([*modules, "lm_head"])
    assert chosen == tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in (8, 12, 16, 20) for p in "kq")
    assert default_modules(["blocks.0.ffn", "blocks.1.ffn"]) == ("blocks.0.ffn", "blocks.1.ffn")
    assert default_modules(["head"]) == ("head",)
    assert default_modules(["model.layers.0.attn.c_attn"]) == ("model.layers.0.attn.c_attn",)
