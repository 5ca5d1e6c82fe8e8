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
sides cost no prompt that belongs, and sides that overlap err alike. `Calibration` says how much.
"""

import math
from dataclasses import dataclass

import numpy as np

from loramux.router.interface import Floats


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
    scores of the base's examples, likewise. `threshold` is the least score to accept, None while it cannot be had.
    """

    alpha: float
    held_out: Floats
    negatives: Floats
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
        if self.threshold is None or not len(self.negatives):
            return None
        return float((self.negatives >= self.threshold).mean())

    def p_value(self, score: float) -> float:
        """(1 + #{held-out scores <= score}) / (n + 1): small where hardly any belonging prompt scores so low."""
        return float((1 + (self.held_out <= score).sum()) / (len(self.held_out) + 1))

    def describe(self) -> str:
        """The state in words: calibrated on what and how well, or what is missing."""
        n, away, accepted = len(self.held_out), self.turned_away, self.accepted_of_base
        if away is None:
            return (
                f"uncalibrated: a threshold at level {self.alpha:g} needs {self.needed} examples of adapters that have "
                f"two or more, there are {n}"
            )
        base = "" if accepted is None else f", {accepted:.0%} of {len(self.negatives)} examples of the base accepted"
        return f"calibrated on {n} held-out examples: {away:.0%} of them turned away{base}"


def calibrate(alpha: float, held_out: Floats, negatives: Floats) -> Calibration:
    """The calibration at level alpha, two-sided if there are as many negatives as are needed of the others."""
    needed = examples_needed(alpha)
    if len(held_out) < needed:
        return Calibration(alpha, held_out, negatives, None)
    bar = threshold(held_out, alpha) if len(negatives) < needed else crossing(held_out, negatives)
    return Calibration(alpha, held_out, negatives, bar)
