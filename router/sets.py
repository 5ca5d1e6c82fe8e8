"""From ranked scores to an adapter set: how many candidates, and which weights.

Weights are multiples of 1/16 that sum to 1 exactly, so that the same sets recur: a set is its members with their
weights, and a set that recurs shares prefix-cache blocks and batch segments.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats

Doubles = npt.NDArray[np.float64]

SHARES = 16  # a power of two: its multiples and their sums are exact in binary floating point


def softmax(values: Sequence[float] | Doubles | Floats, temperature: float) -> Doubles:
    """p_i = exp(v_i / T) / sum_j exp(v_j / T), float64 [n]. ValueError unless T > 0 and every value is finite."""
    v = np.asarray(values, dtype=np.float64)
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not np.isfinite(v).all():
        raise ValueError("scores must be finite")
    if not v.size:
        return v
    with np.errstate(over="ignore"):  # a difference that overflows to -inf has probability 0, which is right
        powers = np.exp((v - v.max()) / temperature)
    return np.asarray(powers / powers.sum(), dtype=np.float64)


def nucleus(probabilities: Sequence[float] | Doubles, top_p: float) -> int:
    """The least n >= 1 with p_1 + ... + p_n >= top_p, for probabilities in descending order (DLP-LoRA, 2410.01497).

    Rounding of the running sum is allowed for: a sum within 1e-9 of `top_p` reaches it.
    """
    total = np.cumsum(np.asarray(probabilities, dtype=np.float64))
    return min(int(np.searchsorted(total, top_p - 1e-9)) + 1, len(total))


def quantise(weights: Sequence[float] | Doubles, shares: int = SHARES) -> tuple[float, ...]:
    """w_i proportional to the given weights, rounded to multiples of 1/shares with sum_i w_i = 1.

    Largest remainder: everyone gets floor(shares * w_i), those with the largest fractions get the rest, the earlier of
    equals first. A weight below its last share is 0. ValueError for negative or non-finite weights, for none that is
    positive, and for shares that are no power of two (their sum would not be exactly 1 in floating point).
    """
    w = np.asarray(weights, dtype=np.float64)
    if shares < 1 or shares & (shares - 1):
        raise ValueError(f"shares must be a power of two, got {shares}")
    if not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError("weights must be finite, none negative, at least one positive")
    exact = w / w.sum() * shares
    whole = np.floor(exact)
    missing = shares - int(whole.sum())
    for index in np.argsort(-(exact - whole), kind="stable")[:missing]:
        whole[index] += 1
    return tuple(float(n) / shares for n in whole)


def choose(
    ranked: Sequence[float] | Doubles | Floats,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    max_size: int = SHARES,
) -> tuple[tuple[int, float], ...]:
    """The set chosen from scores in descending order: (position, weight), heaviest first, weights summing to 1.

    Neither `top_k` nor `top_p`: the best alone. `top_k`: the k best. `top_p`: the smallest nucleus, of at most `top_k`
    members where given. Never more than `max_size`. Probabilities are the softmax over all of `ranked`; weights are
    those of the members, quantised; members whose share rounds to nothing are left out. () for no candidates.
    """
    if not len(ranked):
        return ()
    probabilities = softmax(ranked, temperature)
    size = 1 if top_k is None and top_p is None else len(probabilities)
    if top_k is not None:
        size = min(size, top_k)
    if top_p is not None:
        size = min(size, nucleus(probabilities, top_p))
    weights = quantise(probabilities[: min(size, max_size)])
    return tuple((position, w) for position, w in enumerate(weights) if w > 0)
