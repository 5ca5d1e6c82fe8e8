"""An engine's parts put together for a configuration: model, adapter memory, attention, cache, runner."""

from dataclasses import dataclass
from typing import Any

import torch

from loramux.kernels import attention as attention_kernels
from loramux.kernels.dense.lora import make_invariant_backend
from loramux.kernels.lora import LoraBackend, make_backend
from loramux.server.engine.attention import AttentionPath
from loramux.server.engine.compiling import compile_layers, first_compiled_step, keep_caches_out
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.graphs import DecodeGraphs
from loramux.server.engine.invariant import make_invariant
from loramux.server.engine.invariant_attention import InvariantMath
from loramux.server.engine.kernel_attention import KernelAttention
from loramux.server.engine.loading import LoadedModel, UnsupportedModelError, context_limit, load_model
from loramux.server.engine.memory import kv_bytes_left, largest_prefill, measure_step, memory_in_use
from loramux.server.engine.prepacked import prepack
from loramux.server.engine.runner import Runner
from loramux.server.engine.sampler import warm_up
from loramux.server.engine.torch_attention import TorchAttention

DEFAULT_KV_BYTES_CPU = 2 << 30


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts. `num_blocks` is the size of the KV cache, `max_model_len` the longest sequence in tokens."""

    model: LoadedModel
    max_model_len: int
    num_blocks: int
    backend: LoraBackend
    runner: Runner


def assemble(config: EngineConfig, model: LoadedModel | None = None) -> Assembly:
    """Loads the model (or takes a prepared one) and allocates everything on its device.

    Raises UnsupportedModelError when the model cannot be served so or does not fit, naming the setting to change.
    """
    model = model or load_model(
        config.model_path, dtype=config.dtype, device=config.device, pack=config.packed_projections
    )
    max_model_len = context_limit(model.config, config.max_model_len)
    _check_switches(config, model.device)
    if config.deterministic:
        make_invariant(model)
    elif not config.compile_layers:
        prepack(model, config.prepacked_weights)
    if config.compile_layers:
        compile_layers(model)
    backend = _lora_backend(config, model)
    kernels = _attention_kernels(config, model, max_model_len)
    num_blocks = _count_blocks(config, model, max_model_len, backend, kernels)
    path = _attention_path(config, model, num_blocks, kernels)
    graphs = None
    if model.device.type == "cuda" and kernels is not None and config.cuda_graphs is not False:
        graphs = DecodeGraphs(model, backend, path, max_rows=config.max_num_seqs)
    runner = Runner(model, backend, path, block_size=config.block_size, graphs=graphs)
    if config.compile_layers:
        first_compiled_step(runner, largest_prefill(config.block_size, max_model_len, 1, config.block_size))
    if graphs is not None:
        graphs.capture()
    warm_up(model.device, model.num_logits)
    return Assembly(model, max_model_len, num_blocks, backend, runner)


def _check_switches(config: EngineConfig, device: torch.device) -> None:
    """Raises UnsupportedModelError for settings that ask for a card where there is none, or exclude each other."""
    if config.deterministic:
        needed = "triton" if device.type == "cuda" else "torch"
        for flag in ("lora_implementation", "attention_implementation"):
            if getattr(config, flag) not in (None, needed):
                raise UnsupportedModelError(
                    f"--deterministic needs --{flag.replace('_', '-')} {needed} on {device.type}; leave it at auto"
                )
        if config.compile_layers:
            raise UnsupportedModelError("--deterministic excludes --compile-layers: switch one of them off")
        if config.prepacked_weights:
            raise UnsupportedModelError("--deterministic excludes --prepacked-weights on: leave it at auto")
        if config.lora_overlap != "none":
            raise UnsupportedModelError("--deterministic excludes --lora-overlap: leave it at none")
        if config.lora_fold:
            raise UnsupportedModelError("--deterministic excludes --lora-fold on: leave it at auto")
    if config.compile_layers and config.prepacked_weights:
        raise UnsupportedModelError("--compile-layers excludes --prepacked-weights on: leave it at auto")
    if config.cuda_graphs and device.type != "cuda":
        raise UnsupportedModelError("--cuda-graphs needs --device cuda; leave it at auto")
    if config.cuda_graphs and config.attention_implementation == "torch":
        raise UnsupportedModelError("--cuda-graphs needs --attention-implementation triton; leave one at auto")


def _lora_backend(config: EngineConfig, model: LoadedModel) -> LoraBackend:
    """The adapters' memory and kernels."""
    sites = [p.site for p in model.projections if p.site is not None]
    limits = {
        "budget_bytes": config.device_adapter_bytes, "max_slots": config.max_device_adapters,
        "max_set_size": config.max_adapters_per_set, "max_set_rank": config.max_set_rank,
        "max_tokens": config.max_batched_tokens,
    }  # fmt: skip
    where = {"dtype": model.dtype, "device": model.device, "implementation": config.lora_implementation}
    try:
        if config.deterministic:
            return make_invariant_backend(sites, **limits, **where)  # type: ignore[arg-type]
        hiding: dict[str, Any] = {"overlap": config.lora_overlap, "fold": config.lora_fold}
        return make_backend(sites, **limits, **where, **hiding)  # type: ignore[arg-type]
    except ValueError as error:
        raise UnsupportedModelError(f"{error} (see --lora-implementation, --lora-overlap and --lora-fold)") from error
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            f"--device-adapter-bytes {config.device_adapter_bytes} does not fit beside the model: lower it"
        ) from error


