"""Routing by nothing but the adapters' own matrices: how strongly each would act on the prompt's hidden states."""

from loramux.router.weights_only.factors import arrow_factor, exact_norms, norm_factor
from loramux.router.weights_only.modules import default_modules
from loramux.router.weights_only.scorer import Reference, WeightsScorer
from loramux.router.weights_only.stacked import StackedScorer

__all__ = [
    "Reference",
    "StackedScorer",
    "WeightsScorer",
    "arrow_factor",
    "default_modules",
    "exact_norms",
    "norm_factor",
]
