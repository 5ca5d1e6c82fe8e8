"""Paged attention: KV write, prefill against a cached prefix, and decode, over blocks that the engine owns."""

from collections.abc import Sequence
from typing import Literal

import torch

from .interface import AttentionBackend, AttentionBatch, AttentionLimits, AttentionPlan, AttentionShape
from .reference import attend_reference, write_reference

__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionLimits",
    "AttentionPlan",
    "AttentionShape",
    "attend_reference",
    "make_backend",
    "write_reference",
]


def make_backend(
    shapes: Sequence[AttentionShape],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    block_size: int,
    limits: AttentionLimits,
    tiles_only: bool = False,
    implementation: Literal["triton", "flashinfer"] = "triton",
) -> AttentionBackend:
    """The backend for a model whose layers have these shapes. Triton on a CPU runs only under its interpreter.

    `tiles_only` runs decodes through the prefill kernel, without splits: a token's result then has the same bits
    whether it is computed alone or with others of its sequence.
    `implementation` flashinfer needs that library, and serves fewer shapes: see `flashinfer_backend`.
    Raises ValueError for a dtype, device or shape that the implementation does not serve.
    """
    if implementation == "flashinfer":
        if tiles_only:
            raise ValueError("flashinfer's results depend on the batch: use --attention-implementation triton")
        from .flashinfer_backend import FlashInferAttentionBackend

        return FlashInferAttentionBackend(
            shapes, dtype=dtype, device=torch.device(device), block_size=block_size, limits=limits
        )
    from .triton_backend import TritonAttentionBackend

    return TritonAttentionBackend(
        shapes, dtype=dtype, device=torch.device(device), block_size=block_size, limits=limits,
        tiles_only=tiles_only,
    )  # fmt: skip
