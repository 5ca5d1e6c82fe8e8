"""From a model's name or path to a module that runs on our attention and our projections."""

import logging
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loramux.kernels.processor import multiplies_bfloat16
from loramux.server.engine.attention import (
    ATTENTION_NAME,
    LAYER_ATTRIBUTE,
    LayerCache,
    LayerShape,
    StepState,
    register_attention,
)
from loramux.server.engine.linears import Probe, SiteProjection, replace_linears

logger = logging.getLogger(__name__)

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
PROBE_TOKENS = 5
PROBE_ROWS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnsupportedModelError(Exception):
    """The model cannot be served; the message names it and says why, and what would work."""


def resolve_model(name_or_path: str, revision: str | None = None) -> Path:
    """A local directory for a path or a hub name. Raises UnsupportedModelError when there is none.

    Only what is served is fetched, once: configuration, tokenizer, and weights as safetensors.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(f"{path} is no model directory: it has no config.json")
        return path.resolve()
    if path.is_absolute() or name_or_path.startswith((".", "~")):
        raise UnsupportedModelError("no such directory")
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModelError(f"neither a directory nor to be had from the hub: {reason}") from None


def load_config(path: str | Path) -> Any:
    """The model's configuration, checked. Raises UnsupportedModelError; see `check_supported`."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(f"cannot read the model's configuration: {error}") from error
    check_supported(config)
    return config


def check_supported(config: Any) -> None:
    """Raises UnsupportedModelError naming the architecture and the reason when the engine cannot serve it."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model; only causal (decoder-only) models are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{kind} has no causal language model in transformers (encoders are not served)")
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise UnsupportedModelError(f"{kind} is a multimodal model; serve its text-only version")
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({method}); serve the unquantised weights in bfloat16, float16 or float32"
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = architecture.__name__
    if getattr(architecture, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} keeps a recurrent state, which a paged KV cache cannot hold")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not take its attention through transformers' attention interface")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(f"{name} has layers of kind {', '.join(sorted(kinds))}, which are not supported")
    encoder = hasattr(config, "type_vocab_size") and getattr(config, "is_decoder", True) is False  # BERT and its kin
    if encoder or getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{name} is configured for bidirectional attention")


def context_limit(config: Any, wanted: int | None) -> int:
    """The longest sequence to serve: `wanted`, bounded by what the positions allow.

    Rotary embeddings that rescale with the longest sequence of a batch (dynamic, longrope) would make one request's
    output depend on another's, so they are served up to the length at which they start to rescale.
    Raises UnsupportedModelError naming --max-model-len.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    reason = "the model's positions end there"
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or limit
            if original < limit:
                limit = original
                reason = f"its {rope['rope_type']} rotary embedding rescales beyond it, for the whole batch at once"
    if wanted is None:
        return int(limit)
    if wanted > limit:
        raise UnsupportedModelError(
            f"max_model_len {wanted} is more than {limit}: {reason}; use --max-model-len {limit}"
        )
    return wanted


