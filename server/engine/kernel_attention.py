"""Paged attention by a kernel backend: caches per layer, one plan per step for all of them."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from loramux.kernels.attention import AttentionBackend, AttentionBatch, AttentionPlan
from loramux.server.engine.attention import LayerShape, StepPlaces


class KernelLayer:
    """One layer's paged keys and values: k [blocks, block_size, kv_heads, k_dim], v likewise with v_dim."""

    def __init__(self, path: "KernelAttention", num_blocks: int, shape: LayerShape, dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        self._path = path
        size = (num_blocks, path.backend.block_size, shape.kv_heads)
        self.k = torch.zeros(*size, shape.k_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*size, shape.v_dim, dtype=dtype, device=device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
               softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """See `LayerCache.attend`."""
        plan = self._path.plan
        if plan is None:
            raise RuntimeError("attention was called outside a step")
        backend = self._path.backend
        backend.write(self.k, self.v, key.transpose(0, 1), value.transpose(0, 1), plan)
        return backend.attend(query.transpose(0, 1), self.k, self.v, plan, scaling, window, softcap, sinks)


class KernelAttention:
    """The caches of all layers over one `AttentionBackend`; the contract is `attention.AttentionPath`."""

    def __init__(self, shapes: Seq[LayerShape], backend: AttentionBackend, *, num_blocks: int, dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        self.backend = backend
        self.plan: AttentionPlan | None = None
        self.layers = [KernelLayer(self, num_blocks, shape, dtype, device) for shape in shapes]

    def begin(self, places: StepPlaces, *, decode_rows: int | None = None) -> None:
        """See `AttentionPath.begin`."""
        batch = AttentionBatch(
            query_lens=places.lengths, contexts=places.ends, tables=places.tables, slots=places.slots
        )
        self.plan = self.backend.plan(batch, decode_rows=decode_rows)

    def end(self) -> None:
        """See `AttentionPath.end`."""
        self.plan = None

    def clear(self, blocks: Seq[int]) -> None:
        """Nothing: the kernels do not read what lies behind a sequence's end."""
