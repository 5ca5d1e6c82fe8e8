"""Sampling: the distribution is right, filters filter, and a row's token depends on the row alone."""

import math

import numpy as np
import pytest
import torch

from loramux.server.engine import sampler
from loramux.server.engine.protocol import SamplingParams
from loramux.server.engine.sampler import Floats, SamplingColumns, Thresholds, sorted_thresholds
from loramux.server.engine.staging import Staging

CPU = torch.device("cpu")


def params(**kwargs: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **kwargs)  # type: ignore[arg-type]


def sample(logits: torch.Tensor, chosen: list[SamplingParams], positions: list[int], banned: list[tuple[int, ...]],
           thresholds: Thresholds | None = None) -> list[int]:  # fmt: skip
    tokens: list[int] = sampler.sample(
        logits, SamplingColumns.of(chosen), np.array(positions), dict(enumerate(banned)), Staging(CPU), thresholds
    ).tolist()
    return tokens


def uniform(seeds: list[int], positions: list[int]) -> Floats:
    columns = SamplingColumns.of([params(seed=seed) for seed in seeds])
    return sampler.uniform(columns.seeds, np.array(positions))


def draw(logits: torch.Tensor, p: SamplingParams, position: int = 0) -> int:
    return sample(logits.unsqueeze(0), [p], [position], [()])[0]


def test_temperature_zero_is_argmax() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert sample(logits, [params(temperature=0.0)] * 2, [0, 0], [(), ()]) == [1, 0]


def test_banned_tokens_never_come() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sample(logits, [params(temperature=0.0)], [0], [(1, 7)]) == [2]
    assert logits[0, 1] == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_reported_alone(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 0.0, 1.0]])
    for temperature in (0.0, 1.0):
        tokens = sample(logits, [params(temperature=temperature, top_k=1)] * 2, [0, 0], [(), ()])
        assert tokens == [-1, 2]


@pytest.mark.parametrize("extra", [{}, {"top_k": 5}, {"top_p": 0.9999}, {"top_k": 1}, {"min_p": 1e-9}])
def test_frequencies_follow_the_softmax(extra: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5])
    count = torch.zeros(5)
    n = 4000
    for position in range(n):
        count[draw(logits, params(seed=11, **extra), position)] += 1
    expected = torch.softmax(logits, 0)
    if extra.get("top_k") == 1:
        expected = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert (count / n - expected).abs().max() < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    seen = {draw(logits, params(seed=5, top_p=0.6), i) for i in range(400)}
    assert seen == {0, 1}


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    seen = {draw(logits, params(seed=5, min_p=0.5), i) for i in range(400)}
    assert seen == {0, 1}


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3000)
    mixed = [
        params(seed=1), params(seed=2, top_k=40), params(seed=3, top_p=0.7), params(temperature=0.0),
        params(seed=5, min_p=0.05), params(seed=6, top_k=2000, top_p=0.9, temperature=0.7),
    ]  # fmt: skip
    positions = [3, 1, 4, 1, 5, 9]
    together = sample(logits, mixed, positions, [()] * 6)
    alone = [sample(logits[i : i + 1], mixed[i : i + 1], positions[i : i + 1], [()])[0] for i in range(6)]
    assert together == alone


def test_the_noise_is_counted() -> None:
    assert uniform([7], [3]) == uniform([7], [3])
    seeds = [0, 1, 2**63 - 1, -5]
    values = uniform([seed for seed in seeds for _ in range(500)], [*range(500)] * len(seeds))
    assert len(set(values.tolist())) == len(values)
    assert bool(((values >= 0) & (values < 1)).all())
    assert abs(values.mean() - 0.5) < 0.02
    assert uniform([11, 5], [4, 9])[1] == uniform([5], [9])[0]


def test_extreme_temperatures_stay_in_the_vocabulary() -> None:
    logits = torch.tensor([[-1e4, 0.0, 1e4]])
    for temperature in (2e-5, 2.0):
        assert sample(logits, [params(temperature=temperature, seed=1)], [0], [()]) == [2]
    hot = {draw(logits[0], params(temperature=1e7, seed=1), i) for i in range(60)}
    assert hot == {0, 1, 2}


def test_a_bound_of_one_keeps_the_whole_tail() -> None:
    """Whose probabilities vanish in the sum of those before."""
    logits = torch.cat([torch.zeros(40), torch.full((60,), -45.0)]).expand(2, -1)
    lowest = sorted_thresholds(logits, torch.tensor([[100.0], [90.0]]), torch.tensor([[1.0], [1.0]]))
    assert lowest.tolist() == [[-45.0], [-45.0]]


def test_a_nucleus_within_the_best_tokens_equals_sorting_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    logits = torch.randn(12, 5000) * 3
    chosen = [params(seed=i, top_p=0.9, temperature=0.8, min_p=0.01 * (i % 2)) for i in range(12)]
    positions = list(range(12))
    short = sample(logits, chosen, positions, [()] * 12)
    monkeypatch.setattr(sampler, "TOP_K_WIDTH", 2)
    assert sample(logits, chosen, positions, [()] * 12) == short
