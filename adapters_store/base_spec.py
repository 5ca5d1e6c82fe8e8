"""What an adapter is checked against: the base model's modules by name, kind and shape."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A projection that adapters may target. `transposed` is True for GPT-2's Conv1D (weight stored [in, out])."""

    in_features: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model's structure, made from its configuration alone (no weights are read).

    `linears` maps dotted module paths (`model.layers.0.self_attn.q_proj`) to shapes; `other_modules` maps every
    other module's path to its class name, so that a refusal can say what an unsupported target is.
    """

    name: str
    model_type: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    linears: Mapping[str, LinearSpec]
    other_modules: Mapping[str, str]
