"""What an adapter is checked against: the base model's modules by name, kind and shape."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D


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


def base_spec_from_config(model: str | os.PathLike[str] | PretrainedConfig, *, name: str | None = None) -> BaseSpec:
    """The structure of a causal model from its configuration: a hub name, a folder, or a configuration object.

    The model is built on the meta device: no weights are read and none are allocated. Code from the repository is
    never run. `name` is what messages call the base; it defaults to what was given (for a folder, its last part).
    Raises what transformers raises for a configuration it does not know: OSError, ValueError.
    """
    if isinstance(model, PretrainedConfig):
        config = model
        shown = name or config.name_or_path or config.model_type
    else:
        config = AutoConfig.from_pretrained(os.fspath(model), trust_remote_code=False)
        folder = os.path.isdir(model)
        shown = name or (os.path.basename(os.path.abspath(model)) if folder else os.fspath(model))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    linears: dict[str, LinearSpec] = {}
    others: dict[str, str] = {}
    for path, module in built.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[path] = LinearSpec(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linears[path] = LinearSpec(int(module.weight.shape[0]), int(module.weight.shape[1]), transposed=True)
        elif path:
            others[path] = type(module).__name__
    return BaseSpec(
        name=shown,
        model_type=config.model_type,
        architecture=type(built).__name__,
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        vocab_size=int(text.vocab_size),
        linears=linears,
        other_modules=others,
    )
