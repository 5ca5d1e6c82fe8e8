"""PEFT LoRA files -> the canonical form: which module gets which pair of matrices at which scale.

Targets and ranks come from the tensors; the configuration gives the scale s = alpha / r, or alpha / sqrt(r) for
rsLoRA, where alpha may come from `alpha_pattern` and r is the tensors' own. Every tensor must be understood: one that
is not would be part of the forward pass that we left out.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from loramux.adapters_store.base_spec import BaseSpec, LinearSpec
from loramux.adapters_store.canonical import CanonicalTensor, Part, write_canonical
from loramux.adapters_store.errors import AdapterError, IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter, shorten
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.patterns import Budget, Pattern, PatternError
from loramux.adapters_store.peft_config import FILE, PeftLoraConfig, read_config
from loramux.adapters_store.safetensors_header import TensorInfo, invalid, read_chunks, read_tensor_infos

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_FOREIGN_TENSORS: tuple[tuple[str, str], ...] = (
    (r"\.lora_embedding_[AB]", "LoRA on embeddings"),
    (r"\.lora_magnitude_vector", "the magnitudes of DoRA"),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "a bias of lora_A or lora_B"),
    (r"\.lora_diag", "the singular values of KaSA"),
    (r"\.(lora_E|ranknum)", "the singular values of AdaLoRA"),
    (r"\.lora_[ab]$", "an MLX adapter (its matrices are transposed); convert it to PEFT's format"),
    (r"\.modules_to_save\.|\.original_module\.", "a module saved whole (modules_to_save)"),
    (r"\.base_layer\.", "weights of the base model itself"),
    (r"\.(ia3_l|vera_lambda|hada_|lokr_|oft_|boft_|miss_block|hra_u|finegates_|vblora_|fourierft_)", "another method"),
    (r"(unilora_theta_d|prompt_embeddings|trainable_tokens_delta|ln_tuning)", "another method"),
    (r"(^|\.)(score|classifier|pre_classifier|qa_outputs|v_head)\.", "a head that is not the language model's"),
    (r"\.bias$", "a trained bias"),
)
_EXPERTS = re.compile(r"\.experts(\.|$)")


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One adapted module: its two tensors in the upload, its rank, and the scale of B A."""

    module: str
    A: TensorInfo
    B: TensorInfo
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An upload that passed every check but the scan of its numbers; nothing of the weights has been read."""

    modules: tuple[ModulePlan, ...]
    base_model: str | None
    warnings: tuple[str, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({m.rank for m in self.modules}))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last names of the adapted modules, sorted."""
        return tuple(sorted({m.module.rpartition(".")[2] for m in self.modules}))


def plan_adapter(config_path: Path, weights_path: Path, base: BaseSpec, limits: StoreLimits) -> AdapterPlan:
    """Checks both files against the base model.

    Raises `InvalidAdapter`, `UnsupportedAdapter`, `IncompatibleAdapter`.
    """
    config = read_config(config_path, base, limits)
    return plan_from_infos(config, read_tensor_infos(weights_path, limits), base, limits)


def plan_from_infos(
    config: PeftLoraConfig, infos: Mapping[str, TensorInfo], base: BaseSpec, limits: StoreLimits
) -> AdapterPlan:
    """Like `plan_adapter`, from a parsed configuration and header."""
    copies, tensors = _split_base_copies(infos)
    pairs = _pair_up(tensors)
    for module, pair in pairs.items():
        _check_shape(module, pair["A"], pair["B"], base, config, limits)
    for module, info in copies.items():
        _check_base_copy(module, info, pairs, base, config)
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items()}
    _check_ranks(ranks, config)
    alphas, unused = _alphas(ranks, config, limits)
    modules = tuple(
        ModulePlan(
            module, pairs[module]["A"], pairs[module]["B"], rank, _scale(alphas[module], rank, config.use_rslora)
        )
        for module, rank in sorted(ranks.items())
    )
    warnings = [
        *config.warnings,
        *unused,
        *_missed_targets(config, ranks),
        *_other_base(config, base),
        *(f"the file's copy of the base model's weight of {shorten(m)!r} was ignored" for m in copies),
    ]
    return AdapterPlan(modules, config.base_model, tuple(warnings))


def write_plan(plan: AdapterPlan, weights_path: Path, output: IO[bytes]) -> tuple[str, int, list[str]]:
    """Streams the upload's weights into a canonical file; returns (sha256 hex, bytes, further warnings).

    Raises `InvalidAdapter` at the first NaN or infinite number. Memory is bounded by one chunk.
    """
    with weights_path.open("rb") as file:
        sources = {
            (m.module, part): _FiniteSource(file, info) for m in plan.modules for part, info in (("A", m.A), ("B", m.B))
        }
        tensors = [
            CanonicalTensor(module, "A" if part == "A" else "B", s.info.dtype, (s.info.shape[0], s.info.shape[1]), s)
            for (module, part), s in sources.items()
        ]
        hexdigest, size = write_canonical(output, tensors, {m.module: m.scale for m in plan.modules})
    if not any(sources[m.module, "A"].nonzero and sources[m.module, "B"].nonzero for m in plan.modules):
        return hexdigest, size, ["every product lora_B lora_A is zero: this adapter changes nothing (was it trained?)"]
    return hexdigest, size, []


