"""Attention behind transformers' interface: what a layer and a step need, whatever carries it out.

The model's own code computes q, k and v and calls the function registered here, which hands them to the layer's cache.
`torch_attention` is the plain path, `kernel_attention` runs the Triton kernels.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from transformers import AttentionInterface

from loramux.kernels.attention.triton_plan import TableRows
from loramux.kernels.lora.interface import LoraPlan
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Ints

ATTENTION_NAME = "loramux_paged"
LAYER_ATTRIBUTE = "loramux_layer"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's attention was seen with."""

    module: nn.Module
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """The chunks of a step as arrays: their lengths and ends (tokens of their sequences); where each token's key and
    value go, `slots` [tokens], as block * block_size + offset; each sequence's blocks; and the sequences themselves.

    Chunks of one token come first.
    """

    lengths: Ints
    ends: Ints
    slots: Ints
    tables: TableRows
    seqs: tuple[Sequence, ...]

    @property
    def singles(self) -> int:
        """How many chunks have one token. Raises ValueError unless they come first."""
        count = int(np.count_nonzero(self.lengths == 1))
        if (self.lengths[:count] != 1).any():
            raise ValueError("single-token chunks come first")
        return count

    def followed_by(self, others: "StepPlaces") -> "StepPlaces":
        """These chunks, then the other ones."""
        return StepPlaces(
            np.concatenate([self.lengths, others.lengths]),
            np.concatenate([self.ends, others.ends]),
            np.concatenate([self.slots, others.slots]),
            self.tables.followed_by(others.tables),
            self.seqs + others.seqs,
        )


class LayerCache(Protocol):
    """One layer's paged keys and values."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
               softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [heads, tokens, k_dim], k and v [kv_heads, tokens, dim] -> [tokens, heads, v_dim]."""


class AttentionPath(Protocol):
    """The caches of all layers, and the step that they are in. Engine thread only."""

    @property
    def layers(self) -> Seq[LayerCache]:
        """The cache of each layer, in the order of the layers."""

    def begin(self, places: StepPlaces, *, decode_rows: int | None = None) -> None:
        """Prepares the step of these chunks.

        `decode_rows` pads a step of single tokens to that many rows (for captured graphs); the model's inputs then
        have as many. Raises ValueError where the path cannot.
        """

    def end(self) -> None:
        """The step is over: nothing of it is referred to any more."""

    def clear(self, blocks: Seq[int]) -> None:
        """Makes blocks that another holder filled harmless before their first use."""


@dataclass(slots=True)
class StepState:
    """The adapters of the step in progress, shared by reference with the projections of one model; never a global.

    `watched` names the sites whose input is wanted, and receives them.
    """

    lora: LoraPlan | None = None
    lora_rows: LoraPlan | None = None
    watched: dict[int, Tensor | None] | None = None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: q [1, heads, tokens, dim], k and v [1, kv_heads, tokens, dim].

    Returns ([1, tokens, heads, v_dim], None). The layer's cache hangs on the module as `loramux_layer`; other keyword
    arguments belong to other implementations, except those that change the result, which raise ValueError.
    """
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError("bidirectional attention is not supported")
    for name in ("position_bias", "head_mask", "indexer_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported")
    layer = getattr(module, LAYER_ATTRIBUTE)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query[0], key[0], value[0], scale, sliding_window, softcap, s_aux)
    return out.unsqueeze(0), None


def register_attention() -> None:
    """Makes the function known to transformers; no mask function is registered, so models build no mask."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
