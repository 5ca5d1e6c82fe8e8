"""Paged attention behind transformers' attention interface.

The model's own code computes q, k and v and calls the function registered here; keys and values of the step's tokens
are written to the layer's blocks and every token attends to its own sequence's tokens up to itself. This is the plain
torch path: gathered pages and `scaled_dot_product_attention`, or explicit products where the model asks for a soft-cap
or attention sinks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from loramux.kernels.lora.interface import LoraPlan

ATTENTION_NAME = "loramux_paged"
LAYER_ATTRIBUTE = "loramux_layer"


@dataclass(slots=True)
class PrefillPiece:
    """Query tokens [start, end) of the step belong to one sequence whose context ends with them.

    `context` is the number of the sequence's tokens up to and including the last query. `blocks` int64 are its blocks;
    None when the queries are the whole context, so that keys and values need not be read back.
    """

    start: int
    end: int
    context: int
    blocks: Tensor | None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """Bool [queries, context]: key j is visible to query i when j <= i and j > i - window."""
        if window not in self.masks:
            queries = torch.arange(self.context - (self.end - self.start), self.context, device=device).unsqueeze(1)
            keys = torch.arange(self.context, device=device)
            visible = keys <= queries
            if window is not None:
                visible &= keys > queries - window
            self.masks[window] = visible
        return self.masks[window]


@dataclass(slots=True)
class DecodeGroup:
    """Decodes of similar length whose pages are gathered together.

    `tokens` int64 [n] are positions in the step (None: the first n tokens), `blocks` int64 [n, width] their blocks
    padded with 0, `lens` int64 [n] their contexts, the query included.
    """

    tokens: Tensor | None
    blocks: Tensor
    lens: Tensor
    biases: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class DecodeRows:
    """Where each decode of the step lives in the layers' workspaces.

    `rows` int64 [num_decodes] names each sequence's row, `columns` its query's position. `lens` int64 [height] are
    the contexts by row (1 for rows that are not in use). `refill` lists (row, blocks, tokens) of rows that do not hold
    their sequence's earlier tokens yet; what lies behind those tokens is cleared. `width` is the columns of a row, of
    which the first `read` are attended to.
    """

    rows: Tensor
    columns: Tensor
    lens: Tensor
    refill: list[tuple[int, Tensor, int]]
    width: int
    read: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class AttentionStep:
    """What the attention of one step needs, the same for every layer.

    Tokens [0, num_decodes) are one query each of as many sequences, found either in the workspace (`rows`) or in
    gathered pages (`groups`); `prefills` covers the rest. `slot_mapping` int64 [tokens] is where each token's key and
    value go (block * block_size + offset).
    """

    slot_mapping: Tensor
    num_decodes: int
    groups: list[DecodeGroup]
    rows: DecodeRows | None
    prefills: list[PrefillPiece]


def _bias(biases: dict[int | None, Tensor], lens: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask [n, 1, 1, width]: 0 where a decode sees the key, -inf elsewhere; kept for the step's layers."""
    if window not in biases:
        keys, ends = torch.arange(width, device=lens.device), lens.unsqueeze(1)
        visible = keys < ends
        if window is not None:
            visible &= keys >= ends - window
        bias = torch.zeros(visible.shape, dtype=dtype, device=lens.device)
        biases[window] = bias.masked_fill_(~visible, float("-inf"))[:, None, None, :]
    return biases[window]


@dataclass(slots=True)
class StepState:
    """The step in progress, shared by reference with every replaced module of one model; never a global."""

    attention: AttentionStep | None = None
    lora: LoraPlan | None = None
    lora_rows: LoraPlan | None = None


