"""Routing by nothing but the adapters' own matrices: how strongly each would act on the prompt's hidden states."""

from loramux.router.weights_only.everyday import EVERYDAY
from loramux.router.weights_only.modules import default_layers
from loramux.router.weights_only.reference import MIN_PROMPTS, Reference
from loramux.router.weights_only.scorer import AdapterFactors, WeightsScorer

__all__ = ["EVERYDAY", "MIN_PROMPTS", "AdapterFactors", "Reference", "WeightsScorer", "default_layers"]