class _FiniteSource:
    """The bytes of one tensor, scanned on the way: an exponent of all ones is an infinity or a NaN."""

    def __init__(self, file: IO[bytes], info: TensorInfo) -> None:
        self.info = info
        self.nonzero = False
        self._file = file

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes in order. Raises `InvalidAdapter`."""
        word, exponent = _EXPONENTS[self.info.dtype]
        done = 0
        for chunk in read_chunks(self._file, self.info):
            words = np.frombuffer(chunk, dtype=word)
            bad = (words & exponent) == exponent
            if bad.any():
                where = done + int(bad.argmax())
                raise invalid(
                    f"{shorten(self.info.name)!r} holds NaN or infinite values (the first is element {where})",
                    "non_finite_weights",
                )
            self.nonzero = self.nonzero or bool(np.any(words << 1))
            done += len(words)
            yield chunk


# Names.


def _pair_up(infos: Mapping[str, TensorInfo]) -> dict[str, dict[Part, TensorInfo]]:
    pairs: dict[str, dict[Part, TensorInfo]] = {}
    adapters: set[str | None] = set()
    for name, info in infos.items():
        match = _LORA_KEY.fullmatch(name.removeprefix(_PREFIX))
        if match is None or ".base_layer" in name or "modules_to_save" in name or "original_module" in name:
            raise _foreign(name)
        adapters.add(match["adapter"])
        pair = pairs.setdefault(match["module"], {})
        part: Part = "A" if match["part"] == "A" else "B"
        if part in pair:
            raise invalid(f"{shorten(match['module'])!r} has two lora_{part} matrices", "unexpected_tensor")
        pair[part] = info
    if len(adapters) > 1:
        found = ", ".join(sorted(shorten(a, 40) if a else "(none)" for a in adapters))
        raise invalid(f"it holds several adapters ({found}); upload them one by one", "unexpected_tensor")
    if not pairs:
        raise invalid("it holds no tensors", "empty_adapter")
    for module, pair in pairs.items():
        for part, other in (("A", "B"), ("B", "A")):
            if part not in pair:
                raise invalid(f"{shorten(module)!r} has lora_{other} but no lora_{part}", "missing_tensor")
    return pairs


def _foreign(name: str) -> AdapterError:
    """The refusal of a tensor that is not half of a LoRA pair."""
    shown = shorten(name)
    if _EXPERTS.search(name):
        return _unsupported_tensor(f"{shown!r} belongs to experts, which are not served")
    for pattern, what in _FOREIGN_TENSORS:
        if re.search(pattern, name):
            return _unsupported_tensor(f"{shown!r} is not served: {what}")
    return _unsupported_tensor(f"{shown!r} is not part of a LoRA adapter")


def _unsupported_tensor(message: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"adapter_model.safetensors: {message}", code="unsupported_tensor", field="adapter_model.safetensors"
    )


def _split_base_copies(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Sets aside `<module>.base_layer.weight`, which PEFT saves when the adapter targets the output layer."""
    copies: dict[str, TensorInfo] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        module, suffix, _ = name.removeprefix(_PREFIX).partition(".base_layer.weight")
        if suffix and name.endswith(suffix):
            copies[module] = info
        else:
            tensors[name] = info
    return copies, tensors


def _check_base_copy(
    module: str, info: TensorInfo, pairs: Mapping[str, object], base: BaseSpec, config: PeftLoraConfig
) -> None:
    """A copy of an adapted module's base weight may be left out only if it has the base's own shape."""
    if module not in pairs:
        raise _foreign(info.name)
    spec = base.linears[module]
    expected = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
    if info.shape != expected:
        raise _incompatible(
            f"{shorten(module)!r} has weights {list(expected)} in {base.name}, "
            f"the adapter was trained on {list(info.shape)} (was the vocabulary resized?)",
            config,
        )


# Shapes.


def _check_shape(
    module: str, A: TensorInfo, B: TensorInfo, base: BaseSpec, config: PeftLoraConfig, limits: StoreLimits
) -> None:
    """A is [r, in] and B [out, r]; matrices stored the other way round would silently mean something else."""
    for part, shape in (("A", A.shape), ("B", B.shape)):
        if len(shape) != 2:
            raise _unsupported_tensor(
                f"lora_{part} of {shorten(module)!r} has {len(shape)} dimensions {list(shape)}; "
                "only linear layers are served"
            )
    spec = base.linears.get(module)
    fits = spec is not None and (A.shape[1], B.shape[0]) == (spec.in_features, spec.out_features)
    if not fits and _is_transposed(A.shape, B.shape, spec):
        raise invalid(
            f"{shorten(module)!r} is transposed: lora_A is {list(A.shape)} and lora_B {list(B.shape)}, "
            "PEFT stores lora_A as [r, in] and lora_B as [out, r]",
            "transposed_weights",
        )
    if spec is None or _EXPERTS.search(module):
        raise _unknown_module(module, base, config)
    rank = A.shape[0]
    if rank < 1 or B.shape[1] != rank:
        raise invalid(
            f"{shorten(module)!r}: the ranks of lora_A {list(A.shape)} and lora_B {list(B.shape)} differ or are zero",
            "invalid_rank",
        )
    if not fits:
        raise _incompatible(
            f"{shorten(module)!r} takes {spec.in_features} inputs to {spec.out_features} outputs in {base.name}, "
            f"the adapter's takes {A.shape[1]} to {B.shape[0]} (lora_A {list(A.shape)}, lora_B {list(B.shape)})",
            config,
        )
    if rank > limits.max_rank:
        raise invalid(f"{shorten(module)!r} has rank {rank}, the limit is {limits.max_rank}", "limit_exceeded")


