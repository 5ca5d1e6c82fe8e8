"""The mean of several scorers' opinions, each on its own scale.

f_t(x) = sum over members m of (f_mt(x) - mean over t of f_mt(x)) / scale_m
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loramux.router.interface import Floats, GrowingScorer, Scorer
from loramux.router.scores.dataset import Doubles


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A `Scorer` over members with the same candidates (in any order); `scales` are positive, one per member.

    What a query's candidates have in common is taken out first: members may measure in different units, and only the
    differences between candidates decide. Raises ValueError when members know different candidates.
    """

    members: tuple[Scorer, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.scales):
            raise ValueError("an ensemble needs members, and as many scales")
        if any(set(member.candidates) != set(self.candidates) for member in self.members):
            raise ValueError("the members of an ensemble must know the same candidates")
        if not all(scale > 0 for scale in self.scales):
            raise ValueError("scales must be above 0")

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.members[0].candidates

    def score(self, embeddings: Floats) -> Floats:
        """float32 [n, candidates]; differences between candidates in units of the members' spread."""
        parts = [aligned(member, embeddings, self.candidates) for member in self.members]
        return combine(parts, self.scales)

    def update(self, embeddings: Floats, scores: Doubles, candidates: Sequence[str]) -> "Ensemble":
        """With more scored queries in every member; the scales stay. Raises TypeError where a member cannot grow."""
        return Ensemble(tuple(growing(m).update(embeddings, scores, candidates) for m in self.members), self.scales)

    def without(self, candidates: Sequence[str]) -> "Ensemble":
        """Without these candidates. Raises TypeError where a member cannot grow."""
        return Ensemble(tuple(growing(m).without(candidates) for m in self.members), self.scales)


def growing(scorer: Scorer) -> GrowingScorer:
    """The scorer as one that takes in more scored queries. Raises TypeError for one that has to be trained again."""
    if not isinstance(scorer, GrowingScorer):
        raise TypeError(f"a {type(scorer).__name__} has to be trained again")
    return scorer


def can_grow(scorer: Scorer) -> bool:
    """Whether `update` and `without` work, in every member of an ensemble."""
    if isinstance(scorer, Ensemble):
        return all(map(can_grow, scorer.members))
    return isinstance(scorer, GrowingScorer)


def combine(parts: Sequence[Floats], scales: Sequence[float]) -> Floats:
    """The formula above, of members' scores [n, candidates] each."""
    centred = [(part - part.mean(1, keepdims=True)) / scale for part, scale in zip(parts, scales, strict=True)]
    return np.asarray(np.sum(centred, axis=0), np.float32)


def spread(scores: Floats) -> float:
    """The standard deviation of centred scores [n, candidates], 1 where they are all equal: a member's scale."""
    return float((scores - scores.mean(1, keepdims=True)).std()) or 1.0


def aligned(scorer: Scorer, embeddings: Floats, candidates: Sequence[str]) -> Floats:
    """The scores in the order of `candidates`, -inf for those that the scorer does not know."""
    place = {candidate: j for j, candidate in enumerate(scorer.candidates)}
    known = [j for j, candidate in enumerate(candidates) if candidate in place]
    values = np.full((len(embeddings), len(candidates)), -np.inf, np.float32)
    values[:, known] = scorer.score(embeddings)[:, [place[candidates[j]] for j in known]]
    return values
