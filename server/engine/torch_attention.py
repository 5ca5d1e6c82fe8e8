"""Paged attention in plain torch: gathered pages, or a contiguous workspace of the decodes, and SDPA.

Models that ask for a soft-cap or attention sinks get explicit products instead of `scaled_dot_product_attention`.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loramux.server.engine.attention import LayerShape, StepPlaces
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence

READ_STEP = 16


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


class WorkspaceRows:
    """Which decoding sequence has which row of the decode workspace, and how many of its tokens are in it.

    A step sees the workspace as [rows, width] with rows * width <= max_tokens; a new width moves every row, so all
    are filled again. Widths are multiples of `WIDTH_STEP`, which makes that rare.
    """

    WIDTH_STEP = 64

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.width = 0
        self._rows: dict[Sequence, int] = {}
        self._filled: dict[Sequence, int] = {}

    def place(self, decodes: Seq[Chunk]) -> list[tuple[int, int]] | None:
        """For each decode its row and the tokens already in it; None when the padding would cost too much.

        Rows of sequences that are not decoding now are free; a new sequence takes the lowest free row.
        """
        present = {c.seq for c in decodes}
        for gone in [seq for seq in self._rows if seq not in present]:
            del self._rows[gone], self._filled[gone]
        if not decodes:
            return None
        if any(row >= 2 * len(decodes) for row in self._rows.values()):
            self._forget()
        longest = -(-max(c.end for c in decodes) // self.WIDTH_STEP) * self.WIDTH_STEP
        if not longest <= self.width <= 2 * longest:
            self.width = longest
            self._filled = dict.fromkeys(self._filled, 0)
        height = max(len(decodes), max(self._rows.values(), default=-1) + 1)
        if height * self.width > min(self.max_tokens, 4 * sum(c.end for c in decodes) + 2 * self.WIDTH_STEP * height):
            self._forget()
            return None
        taken = set(self._rows.values())
        free = (row for row in range(2 * len(decodes)) if row not in taken)
        placed = []
        for chunk in decodes:
            if chunk.seq not in self._rows:
                self._rows[chunk.seq] = next(free)
                self._filled[chunk.seq] = 0
            held = self._filled[chunk.seq] if self._filled[chunk.seq] == chunk.start else 0
            placed.append((self._rows[chunk.seq], held))
            self._filled[chunk.seq] = chunk.end
        return placed

    def _forget(self) -> None:
        self._rows.clear()
        self._filled.clear()


class AttentionMath(Protocol):
    """softmax(q k^T) v once keys and values are gathered."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
               sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, heads, dim], k and v [n, width, kv_heads, dim], bias [n, 1, 1, width] -> [n, heads, v_dim]."""

    def prefill(self, piece: PrefillPiece, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
                softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [heads, t, dim], k and v [context, kv_heads, dim] -> [t, heads, v_dim]."""