def _is_transposed(A: tuple[int, ...], B: tuple[int, ...], spec: LinearSpec | None) -> bool:
    """Whether [in, r] and [r, out] explain the pair, by the module's own sizes or, without them, by the ranks."""
    as_module = spec is not None and (A[0], B[1]) == (spec.in_features, spec.out_features)
    return A[1] == B[0] and (as_module or A[0] != B[1])


def _unknown_module(module: str, base: BaseSpec, config: PeftLoraConfig) -> AdapterError:
    other = base.other_modules.get(module)
    if _EXPERTS.search(module):
        return _unsupported_tensor(f"{shorten(module)!r} belongs to experts, which are not served")
    if other is not None:
        return UnsupportedAdapter(
            f"adapter_model.safetensors: it adapts {shorten(module)!r}, which is {other} in {base.name}; "
            "only linear layers are served",
            code="unsupported_module",
            field="adapter_model.safetensors",
        )
    return _incompatible(
        f"it adapts {shorten(module)!r}, which {base.name} ({base.architecture}) does not have", config
    )


def _incompatible(message: str, config: PeftLoraConfig) -> IncompatibleAdapter:
    says = f"; it says its base is {shorten(config.base_model, 120)!r}" if config.base_model else ""
    return IncompatibleAdapter(
        f"the adapter was made for another base model: {message}{says}", code="incompatible_base", field="files"
    )


# Ranks and scales.


def _check_ranks(ranks: Mapping[str, int], config: PeftLoraConfig) -> None:
    """The tensors' rank must be one that the configuration names: the scale alpha / r hangs on it."""
    known = {config.rank, *config.rank_pattern.values()}
    for module, rank in ranks.items():
        if rank not in known:
            said = " or ".join(str(r) for r in sorted(known))
            raise InvalidAdapter(
                f"{FILE} gives rank {said}, but {shorten(module)!r} has rank {rank}; the scale would be wrong",
                code="invalid_rank",
                field=f"{FILE}:r",
            )


def _alphas(modules: Iterable[str], config: PeftLoraConfig, limits: StoreLimits) -> tuple[dict[str, float], list[str]]:
    """alpha of every module: that of the first `alpha_pattern` key that matches it, else `lora_alpha`."""
    if not config.alpha_pattern:
        return dict.fromkeys(modules, config.alpha), []
    budget = Budget(limits.max_pattern_work)
    used: set[str] = set()
    alphas: dict[str, float] = {}
    key = ""
    try:
        patterns: list[Pattern] = []
        for key in config.alpha_pattern:
            patterns.append(Pattern(key, budget))
        for module in modules:
            alphas[module] = config.alpha
            for pattern in patterns:
                key = pattern.key
                if pattern.matches(module, budget):
                    alphas[module] = config.alpha_pattern[key]
                    used.add(key)
                    break
    except PatternError as error:
        raise UnsupportedAdapter(
            f"{FILE}: the `alpha_pattern` key {shorten(key)!r} is not understood: {error}; write module names instead",
            code="unsupported_pattern",
            field=f"{FILE}:alpha_pattern",
        ) from error
    unused = [shorten(key, 80) for key in config.alpha_pattern if key not in used]
    return alphas, [f"alpha_pattern keys that no module needed: {', '.join(unused[:10])}"] if unused else []


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


# Warnings.


def _missed_targets(config: PeftLoraConfig, modules: Mapping[str, int]) -> list[str]:
    """Listed targets that no tensor belongs to (a typo, or layers that were left out)."""
    endings = {ending for module in modules for ending in _endings(module)}
    missed = [target for target in config.targets or () if target not in endings]
    if not missed:
        return []
    shown = ", ".join(repr(shorten(target, 60)) for target in missed[:10])
    return [f"target_modules that no tensor belongs to, so they were not trained: {shown}"]


def _endings(module: str) -> Iterator[str]:
    """The module's path and every shorter one that starts after a dot: what PEFT compares listed targets with."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _other_base(config: PeftLoraConfig, base: BaseSpec) -> list[str]:
    if config.base_model is None or _short_name(config.base_model) == _short_name(base.name):
        return []
    return [
        f"it says its base is {shorten(config.base_model, 120)!r}, this server's is {base.name!r}; the shapes agree"
    ]


def _short_name(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
