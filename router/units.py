"""In which units a scorer measures, so that one temperature makes the same sets whichever scorer was chosen."""

from loramux.router.interface import PartialScorer, Scorer
from loramux.router.scores.ensemble import Ensemble
from loramux.router.scores.routerdc import RouterDC


def unit_of(scorer: Scorer) -> float:
    """How far apart this scorer puts two candidates whose scores differ by 1.

    1 for a scorer that predicts scores. An ensemble adds up its members, each over its scale: the sum of unit / scale.
    RouterDC's cosines over tau lie in a range of 2 / tau where scores lie in one of 1.
    """
    if isinstance(scorer, PartialScorer):
        return unit_of(scorer.scorer)
    if isinstance(scorer, Ensemble):
        return sum(unit_of(member) / scale for member, scale in zip(scorer.members, scorer.scales, strict=True))
    return 2 / scorer.temperature if isinstance(scorer, RouterDC) else 1.0
