"""The trace generator: S-LoRA's numbers, the distributions it claims, Punica's group sizes."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from loramux.server.bench import workload

MANY = 20000


def test_a_seed_gives_the_numbers_of_s_loras_own_script() -> None:
    w = workload.Workload(requests=200, adapters=100, rate=2.0, alpha=0.3, cv=1.5)
    trace = workload.generate(w)
    legacy = np.random.RandomState(42)
    assert [r.adapter for r in trace] == (legacy.power(0.3, 200) * 100).astype(int).tolist()
    assert [r.input_tokens for r in trace] == legacy.randint(8, 512, 200).tolist()
    assert [r.output_tokens for r in trace] == legacy.randint(8, 512, 200).tolist()
    tic, at = 0.0, []
    for gap in legacy.gamma(1 / 1.5**2, 1.5**2 / 2.0, 200):
        tic += gap
        at.append(tic)
    assert [r.at for r in trace] == pytest.approx(at, rel=1e-12)
    frozen = [(3, 66, 336), (84, 177, 174), (35, 483, 281), (18, 195, 395), (0, 471, 96), (0, 278, 323)]
    first = workload.generate(workload.Workload(requests=20, adapters=100, rate=2.0, alpha=0.3, cv=1.5))[:6]
    assert [(r.adapter, r.input_tokens, r.output_tokens) for r in first] == frozen
    assert first[0].at == pytest.approx(0.021817941517463108)


@pytest.mark.parametrize("mix", ["slora", "distinct", "uniform", "skewed", "identical"])
def test_equal_workloads_give_equal_traces(mix: str) -> None:
    w = workload.Workload(requests=300, adapters=17, mix=mix)
    assert workload.generate(w) == workload.generate(w)
    assert workload.generate(w) != workload.generate(workload.Workload(requests=300, adapters=17, mix=mix, seed=43))
    assert all(0 <= r.adapter < 17 for r in workload.generate(w))
    assert [r.index for r in workload.generate(w)] == list(range(300))


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 3.0])
def test_adapters_follow_the_power_law(alpha: float) -> None:
    n = 50
    trace = workload.generate(workload.Workload(requests=MANY, adapters=n, alpha=alpha, rate=0))
    counts = Counter(r.adapter for r in trace)
    for k in (1, 5, 25, 50):  # P(adapter < k) = (k / n)^alpha
        assert sum(counts[a] for a in range(k)) / MANY == pytest.approx((k / n) ** alpha, abs=0.02)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_burstiness(cv: float) -> None:
    trace = workload.generate(workload.Workload(requests=MANY, adapters=3, rate=8.0, cv=cv))
    gaps = np.diff([0.0] + [r.at for r in trace])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.08)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_lengths_are_uniform_and_exclude_the_upper_bound() -> None:
    trace = workload.generate(workload.Workload(requests=MANY, adapters=0, input=(3, 7), output=(5, 6)))
    counts = Counter(r.input_tokens for r in trace)
    assert set(counts) == {3, 4, 5, 6}
    assert min(counts.values()) / MANY == pytest.approx(0.25, abs=0.02)
    assert {r.output_tokens for r in trace} == {5}
    assert {r.adapter for r in trace} == {None}


def test_rate_zero_is_all_at_once() -> None:
    assert {r.at for r in workload.generate(workload.Workload(requests=9, adapters=2, rate=0))} == {0.0}


def test_mixes_of_a_seed_differ_in_the_adapters_only() -> None:
    def rest(mix: str) -> list[tuple[float, int, int]]:
        trace = workload.generate(workload.Workload(requests=64, adapters=64, mix=mix))
        return [(r.at, r.input_tokens, r.output_tokens) for r in trace]

    assert all(rest(mix) == rest("slora") for mix in workload.MIXES)


@pytest.mark.parametrize("requests", [1, 2, 3, 16, 17, 32, 1000])
def test_group_sizes_are_punicas(requests: int) -> None:
    uniform = workload.group_sizes(requests, "uniform")
    assert (sum(uniform), len(uniform)) == (requests, math.ceil(math.sqrt(requests)))
    assert max(uniform) - min(uniform) <= 1
    skewed = workload.group_sizes(requests, "skewed")
    assert sum(skewed) == requests
    assert skewed == sorted(skewed, reverse=True)
    assert min(skewed) >= 1
    assert workload.group_sizes(requests, "identical") == [requests]


def test_group_sizes_of_a_batch_of_32() -> None:
    assert workload.group_sizes(32, "skewed") == [11, 7, 5, 3, 2, 2, 1, 1]
    assert workload.group_sizes(32, "uniform") == [6, 6, 5, 5, 5, 5]
    with pytest.raises(ValueError, match="slora"):
        workload.group_sizes(32, "slora")


def test_mixes_use_the_adapters_that_there_are() -> None:
    def counts(mix: str, requests: int, adapters: int) -> list[int]:
        trace = workload.generate(workload.Workload(requests=requests, adapters=adapters, mix=mix))
        found = Counter(r.adapter for r in trace)
        return [found[a] for a in range(adapters)]

    assert counts("distinct", 32, 32) == [1] * 32
    assert counts("distinct", 8, 3) == [3, 3, 2]
    assert counts("skewed", 32, 32)[:9] == [11, 7, 5, 3, 2, 2, 1, 1, 0]
    assert counts("skewed", 32, 3) == [11 + 3 + 1, 7 + 2 + 1, 5 + 2]
    assert counts("uniform", 32, 32)[:7] == [6, 6, 5, 5, 5, 5, 0]
    assert counts("identical", 32, 5) == [32, 0, 0, 0, 0]
    shuffled = [r.adapter for r in workload.generate(workload.Workload(requests=32, adapters=32, mix="skewed"))]
    assert shuffled != sorted(shuffled)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"requests": 0}, "requests"),
        ({"adapters": -1}, "adapters"),
        ({"rate": -1.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"cv": 0.0}, "cv"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"input": (0, 5)}, "input"),
        ({"output": (5, 5)}, "output"),
        ({"mix": "zipf"}, "mix"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        workload.Workload(**{"requests": 5, "adapters": 2, **wrong})


def test_prompts_have_the_length_and_repeat_only_themselves() -> None:
    trace = workload.generate(workload.Workload(requests=50, adapters=2))
    ids = [workload.prompt_ids(42, r, 100, 200) for r in trace]
    assert ids == [workload.prompt_ids(42, r, 100, 200) for r in trace]
    assert [len(prompt) for prompt in ids] == [r.input_tokens for r in trace]
    assert all(100 <= token < 200 for prompt in ids for token in prompt)
    assert len({tuple(prompt[:8]) for prompt in ids}) == 50
    assert workload.prompt_ids(43, trace[0], 100, 200) != ids[0]
    words = [workload.prompt_words(42, r) for r in trace]
    assert [len(text.split()) for text in words] == [r.input_tokens for r in trace]
    assert len({text[:40] for text in words}) == 50
    assert len(set(workload.WORDS)) == len(workload.WORDS)
