"""When "none of these" is the answer: split-conformal thresholds.

For nonconformities a_1..a_n of prompts known to belong, exchangeable with the next such prompt's a, the threshold

    t = the k-th smallest of a_1..a_n,  k = ceil((n + 1) (1 - alpha))

is passed by it with probability at least 1 - alpha, whatever the distribution (Vovk et al. 2005; Papadopoulos et al.
2002). Here a is minus the score, so a prompt that belongs is turned away with probability at most alpha. k <= n needs
n >= 1 / alpha - 1: with fewer there is no threshold, and saying so beats making one up.

Where scores b_1..b_m of the base's own prompts are known too (as many as are needed of the others), the decision is
two-sided: a prompt goes to the side it is likelier of. With s_i = -a_i,

    p(s) = (1 + #{s_i <= s}) / (n + 1),   q(s) = (1 + #{b_j >= s}) / (m + 1)

the threshold is then the least score with p >= q, but no less than the least s_i, wherever alpha would put it: apart
sides cost no prompt that belongs, and sides that overlap err alike, up to a bound. `Calibration` says how much.

Outsiders are a second other side, made of the adapters' own examples: how an example scores for the likeliest of the
*other* adapters, as a prompt would whose adapter is not there. They stand for near misses, which resemble some adapter
more than they resemble the base. The threshold is the higher of both sides'.

Neither side may cost more than the share `MOST_COST` * alpha of the s_i: alpha is what may be lost, adapters that are
alike make outsiders that belong, and a base known by many near misses says what they look like, not how often they
come.
"""

import math
from dataclasses import dataclass

import numpy as np

from loramux.router.interface import Floats

MOST_COST = 2.0


def examples_needed(alpha: float) -> int:
    """The least n for which a threshold at level alpha exists: ceil(1 / alpha - 1). ValueError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be above 0 and below 1, got {alpha}")
    return math.ceil(1 / alpha - 1 - 1e-9)


def threshold(scores: Floats, alpha: float) -> float:
    """The least score to accept at level alpha, from scores [n] of prompts that belong. ValueError for too few."""
    n, needed = len(scores), examples_needed(alpha)
    if n < needed:
        raise ValueError(f"a threshold at level {alpha:g} needs {needed} held-out examples, there are {n}")
    k = min(math.ceil((n + 1) * (1 - alpha) - 1e-9), n)
    return float(np.sort(scores)[n - k])


def crossing(scores: Floats, negatives: Floats) -> float:
    """The two-sided threshold of the module, for at least one of each."""
    seen = np.unique(np.concatenate([scores, negatives]))
    p = (1 + np.searchsorted(np.sort(scores), seen, side="right")) / (len(scores) + 1)
    q = (1 + len(negatives) - np.searchsorted(np.sort(negatives), seen, side="left")) / (len(negatives) + 1)
    first = int(np.argmax(p >= q))  # p is 1 at the largest score of those that belong, so there is one
    return float(max(seen[first], scores.min()))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of scores of prompts that belong to some adapter, pooled over adapters; made by `calibrate`.

    `held_out` float32 [n] are scores of examples that took no part in what scored them; `negatives` float32 [m] are
    scores of the base's examples, `outsiders` of the adapters' examples for others than their own, likewise.
    `threshold` is the least score to accept, None while it cannot be had.
    """

    alpha: float
    held_out: Floats
    negatives: Floats
    outsiders: Floats
    threshold: float | None

    @property
    def needed(self) -> int:
        """Held-out examples without which there is no threshold at this level."""
        return examples_needed(self.alpha)

    @property
    def turned_away(self) -> float | None:
        """The share of adapters' held-out examples below the threshold; None without one."""
        return None if self.threshold is None else float((self.held_out < self.threshold).mean())

    @property
    def accepted_of_base(self) -> float | None:
        """The share of the base's held-out examples at or above the threshold; None without either."""
        return self._accepted(self.negatives)

    @property
    def accepted_of_outsiders(self) -> float | None:
        """The share of examples for which another adapter than their own reaches the threshold; None without either."""
        return self._accepted(self.outsiders)

    def _accepted(self, scores: Floats) -> float | None:
        if self.threshold is None or not len(scores):
            return None
        return float((scores >= self.threshold).mean())

    def describe(self) -> str:
        """The state in words: calibrated on what and how well, or what is missing."""
        n, away, accepted, others = (
            len(self.held_out), self.turned_away, self.accepted_of_base, self.accepted_of_outsiders,
        )  # fmt: skip
        if away is None:
            return (
                f"uncalibrated: a threshold at level {self.alpha:g} needs {self.needed} examples of adapters that have "
                f"two or more, there are {n}"
            )
        base = "" if accepted is None else f", {accepted:.0%} of {len(self.negatives)} examples of the base accepted"
        missing = "" if others is None else f", {others:.0%} accepted if their adapter were not there"
        return f"calibrated on {n} held-out examples: {away:.0%} of them turned away{missing}{base}"


def calibrate(alpha: float, held_out: Floats, negatives: Floats, outsiders: Floats) -> Calibration:
    """The calibration at level alpha; a side counts if there are as many of it as are needed of the held-out."""
    needed = examples_needed(alpha)
    if len(held_out) < needed:
        return Calibration(alpha, held_out, negatives, outsiders, None)
    bar = threshold(held_out, alpha) if len(negatives) < needed else crossing(held_out, negatives)
    if len(outsiders) >= needed:
        bar = max(bar, crossing(held_out, outsiders))
    most = np.sort(held_out)[min(int(MOST_COST * alpha * len(held_out)), len(held_out) - 1)]
    return Calibration(alpha, held_out, negatives, outsiders, min(bar, float(most)))
