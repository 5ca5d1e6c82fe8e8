"""Sets: softmax, nucleus, quantised weights."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.router.sets import SHARES, choose, nucleus, quantise, softmax

RANKED = [0.9, 0.8, 0.1, -0.5]


def test_softmax_is_the_formula() -> None:
    values, temperature = [0.3, -1.2, 2.0], 0.7
    powers = [math.exp(v / temperature) for v in values]
    np.testing.assert_allclose(softmax(values, temperature), [p / sum(powers) for p in powers], rtol=1e-12)


def test_softmax_takes_extreme_scores() -> None:
    np.testing.assert_array_equal(softmax([1e300, -1e300], 1e-3), [1.0, 0.0])
    assert softmax([], 1.0).size == 0


@pytest.mark.parametrize(("values", "temperature"), [([1.0], 0.0), ([1.0], math.inf), ([math.nan], 1.0)])
def test_softmax_refuses(values: list[float], temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature|finite"):
        softmax(values, temperature)


@pytest.mark.parametrize(("top_p", "size"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 3)])
def test_nucleus_is_the_smallest_that_reaches_p(top_p: float, size: int) -> None:
    assert nucleus([0.5, 0.3, 0.2], top_p) == size


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3))
def test_quantised_weights_sum_to_one_exactly_and_are_near(weights: list[float]) -> None:
    result = quantise(weights)
    assert sum(result) == 1.0
    assert all((w * SHARES).is_integer() and w >= 0 for w in result)
    total = sum(weights)
    assert all(abs(r - w / total) < 1 / SHARES for r, w in zip(result, weights, strict=True))


def test_quantise_gives_the_rest_to_the_largest_remainders_earlier_first() -> None:
    assert quantise([1, 1, 1]) == (6 / 16, 5 / 16, 5 / 16)
    assert quantise([0.7, 0.3]) == (11 / 16, 5 / 16)
    assert quantise([1, 0]) == (1.0, 0.0)


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [math.nan], [math.inf]])
def test_quantise_refuses_what_is_no_distribution(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        quantise(weights)


def test_quantise_refuses_shares_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="power of two"):
        quantise([1.0], 10)


def test_the_best_alone_without_options() -> None:
    assert choose(RANKED, temperature=0.1) == ((0, 1.0),)
    assert choose([], temperature=0.1) == ()


def test_top_k_weighs_by_softmax() -> None:
    chosen = choose(RANKED, temperature=0.1, top_k=2)
    share = 1 / (1 + math.exp(-1))
    assert chosen == ((0, round(share * 16) / 16), (1, 1 - round(share * 16) / 16))


def test_top_p_takes_the_nucleus_within_top_k_and_the_bound() -> None:
    flat = [0.0] * 20
    assert len(choose(flat, temperature=1.0, top_p=0.25)) == 5
    assert len(choose(flat, temperature=1.0, top_p=0.25, top_k=3)) == 3
    assert len(choose(flat, temperature=1.0, top_p=1.0, max_size=8)) == 8
    assert choose(RANKED, temperature=0.01, top_p=0.9) == ((0, 1.0),)


def test_members_whose_share_is_nothing_are_left_out() -> None:
    assert choose(RANKED, temperature=0.01, top_k=4) == ((0, 1.0),)