class TorchLayer:
    """One layer's paged keys and values: k [blocks, block_size, kv_heads, k_dim], v likewise with v_dim.

    `workspace_tokens` > 0 keeps a contiguous copy of the decoding sequences' keys and values beside the blocks, so
    that a decode step appends one token per sequence instead of gathering every page again (for the CPU, where the
    gather costs as much as the attention). It is one flat buffer of that many tokens, cut into rows of a step's width.
    """

    def __init__(self, path: "TorchAttention", num_blocks: int, block_size: int, shape: LayerShape,
                 dtype: torch.dtype, device: torch.device, workspace_tokens: int = 0) -> None:  # fmt: skip
        self._path = path
        self.block_size = block_size
        keys, values = (shape.kv_heads, shape.k_dim), (shape.kv_heads, shape.v_dim)
        self.k = torch.zeros(num_blocks, block_size, *keys, dtype=dtype, device=device)
        self.v = torch.zeros(num_blocks, block_size, *values, dtype=dtype, device=device)
        self._work_k = torch.zeros(workspace_tokens, *keys, dtype=dtype, device=device)
        self._work_v = torch.zeros(workspace_tokens, *values, dtype=dtype, device=device)

    def clear(self, blocks: Tensor) -> None:
        """Zeroes the blocks (int64) before their first use by a new holder."""
        self.k.index_fill_(0, blocks, 0)
        self.v.index_fill_(0, blocks, 0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
               softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [heads, tokens, k_dim], k and v [kv_heads, tokens, dim] -> [tokens, heads, v_dim]."""
        step = self._path.step
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
            out[lo:hi] = self._path.compute.prefill(piece, query[:, lo:hi], k, v, scaling, window, softcap, sinks)
        return out

    def _decode_gathered(self, group: DecodeGroup, query: Tensor, scaling: float, window: int | None,
                         softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, heads, dim] against its gathered pages -> [n, heads, v_dim]."""
        n, width = group.blocks.shape
        flat = group.blocks.flatten()
        k = self.k.index_select(0, flat).view(n, width * self.block_size, *self.k.shape[2:])
        v = self.v.index_select(0, flat).view(n, width * self.block_size, *self.v.shape[2:])
        bias = _bias(group.biases, group.lens, k.shape[1], window, query.dtype)
        return self._path.compute.decode(query, k, v, bias, scaling, softcap, sinks)

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
        return self._path.compute.decode(
            placed, work_k[:, : rows.read], work_v[:, : rows.read], bias, scaling, softcap, sinks
        ).index_select(0, rows.rows)


class FusedMath:
    """`scaled_dot_product_attention`, or explicit products for a soft-cap or sinks."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
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

    def prefill(self, piece: PrefillPiece, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
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


class TorchAttention:
    """The caches of all layers and the plain path over them; the contract is `attention.AttentionPath`.

    Of requests it remembers only where their keys lie in the decode workspace.
    """

    def __init__(self, shapes: Seq[LayerShape], *, num_blocks: int, block_size: int, dtype: torch.dtype,
                 device: torch.device, workspace_tokens: int = 0,
                 compute: AttentionMath | None = None) -> None:  # fmt: skip
        """`workspace_tokens` 0 gathers every page in every step. `compute` is `FusedMath` unless given."""
        self.step: AttentionStep | None = None
        self.compute: AttentionMath = compute or FusedMath()
        self._block_size = block_size
        self._device = device
        self._workspace = WorkspaceRows(workspace_tokens) if workspace_tokens else None
        self.layers: list[TorchLayer] = [
            TorchLayer(self, num_blocks, block_size, shape, dtype, device, workspace_tokens) for shape in shapes
        ]

    def begin(self, chunks: Seq[Chunk], places: StepPlaces, *, decode_rows: int | None = None) -> None:
        """See `AttentionPath.begin`; this path pads nothing."""
        if decode_rows is not None:
            raise ValueError("the torch attention path does not pad decode steps")
        decodes = [c for c in chunks if c.end - c.start == 1]
        n = len(decodes)
        if any(c.end - c.start == 1 for c in chunks[n:]):
            raise ValueError("single-token chunks come first")
        placed = None if self._workspace is None else self._workspace.place(decodes)
        prefills, first = [], n
        for c in chunks[n:]:
            blocks = None
            if c.start:
                blocks = torch.tensor(c.seq.blocks[: math.ceil(c.end / self._block_size)], device=self._device)
            prefills.append(PrefillPiece(first, first + c.end - c.start, c.end, blocks))
            first += c.end - c.start
        self.step = AttentionStep(
            slot_mapping=torch.from_numpy(places.slots).to(self._device),
            num_decodes=n,
            groups=[] if placed is not None else self._groups(decodes),
            rows=None
            if placed is None or self._workspace is None
            else self._rows(decodes, placed, self._workspace.width),
            prefills=prefills,
        )

    def end(self) -> None:
        """See `AttentionPath.end`."""
        self.step = None

    @torch.inference_mode()
    def clear(self, blocks: Seq[int]) -> None:
        """Zeroes the blocks in all layers: masked attention still multiplies what lies behind a sequence's end."""
        index = torch.tensor(blocks, device=self._device)
        for layer in self.layers:
            layer.clear(index)

    def _rows(self, decodes: Seq[Chunk], placed: Seq[tuple[int, int]], width: int) -> DecodeRows:
        device = self._device
        lens = np.ones(max(row for row, _ in placed) + 1, dtype=np.int64)
        refill = []
        for chunk, (row, held) in zip(decodes, placed, strict=True):
            lens[row] = chunk.end
            if held == 0:
                blocks = chunk.seq.blocks[: math.ceil(chunk.start / self._block_size)]
                refill.append((row, torch.tensor(blocks, dtype=torch.long, device=device), chunk.start))
        return DecodeRows(
            rows=torch.tensor([row for row, _ in placed], device=device),
            columns=torch.tensor([c.start for c in decodes], device=device),
            lens=torch.from_numpy(lens).to(device),
            refill=refill,
            width=width,
            read=-(-int(lens.max()) // READ_STEP) * READ_STEP,
        )

    def _groups(self, decodes: Seq[Chunk]) -> list[DecodeGroup]:
        """Decodes by powers of two of their context, those up to 128 together: padding is within 2x or 128 tokens."""
        device = self._device
        classes: dict[int, list[int]] = {}
        for i, chunk in enumerate(decodes):
            classes.setdefault(max(64, chunk.end - 1).bit_length(), []).append(i)
        groups = []
        for members in classes.values():
            width = max(math.ceil(decodes[i].end / self._block_size) for i in members)
            blocks = np.zeros((len(members), width), dtype=np.int64)
            for row, i in enumerate(members):
                own = decodes[i].seq.blocks[: math.ceil(decodes[i].end / self._block_size)]
                blocks[row] = own[0]  # padding reads a block of the sequence's own, which is finite
                blocks[row, : len(own)] = own
            everyone = len(members) == len(decodes)
            groups.append(DecodeGroup(
                tokens=None if everyone else torch.tensor(members, device=device),
                blocks=torch.from_numpy(blocks).to(device),
                lens=torch.tensor([decodes[i].end for i in members], device=device),
            ))  # fmt: skip
        return groups
