"""Reads `adapter_config.json`: what it says is either carried out, known to change nothing, or refused by name.

Rules for keys: those that only matter while training or saving are ignored; those that would change the forward pass
are refused unless they are off (null, false, zero, empty). A key that is unknown here and on is refused when it is
named as PEFT names its options (`use_...`, `..._config`, `target_...`, `..._pattern`, `lora_...`), since a newer PEFT
may mean something by it; any other is a note of whoever trained the adapter, and gives a warning.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.adapters_store import strict_json
from loramux.adapters_store.base_spec import BaseSpec
from loramux.adapters_store.errors import InvalidAdapter, UnsupportedAdapter, shorten
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.safetensors_header import is_lfs_pointer

FILE = "adapter_config.json"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales the outputs by learned magnitudes",
    "lora_bias": "it adds a bias to lora_B",
    "modules_to_save": "it replaces whole modules of the base model, which all adapters share",
    "target_parameters": "it adapts parameters that no linear module owns (such as fused experts)",
    "trainable_token_indices": "it changes rows of the embedding, which all adapters share",
    "layer_replication": "it changes the number of layers of the base model, which all adapters share",
    "alora_invocation_tokens": "Activated LoRA starts at an invocation sequence inside the prompt",
    "use_qalora": "QALoRA pools the inputs in groups",
    "use_bdlora": "BD-LoRA stores block-diagonal matrices",
    "arrow_config": "Arrow mixes several adapters by a router of its own",
    "kasa_config": "KaSA removes singular components from the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "it was trained with Megatron's parallel layers",
    "enable_lora": "a LoRA of fused projections with grouped convolutions (PEFT up to 0.2)",
}
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path peft_type peft_version revision inference_mode r lora_alpha lora_dropout "
    "target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern use_rslora bias "
    "fan_in_fan_out init_lora_weights task_type megatron_core loftq_config eva_config corda_config lora_ga_config "
    "velora_config qalora_group_size ensure_weight_tying merge_weights runtime_config".split()
)
_OPTION_PREFIXES = ("use_", "target_", "lora_")
_OPTION_SUFFIXES = ("_config", "_pattern")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_MLX_KEYS = ("lora_parameters", "fine_tune_type", "lora_layers")
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_TASKS: Mapping[str, str] = {
    "SEQ_CLS": "a classifier of whole texts",
    "TOKEN_CLS": "a classifier of tokens",
    "SEQ_2_SEQ_LM": "an encoder-decoder model",
    "QUESTION_ANS": "a model that marks answers in a text",
    "FEATURE_EXTRACTION": "an encoder that makes embeddings",
}


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """The part of a LoRA configuration that the forward pass depends on, plus what messages need.

    `rank` and `alpha` are the defaults (8 and 8 when absent, as in PEFT); `alpha_pattern` and `rank_pattern` keep the
    order of the file, in which PEFT tries them. `targets` is None when modules are chosen by an expression.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None
    base_model: str | None
    warnings: tuple[str, ...]


def read_config(path: Path, base: BaseSpec, limits: StoreLimits) -> PeftLoraConfig:
    """Parses and judges the file. Raises `InvalidAdapter` (what it is instead, or the field that is wrong) and
    `UnsupportedAdapter` (the method, task or option that is not carried out, with the reason)."""
    with path.open("rb") as file:
        data = file.read(limits.max_config_bytes + 1)
    if len(data) > limits.max_config_bytes:
        raise _invalid(f"longer than {limits.max_config_bytes} bytes", "limit_exceeded")
    return parse_config(data, base)


