"""The LoRA backend of `--deterministic`: the same arguments as `kernels.lora.make_backend`, other products."""

from collections.abc import Sequence
from typing import Any

import torch

from loramux.kernels.lora import Implementation, LoraBackend, Site
from loramux.kernels.lora.modules import SetLimits
from loramux.kernels.lora.table import table_for


def make_invariant_backend(
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
    """A backend whose terms have the same bits in any batch. Raises ValueError for torch on a card, and elsewhere for
    triton, as `make_backend` does."""
    device = torch.device(device)
    limits = SetLimits(max_tokens=max_tokens, max_set_size=max_set_size, max_set_rank=max_set_rank)
    common: dict[str, Any] = {
        "dtype": dtype, "device": device, "budget_bytes": budget_bytes, "max_slots": max_slots, "limits": limits,
    }  # fmt: skip
    if (implementation or ("triton" if device.type == "cuda" else "torch")) == "torch":
        from .torch_lora import InvariantTorchLoraBackend

        return InvariantTorchLoraBackend(sites, **common)
    from .triton_lora import InvariantTritonLoraBackend

    table = table_for(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    return InvariantTritonLoraBackend(sites, table=table, fold=False, **common)
