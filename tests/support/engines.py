"""An engine core in this process, driven to the end."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.protocol import AdapterRef, EngineOutput, EngineRequest, SamplingParams

MAX_STEPS = 20_000


def make_core(model_dir: Path, blob_dir: Path, **overrides: Any) -> EngineCore:
    """A float32 CPU core with small limits, so that chunking and batching happen with short prompts."""
    settings: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_batched_tokens": 48, "block_size": 4,
        "kv_cache_bytes": 8 << 20, "device_adapter_bytes": 64 << 20, "host_adapter_bytes": 64 << 20, "threads": 1,
    }  # fmt: skip
    settings.update(overrides)
    return EngineCore(EngineConfig(model_path=str(model_dir), blob_dir=str(blob_dir), **settings))


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int, adapters: Iterable[tuple[str, float]] = (), **sampling: Any
) -> EngineRequest:
    """A greedy request unless `sampling` says otherwise."""
    salt = sampling.pop("salt", "")
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling})
    return EngineRequest(request_id, tuple(prompt), params, tuple(AdapterRef(d, w) for d, w in adapters), salt)


def drain(core: EngineCore) -> dict[str, list[EngineOutput]]:
    """Steps until nothing is left; outputs by request, in order."""
    found: dict[str, list[EngineOutput]] = {}
    for _ in range(MAX_STEPS):
        if not core.has_work():
            return found
        for output in core.step().outputs:
            found.setdefault(output.request_id, []).append(output)
        if core.is_waiting_only():
            time.sleep(0.001)  # adapters are on their way: leave the loader's thread the processor
    raise RuntimeError(f"the engine still has work after {MAX_STEPS} steps")


def tokens_of(outputs: Iterable[EngineOutput]) -> list[int]:
    """All tokens of one request's outputs."""
    return [t for output in outputs for t in output.token_ids]
