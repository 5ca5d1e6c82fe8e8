"""Uploads made by hand: safetensors bytes, configurations, a small base model's structure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramux.adapters_store.base_spec import BaseSpec, LinearSpec
from loramux.adapters_store.store import AdapterStore, CommitResult

HIDDEN, INNER, LAYERS = 16, 24, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, 8),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]

BASE = BaseSpec(
    name="tiny-base",
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    vocab_size=32,
    linears={
        **{f"model.layers.{i}.{m}": LinearSpec(*shape) for i in range(LAYERS) for m, shape in SHAPES.items()},
        "lm_head": LinearSpec(HIDDEN, 32),
    },
    other_modules={"model.embed_tokens": "Embedding", "model.norm": "LlamaRMSNorm"},
)


def safetensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of (dtype, shape, bytes) by name, in the given order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(data for _, _, data in tensors.values())


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, as JSON unless it is bytes, whatever it says."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def values(shape: Sequence[int], seed: int = 0) -> bytes:
    """Small random float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4").tobytes()


def lora(rank: int = 4, targets: Sequence[str] = ("q_proj", "v_proj"), seed: int = 0) -> dict[str, Any]:
    """PEFT tensors for the targets in every layer of `BASE`."""
    found: dict[str, Any] = {}
    for module, spec in BASE.linears.items():
        if module.rpartition(".")[2] in targets:
            for part, shape in (("A", (rank, spec.in_features)), ("B", (spec.out_features, rank))):
                seed += 1
                key = f"base_model.model.{module}.lora_{part}.weight"
                found[key] = ("F32", shape, values(shape, seed))
    return found


def config(**changes: Any) -> bytes:
    """A plain PEFT configuration of rank 4, with changes; a change to `...` removes the key."""
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/tiny-base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    plain.update(changes)
    return json.dumps({k: v for k, v in plain.items() if v is not ...}).encode()


def upload(
    store: AdapterStore,
    name: str = "a",
    configuration: bytes | None = None,
    weights: bytes | None = None,
    piece: int = 1000,
    **options: Any,
) -> CommitResult:
    """Uploads in small pieces and commits."""
    files = {
        "adapter_config.json": config() if configuration is None else configuration,
        "adapter_model.safetensors": safetensors(lora()) if weights is None else weights,
    }
    with store.begin_upload() as parts:
        for filename, data in files.items():
            sink = parts.open_file(filename)
            for start in range(0, len(data), piece):
                sink.write(data[start : start + piece])
            sink.close()
        return store.commit(parts, name=name, **options)


def snapshot(root: Path) -> dict[str, bytes]:
    """Blobs and uploads as they are on disk."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("blobs", "uploads")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
