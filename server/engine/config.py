"""The engine's settings: a plain frozen dataclass, made by the server's settings class or by hand."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine is told at start. Sizes are in bytes or tokens; None lets the engine decide.

    `model_path` is a local directory in Hugging Face layout. `dtype` is float32, bfloat16, float16 or auto, which
    `loading.pick_dtype` decides; `device` is auto, cpu, cuda or cuda:N. `threads` bounds torch's intra-op threads.
    `blob_dir` holds canonical adapters.
    `packed_projections`, `enable_prefix_caching`, `decode_workspace`, `cuda_graphs` and `overlap` (of a step's host
    work with the device's work on the step before) are optimisations with plain twins; the output does not depend on
    them. `prepacked_weights` is one too (None: where memory allows), but it may round otherwise, as `compile_layers`
    does, which fuses the model's small operations by torch.compile.
    None switches graphs and overlap on where there is a card. `lora_implementation` and `attention_implementation` are
    torch, triton or None (by device); attention may be flashinfer, too, which is a package of its own. `lora_overlap`
    hides the adapters' first product on a card: on a side stream beside the base's product, or by launching the second
    one early (compute capability 9.0 on). `lora_fold` computes the second one inside the base's product: True wherever
    that can be, None where the card's launch table says that it was quicker.
    `log_level` and `log_format` are the engine process's; see `server/observability/logs.py`.
    `gpu_memory_utilization` is the share of a card's memory that the engine may fill.
    """

    model_path: str
    blob_dir: str
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    device_adapter_bytes: int = 1 << 30
    host_adapter_bytes: int = 4 << 30
    max_adapters_per_set: int = 8
    max_set_rank: int = 512
    max_device_adapters: int = 1024
    enable_prefix_caching: bool = True
    packed_projections: bool = True
    decode_workspace: bool = True
    max_queue: int = 1024
    max_queue_tokens: int = 2_000_000
    threads: int | None = None
    lora_implementation: Literal["torch", "triton"] | None = None
    lora_overlap: Literal["none", "stream", "launch"] = "none"
    lora_fold: bool | None = None
    attention_implementation: Literal["torch", "triton", "flashinfer"] | None = None
    cuda_graphs: bool | None = None
    overlap: bool | None = None
    gpu_memory_utilization: float = 0.9
    deterministic: bool = False
    compile_layers: bool = False
    prepacked_weights: bool | None = None
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        """Raises ValueError naming the field for values that no engine could run with."""
        positive = (
            "max_num_seqs", "max_batched_tokens", "block_size", "device_adapter_bytes", "host_adapter_bytes",
            "max_adapters_per_set", "max_set_rank", "max_device_adapters", "max_queue",
            "max_queue_tokens",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_model_len", "kv_cache_bytes", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs one token per step"
            )
        if self.lora_implementation not in (None, "torch", "triton"):
            raise ValueError(f"lora_implementation must be torch or triton, got {self.lora_implementation!r}")
        if self.attention_implementation not in (None, "torch", "triton", "flashinfer"):
            raise ValueError(
                f"attention_implementation must be torch, triton or flashinfer, got {self.attention_implementation!r}"
            )
        if self.lora_overlap not in ("none", "stream", "launch"):
            raise ValueError(f"lora_overlap must be none, stream or launch, got {self.lora_overlap!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for the process boundary."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def blob_path(self) -> Path:
        """`blob_dir` as a path."""
        return Path(self.blob_dir)