def parse_config(data: bytes, base: BaseSpec) -> PeftLoraConfig:
    """Like `read_config`, from bytes."""
    if is_lfs_pointer(data):
        raise _invalid(
            "this is a Git LFS pointer, not the configuration; run `git lfs pull` and upload again", "git_lfs_pointer"
        )
    try:
        raw = strict_json.loads(data)
    except ValueError as error:
        raise _invalid(str(error)) from error
    if not isinstance(raw, dict):
        raise _invalid("not a JSON object")
    warnings = _check_kind(raw)
    _check_task(raw, base)
    _check_options(raw)
    warnings += _unknown_keys(raw)
    base_model = _text(raw, "base_model_name_or_path")
    return PeftLoraConfig(
        rank=DEFAULT_RANK if raw.get("r") is None else _rank(raw["r"], "r"),
        alpha=DEFAULT_ALPHA if raw.get("lora_alpha") is None else _number(raw["lora_alpha"], "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern={k: _rank(v, f"rank_pattern.{shorten(k)}") for k, v in _mapping(raw, "rank_pattern").items()},
        alpha_pattern={k: _number(v, f"alpha_pattern.{shorten(k)}") for k, v in _mapping(raw, "alpha_pattern").items()},
        targets=_targets(raw.get("target_modules")),
        base_model=base_model,
        warnings=tuple(warnings),
    )


def _invalid(message: str, code: str = "invalid_config", key: str = "") -> InvalidAdapter:
    return InvalidAdapter(f"{FILE}: {message}", code=code, field=f"{FILE}:{key}" if key else FILE)


def _unsupported(message: str, code: str, key: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(f"{FILE}: {message}", code=code, field=f"{FILE}:{key}")


def _check_kind(raw: Mapping[str, Any]) -> list[str]:
    """Says what the file is when it is no LoRA configuration of PEFT."""
    kind = raw.get("peft_type")
    if kind is not None:
        if not isinstance(kind, str):
            raise _invalid("`peft_type` must be a string", key="peft_type")
        if kind.upper() != "LORA":
            raise _unsupported(
                f"peft_type {shorten(kind, 60)} is not served; this server carries out LORA",
                "unsupported_peft_type",
                "peft_type",
            )
        return []
    for key in _MLX_KEYS:
        if key in raw:
            raise _unsupported(
                f"this is an MLX adapter (`{key}`); convert it to PEFT's format first", "unsupported_format", key
            )
    if "model_type" in raw or "architectures" in raw:
        raise _invalid("this is a model's config.json, not an adapter's configuration", "not_an_adapter_config")
    if not {"r", "lora_alpha", "target_modules"} & raw.keys():
        known = ", ".join(shorten(key, 40) for key in list(raw)[:5])
        raise _invalid(f"not a PEFT configuration: no `peft_type` (keys: {known or 'none'})", "not_an_adapter_config")
    return ["adapter_config.json has no peft_type; it was read as LORA"]


def _check_task(raw: Mapping[str, Any], base: BaseSpec) -> None:
    task = _text(raw, "task_type")
    if task is not None and task in _TASKS:
        raise _unsupported(
            f"task_type {task} is {_TASKS[task]}; this server generates text with a causal model",
            "unsupported_task",
            "task_type",
        )
    if task is not None and task != "CAUSAL_LM":
        raise _invalid(f"task_type {shorten(task, 60)!r} is unknown", key="task_type")
    mapping = _mapping(raw, "auto_mapping")
    trained_on = mapping.get("base_model_class")
    if trained_on is None:
        return
    if not isinstance(trained_on, str):
        raise _invalid("`auto_mapping.base_model_class` must be a string", key="auto_mapping")
    if trained_on != base.architecture and not trained_on.endswith(_CAUSAL_ENDINGS):
        raise _unsupported(
            f"auto_mapping says it was trained on {shorten(trained_on, 80)}, which is not a causal language model",
            "unsupported_task",
            "auto_mapping",
        )


def _check_options(raw: Mapping[str, Any]) -> None:
    for key, reason in _REFUSED.items():
        if _is_on(raw.get(key)):
            raise _unsupported(f"`{key}` is not served: {reason}", "unsupported_option", key)
    bias = _text(raw, "bias")
    if bias not in (None, "none"):
        raise _unsupported(
            f"`bias` is {shorten(bias, 40)!r}: trained biases of the base model are not served, only 'none'",
            "unsupported_option",
            "bias",
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise _unsupported(
            f"`init_lora_weights` is {shorten(init, 40)!r}, which changes the base weights when training starts; "
            "save with `path_initial_model_for_weight_conversion` to get an adapter for the original base",
            "unsupported_option",
            "init_lora_weights",
        )
    if init is not None and not isinstance(init, str | bool):
        raise _invalid("`init_lora_weights` must be a string or a boolean", key="init_lora_weights")
    for key in ("fan_in_fan_out", "inference_mode"):  # a module's own layout decides, as in PEFT
        _flag(raw, key)


def _is_on(value: Any) -> bool:
    """Whether an option is set: anything but null, false, zero, and the empty containers."""
    return bool(value)


def _unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    unknown = [k for k, v in raw.items() if k not in _WITHOUT_EFFECT and k not in _REFUSED and _is_on(v)]
    for key in unknown:
        if key.startswith(_OPTION_PREFIXES) or key.endswith(_OPTION_SUFFIXES):
            raise _unsupported(
                f"`{shorten(key, 60)}` is an option that this server does not know; "
                "remove it if the adapter computes the same without it",
                "unsupported_option",
                shorten(key, 60),
            )
    if not unknown:
        return []
    shown = ", ".join(shorten(key, 40) for key in unknown[:10])
    return [f"adapter_config.json has keys that LoRA in PEFT does not have; they were ignored: {shown}"]


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise _invalid(f"`{key}` must be a string or null", key=key)
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _invalid(f"`{key}` must be true or false", key=key)
    return bool(value)


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise _invalid(f"`{key}` must be an object or null", key=key)
    return value or {}


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise _invalid(
            f"`{key}` must be a whole number of at least 1, it is {shorten(repr(value), 40)}", "invalid_rank", key
        )
    return value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float):
        raise _invalid(f"`{key}` must be a number, it is {shorten(repr(value), 40)}", "invalid_alpha", key)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= 1e9:
        raise _invalid(f"`{key}` is out of range", "invalid_alpha", key)
    return number


def _targets(value: Any) -> tuple[str, ...] | None:
    """The listed module names; None for an expression, `all-linear`, or nothing: then the tensors alone say it."""
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _invalid("`target_modules` must be a string or a list of strings", key="target_modules")
    return tuple(dict.fromkeys(value))
