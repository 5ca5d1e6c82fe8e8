"""Segmented LoRA: y[t] += sum_i w_i s_i B_i A_i x[t] for the adapters i of the token's set."""

from collections.abc import Sequence
from typing import Literal

import torch

from .interface import ArenaFullError, LoraBackend, LoraPlan, ModuleWeights, Overlap, Segment, Site, SiteSlice
from .modules import SetLimits
from .reference import add_reference, scale_input_reference
from .table import LaunchTable, table_for

Implementation = Literal["torch", "triton"]

__all__ = [
    "ArenaFullError",
    "Implementation",
    "LaunchTable",
    "LoraBackend",
    "LoraPlan",
    "ModuleWeights",
    "Overlap",
    "Segment",
    "Site",
    "SiteSlice",
    "add_reference",
    "make_backend",
    "scale_input_reference",
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
    overlap: Overlap = "none",
    fold: bool | None = None,
    table: LaunchTable | None = None,
) -> LoraBackend:
    """The backend for a model's sites: Triton on CUDA, torch elsewhere, unless `implementation` says otherwise.

    `budget_bytes` bounds the adapters' memory, `max_slots` their number, `max_tokens` a step, `max_set_size` and
    `max_set_rank` the adapters of one set and the sum of their ranks. Triton on a CPU runs only under its interpreter.
    `overlap`, `fold` (the expand into the base product: True wherever it can be, None where the table says that it is
    quicker) and `table` (default: the one shipped for the card) are for Triton alone. Raises ValueError for what the
    implementation does not serve.
    """
    device = torch.device(device)
    limits = SetLimits(max_tokens=max_tokens, max_set_size=max_set_size, max_set_rank=max_set_rank)
    if implementation is None:
        implementation = "triton" if device.type == "cuda" else "torch"
    if implementation == "torch":
        if overlap != "none" or fold or table is not None:
            raise ValueError("overlap, fold and table need the triton implementation")
        from .torch_backend import TorchLoraBackend

        return TorchLoraBackend(
            sites, dtype=dtype, device=device, budget_bytes=budget_bytes, max_slots=max_slots, limits=limits
        )
    from .triton_backend import TritonLoraBackend

    if table is None:
        table = table_for(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    return TritonLoraBackend(
        sites, dtype=dtype, device=device, budget_bytes=budget_bytes, max_slots=max_slots, limits=limits, table=table,
        overlap=overlap, fold=fold,
    )  # fmt: skip
