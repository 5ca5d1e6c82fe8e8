"""Segmented LoRA: y[t] += sum_i w_i s_i B_i A_i x[t] for the adapters i of the token's set."""

from collections.abc import Sequence
from typing import Literal

import torch

from .interface import ArenaFullError, LoraBackend, LoraPlan, ModuleWeights, Segment, Site, SiteSlice
from .modules import SetLimits
from .reference import add_reference

Implementation = Literal["torch", "triton"]

__all__ = [
    "ArenaFullError",
    "Implementation",
    "LoraBackend",
    "LoraPlan",
    "ModuleWeights",
    "Segment",
    "Site",
    "SiteSlice",
    "add_reference",
    "make_backend",
]


def make_backend(
    sites: Sequence[Site],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    budget_bytes: int,
    max_slots: int,
    max_tokens: int,
    max_set_size: int = 8,
    max_set_rank: int = 512,
    implementation: Implementation | None = None,
) -> LoraBackend:
    """The backend for a model's sites: Triton on CUDA, torch elsewhere, unless `implementation` says otherwise.

    `budget_bytes` bounds the adapters' memory, `max_slots` their number, `max_tokens` a step, `max_set_size` and
    `max_set_rank` the adapters of one set and the sum of their ranks. Triton on a CPU runs only under its interpreter.
    """
    device = torch.device(device)
    limits = SetLimits(max_tokens=max_tokens, max_set_size=max_set_size, max_set_rank=max_set_rank)
    if implementation is None:
        implementation = "triton" if device.type == "cuda" else "torch"
    if implementation == "torch":
        from .torch_backend import TorchLoraBackend

        return TorchLoraBackend(
            sites, dtype=dtype, device=device, budget_bytes=budget_bytes, max_slots=max_slots, limits=limits
        )
    from .triton_backend import TritonLoraBackend

    return TritonLoraBackend(
        sites, dtype=dtype, device=device, budget_bytes=budget_bytes, max_slots=max_slots, limits=limits
    )