class LayerCache:
    """One layer's paged keys and values: k [blocks, block_size, kv_heads, k_dim], v likewise with v_dim.

    `workspace_tokens` > 0 keeps a contiguous copy of the decoding sequences' keys and values beside the blocks, so
    that a decode step appends one token per sequence instead of gathering every page again (for the CPU, where the
    gather costs as much as the attention). It is one flat buffer of that many tokens, cut into rows of a step's width.
    """

    def __init__(self, state: StepState, num_blocks: int, block_size: int, kv_heads: int, k_dim: int, v_dim: int,
                 dtype: torch.dtype, device: torch.device, workspace_tokens: int = 0) -> None:  # fmt: skip
        self.state = state
        self.block_size = block_size
        self.k = torch.zeros(num_blocks, block_size, kv_heads, k_dim, dtype=dtype, device=device)
        self.v = torch.zeros(num_blocks, block_size, kv_heads, v_dim, dtype=dtype, device=device)
        self._work_k = torch.zeros(workspace_tokens, kv_heads, k_dim, dtype=dtype, device=device)
        self._work_v = torch.zeros(workspace_tokens, kv_heads, v_dim, dtype=dtype, device=device)

    def clear(self, blocks: Tensor) -> None:
        """Zeroes the blocks (int64) before their first use by a new holder."""
        self.k.index_fill_(0, blocks, 0)
        self.v.index_fill_(0, blocks, 0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
               softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [heads, tokens, k_dim], k and v [kv_heads, tokens, dim] -> [tokens, heads, v_dim]."""
        step = self.state.attention
        if step is None:
            raise RuntimeError("attention was called outside a step")
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        self.k.view(-1, *self.k.shape[2:]).index_copy_(0, step.slot_mapping, key)
        self.v.view(-1, *self.v.shape[2:]).index_copy_(0, step.slot_mapping, value)
        out = query.new_empty(query.shape[1], query.shape[0], self.v.shape[-1])
        shape = (scaling, window, softcap, sinks)
        d = step.num_decodes
        if step.rows is not None:
            out[:d] = self._decode_rows(step.rows, query[:, :d].transpose(0, 1), key[:d], value[:d], *shape)
        for group in step.groups:
            queries = query[:, :d] if group.tokens is None else query[:, group.tokens]
            found = self._decode_gathered(group, queries.transpose(0, 1), *shape)
            if group.tokens is None:
                out[:d] = found
            else:
                out[group.tokens] = found
        for piece in step.prefills:
            lo, hi = piece.start, piece.end
            if piece.blocks is None:
                k, v = key[lo:hi], value[lo:hi]
            else:
                k = self.k[piece.blocks].flatten(0, 1)[: piece.context]
                v = self.v[piece.blocks].flatten(0, 1)[: piece.context]
            out[lo:hi] = _prefill(piece, query[:, lo:hi], k, v, scaling, window, softcap, sinks)
        return out

    def _decode_gathered(self, group: DecodeGroup, query: Tensor, scaling: float, window: int | None,
                         softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, heads, dim] against its gathered pages -> [n, heads, v_dim]."""
        n, width = group.blocks.shape
        flat = group.blocks.flatten()
        k = self.k.index_select(0, flat).view(n, width * self.block_size, *self.k.shape[2:])
        v = self.v.index_select(0, flat).view(n, width * self.block_size, *self.v.shape[2:])
        bias = _bias(group.biases, group.lens, k.shape[1], window, query.dtype)
        return _decode(query, k, v, bias, scaling, softcap, sinks)

    def _decode_rows(self, rows: DecodeRows, query: Tensor, key: Tensor, value: Tensor, scaling: float,
                     window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, heads, dim] against the workspace, after this step's keys and values are appended to it."""
        height, used = len(rows.lens), len(rows.lens) * rows.width
        work_k = self._work_k[:used].view(height, rows.width, *self.k.shape[2:])
        work_v = self._work_v[:used].view(height, rows.width, *self.v.shape[2:])
        for row, blocks, tokens in rows.refill:
            work_k[row, :tokens] = self.k[blocks].flatten(0, 1)[:tokens]
            work_v[row, :tokens] = self.v[blocks].flatten(0, 1)[:tokens]
            work_k[row, tokens:] = 0
            work_v[row, tokens:] = 0
        work_k[rows.rows, rows.columns] = key
        work_v[rows.rows, rows.columns] = value
        placed = query.new_zeros(height, *query.shape[1:]).index_copy_(0, rows.rows, query)
        bias = _bias(rows.biases, rows.lens, rows.read, window, query.dtype)
        return _decode(
            placed, work_k[:, : rows.read], work_v[:, : rows.read], bias, scaling, softcap, sinks
        ).index_select(0, rows.rows)


def _decode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
            sinks: Tensor | None) -> Tensor:  # fmt: skip
    """q [n, heads, dim], k and v [n, width, kv_heads, dim], bias [n, 1, 1, width] -> [n, heads, v_dim].

    The query heads that share a key head are treated as that head's queries, so that keys are read once.
    """
    n, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(n, kv_heads, heads // kv_heads, dim)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
    else:
        shaped = None if sinks is None else sinks.view(1, kv_heads, heads // kv_heads, 1)
        out = _explicit(q, k, v, bias, scaling, softcap, shaped)
    return out.reshape(n, heads, -1)


def _prefill(piece: PrefillPiece, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
             softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
    """q [heads, t, dim], k and v [context, kv_heads, dim] -> [t, heads, v_dim]."""
    heads, tokens = q.shape[0], q.shape[1]
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    if window is not None and window >= piece.context:
        window = None
    if softcap is None and sinks is None:
        whole = tokens == piece.context and window is None
        mask = None if whole else piece.mask(window, q.device)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(0), k, v, attn_mask=mask, is_causal=whole, scale=scaling, enable_gqa=heads != kv_heads
        )[0]
        return out.transpose(0, 1)
    group = heads // kv_heads
    grouped = q.view(1, kv_heads, group, tokens, -1)
    bias = torch.zeros(tokens, piece.context, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(~piece.mask(window, q.device), float("-inf"))
    shaped = None if sinks is None else sinks.view(1, kv_heads, group, 1, 1)
    out = _explicit(grouped, k.unsqueeze(2), v.unsqueeze(2), bias, scaling, softcap, shaped)
    return out.reshape(heads, tokens, -1).transpose(0, 1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
              sinks: Tensor | None) -> Tensor:  # fmt: skip
    """softmax over [softcap * tanh(q k^T * scaling / softcap) + bias, sinks] times v; sinks only take weight."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + bias).float()
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        column = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)


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