def _attention_kernels(
    config: EngineConfig, model: LoadedModel, max_model_len: int
) -> attention_kernels.AttentionBackend | None:
    """The kernel backend of the model's layers, or None for the torch path."""
    implementation = config.attention_implementation or ("triton" if model.device.type == "cuda" else "torch")
    if implementation == "torch":
        return None
    tables = config.max_num_seqs * -(-max_model_len // config.block_size)
    try:
        return attention_kernels.make_backend(
            [attention_kernels.AttentionShape(a.heads, a.kv_heads, a.k_dim, a.v_dim) for a in model.attention],
            dtype=model.dtype,
            device=model.device,
            block_size=config.block_size,
            limits=attention_kernels.AttentionLimits(config.max_batched_tokens, config.max_num_seqs, tables),
            tiles_only=config.deterministic,
            implementation=implementation,
        )
    except ValueError as error:
        remedy = "" if implementation == "flashinfer" else "; use --attention-implementation torch"
        raise UnsupportedModelError(f"{error}{remedy}") from error


def _attention_path(
    config: EngineConfig, model: LoadedModel, num_blocks: int, kernels: attention_kernels.AttentionBackend | None
) -> AttentionPath:
    """The caches of all layers."""
    path: AttentionPath
    if kernels is not None:
        path = KernelAttention(model.attention, kernels, num_blocks=num_blocks, dtype=model.dtype, device=model.device)
    else:
        use_workspace = config.decode_workspace and model.device.type == "cpu"
        path = TorchAttention(
            model.attention,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=model.dtype,
            device=model.device,
            workspace_tokens=num_blocks * config.block_size // 2 if use_workspace else 0,
            compute=InvariantMath() if config.deterministic else None,
        )
    if config.compile_layers:
        keep_caches_out(path.layers)
    return path


def _count_blocks(
    config: EngineConfig,
    model: LoadedModel,
    max_model_len: int,
    backend: LoraBackend,
    kernels: attention_kernels.AttentionBackend | None,
) -> int:
    """The number of KV blocks that the budget holds. Raises UnsupportedModelError when one sequence cannot fit."""
    per_block = model.kv_bytes_per_token * config.block_size
    needed = -(-max_model_len // config.block_size)
    budget = config.kv_cache_bytes
    if budget is None:
        budget = DEFAULT_KV_BYTES_CPU
        if model.device.type == "cuda":
            budget = _device_kv_bytes(config, model, max_model_len, backend, kernels)
        budget = min(budget, per_block * needed * config.max_num_seqs)
    blocks = max(budget, 0) // per_block
    if blocks < needed:
        shorter = f"lower --max-model-len to {blocks * config.block_size} or " if blocks else ""
        raise UnsupportedModelError(
            f"one sequence of {max_model_len} tokens needs {needed * per_block} bytes of KV cache, the budget "
            f"is {max(budget, 0)}: {shorter}raise --kv-cache-bytes"
        )
    return blocks


def _device_kv_bytes(
    config: EngineConfig,
    model: LoadedModel,
    max_model_len: int,
    backend: LoraBackend,
    kernels: attention_kernels.AttentionBackend | None,
) -> int:
    """What a card has left for the KV cache beside weights, adapters and the largest step, which is run once."""
    size = config.block_size
    chunks = largest_prefill(config.max_batched_tokens, max_model_len, config.max_num_seqs, size)
    path = _attention_path(config, model, sum(len(c.seq.blocks) for c in chunks), kernels)
    runner = Runner(model, backend, path, block_size=size)
    try:
        step = measure_step(runner, chunks)
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            f"a step of {config.max_batched_tokens} tokens does not fit beside the model: lower --max-batched-tokens "
            "or --device-adapter-bytes"
        ) from error
    model.detach()
    del runner, path
    total, used = memory_in_use(model.device)
    return kv_bytes_left(total=total, used=used, step=step, utilization=config.gpu_memory_utilization)