@dataclass(slots=True)
class _ShapeRecorder:
    """Stands in for a layer's cache during the probe: plain causal attention, shapes noted."""

    module: nn.Module
    seen: list[LayerShape]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
               softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """The shapes of a layer's output for its inputs; the values are not used."""
        self.seen.append(LayerShape(self.module, query.shape[0], key.shape[0], key.shape[2], value.shape[2], window))
        return value.new_zeros(query.shape[1], query.shape[0], value.shape[2])


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run once its layers have caches: its projections are sites, its attention is ours."""

    module: Any
    config: Any
    dtype: torch.dtype
    device: torch.device
    state: StepState
    projections: list[SiteProjection]
    attention: list[LayerShape]
    eos_token_ids: tuple[int, ...]
    layers: dict[str, nn.Module]

    @property
    def num_logits(self) -> int:
        """Columns of the logits, which may be more or fewer than the tokens that the model reads."""
        return int(self.module.get_output_embeddings().weight.shape[0])

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return sum(a.kv_heads * (a.k_dim + a.v_dim) for a in self.attention) * self.dtype.itemsize

    def attach(self, layers: Seq[LayerCache]) -> None:
        """Hangs each layer's cache on its attention module, in the order of the layers."""
        for shape, layer in zip(self.attention, layers, strict=True):
            setattr(shape.module, LAYER_ATTRIBUTE, layer)

    def detach(self) -> None:
        """Takes the caches off again, so that their memory can be freed."""
        for shape in self.attention:
            delattr(shape.module, LAYER_ATTRIBUTE)

    def forward(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [len(rows), vocab] of the packed tokens `rows`; input_ids and position_ids are int64 [tokens]."""
        out = self.module(
            input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False,
            logits_to_keep=rows, return_dict=True,
        )  # fmt: skip
        logits: Tensor = out.logits[0]
        return logits

    def first_site(self, layer: int) -> int:
        """The index of the first site of a layer, which reads its normalised input."""
        inside = list(self.layers)[layer] + "."
        sites = [p.site for p in self.projections if p.site is not None]
        return min(site.index for site in sites if site.slices[0].module.startswith(inside))

    @contextmanager
    def watching(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Within it, `forward` leaves the hidden states [tokens, hidden] of these layers in the dictionary.

        Layer k < num_layers is the normalised input of its first projection, layer num_layers the final hidden states.
        """
        sites = {self.first_site(layer): layer for layer in layers if layer < len(self.layers)}
        found: dict[int, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[len(self.layers)] = output[0][0]

        handle = None
        if len(self.layers) in layers:
            handle = self.module.base_model.register_forward_hook(keep)
        self.state.watched = dict.fromkeys(sites)
        try:
            yield found
            for site, x in self.state.watched.items():
                if x is not None:
                    found[sites[site]] = x.reshape(-1, x.shape[-1])
        finally:
            self.state.watched = None
            if handle is not None:
                handle.remove()


def pick_device(device: str) -> torch.device:
    """`auto` is the first CUDA card when there is one, else the CPU. Raises UnsupportedModelError for an absent one."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModelError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModelError(f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    return chosen


def pick_dtype(dtype: str, config: Any, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of weights and cache, and why it is that.

    `auto` is the checkpoint's own dtype on a card (bfloat16 for one that names none of ours). On a CPU it is bfloat16
    when that is the checkpoint's and the processor multiplies it, else float32, which holds float16 checkpoints
    exactly: float16 products are no quicker there, and its attention is slower.
    """
    if dtype != "auto":
        return DTYPES[dtype], "as set"
    own: Any = getattr(config, "dtype", None)
    if device.type != "cpu":
        return (own, "the checkpoint's own") if own in DTYPES.values() else (torch.bfloat16, "the default on a card")
    if own is not torch.bfloat16:
        return torch.float32, "auto on a CPU for a checkpoint that is not in bfloat16"
    if multiplies_bfloat16():
        return torch.bfloat16, "the checkpoint's own, which this processor multiplies"
    return torch.float32, "auto on a CPU without bfloat16 products (AVX512_BF16 or AMX)"


def eos_ids(path: str | Path, config: Any) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's (one or a list) when it names any, else the configuration's."""
    found: Any = None
    if (Path(path) / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(path).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise UnsupportedModelError(f"cannot read the model's generation_config.json: {error}") from error
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def load_model(path: str | Path, *, dtype: str = "auto", device: str = "auto", pack: bool = True) -> LoadedModel:
    """Loads weights, replaces projections and attention. Raises UnsupportedModelError before weights are read.

    One probing pass of a few tokens finds the layers' shapes and the projections' sites; a model in which an attention
    layer was not seen (it does not go through the interface after all) is refused.
    """
    config = load_config(path)
    where = pick_device(device)
    kind, reason = pick_dtype(dtype, config, where)
    logger.info("weights and cache in %s on %s: %s", str(kind).removeprefix("torch."), where, reason)
    register_attention()
    try:
        module = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=kind, attn_implementation=ATTENTION_NAME, use_safetensors=True,
            trust_remote_code=False, device_map=None,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load the model: {error}") from error
    try:
        module = module.to(where).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        raise UnsupportedModelError(
            f"the weights take {size} bytes in {kind}, which {where} does not have: use a smaller model or dtype"
        ) from error
    return prepare_model(module, config, eos_ids(path, config), pack=pack)


def prepare_model(module: Any, config: Any, eos_token_ids: tuple[int, ...], *, pack: bool = True) -> LoadedModel:
    """Turns a transformers model whose attention implementation is ours into a `LoadedModel`."""
    state = StepState()
    seen: list[LayerShape] = []
    for candidate in module.modules():
        if getattr(candidate, "layer_idx", None) is not None and hasattr(candidate, "is_causal"):
            setattr(candidate, LAYER_ATTRIBUTE, _ShapeRecorder(candidate, seen))
    name = type(module).__name__
    weight = next(module.parameters())
    probe = Probe()
    probe.attach(module)
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=weight.device)
    try:
        with torch.inference_mode():
            module(
                input_ids=tokens, position_ids=torch.arange(PROBE_TOKENS, device=weight.device).unsqueeze(0),
                use_cache=False, logits_to_keep=torch.arange(PROBE_ROWS, device=weight.device), return_dict=True,
            )  # fmt: skip
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"{name} cannot run on a packed batch with paged attention: {error}") from error
    finally:
        probe.detach()
    layers = int(config.num_hidden_layers)
    if len(seen) != layers or len({id(s.module) for s in seen}) != layers:
        raise UnsupportedModelError(
            f"{name} has {layers} layers but {len(seen)} went through transformers' attention interface"
        )
    kinds = getattr(config, "layer_types", None) or [None] * layers
    for shape, kind in zip(seen, kinds, strict=True):
        if kind is not None and (kind == "sliding_attention") != (shape.window is not None):
            raise UnsupportedModelError(
                f"{name} applies its sliding window through a mask, which paged attention lacks"
            )
    with torch.inference_mode(False):
        projections = replace_linears(module, probe, state, tokens=PROBE_TOKENS, head_rows=PROBE_ROWS, pack=pack)
    decoder, shapes = repeated_layers(module, seen), list(seen)  # the recorders' own list grows with another probe
    return LoadedModel(module, config, weight.dtype, weight.device, state, projections, shapes, eos_token_ids, decoder)


def repeated_layers(module: nn.Module, attention: Seq[LayerShape]) -> dict[str, nn.Module]:
    """The decoder's layers by path, in order: the members of the module list that hold one attention each.

    Empty where the model has no such list.
    """
    attentions = {id(shape.module) for shape in attention}
    for path, inner in module.named_modules():
        if isinstance(inner, nn.ModuleList):
            layers = [layer for layer in inner if sum(id(part) in attentions for part in layer.modules()) == 1]
            if len(layers) == len(attentions):
                return {f"{path}.{i}": layer for i, layer in enumerate(layers)}
    return {}
