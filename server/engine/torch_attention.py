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
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Ints

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
        self._row_of: dict[Sequence, int] = {}
        self._seqs: tuple[Sequence, ...] = ()
        self._rows: Ints = np.zeros(0, dtype=np.int64)
        self._filled: Ints = np.zeros(0, dtype=np.int64)

    def place(self, seqs: tuple[Sequence, ...], ends: Ints) -> tuple[Ints, Ints] | None:
        """(row, tokens already in it) of each decode, whose contexts are `ends` with the query included; None when the
        padding would cost too much.

        Rows of sequences that are not decoding now are free; a new sequence takes the lowest free row.
        """
        if seqs != self._seqs:
            self._assign(seqs)
        if not seqs:
            return None
        rows, longest = self._rows, -(-int(ends.max()) // self.WIDTH_STEP) * self.WIDTH_STEP
        if not longest <= self.width <= 2 * longest:
            self.width = longest
            self._filled[:] = 0
        height = int(rows.max()) + 1
        if height * self.width > min(self.max_tokens, 4 * int(ends.sum()) + 2 * self.WIDTH_STEP * height):
            self._assign(())
            return None
        held = np.where(self._filled[rows] == ends - 1, ends - 1, 0)
        self._filled[rows] = ends
        return rows, held

    def _assign(self, seqs: tuple[Sequence, ...]) -> None:
        """Rows for these sequences and no others."""
        kept = {seq: self._row_of[seq] for seq in seqs if seq in self._row_of}
        if any(row >= 2 * len(seqs) for row in kept.values()):
            kept = {}
        taken = set(kept.values())
        free = (row for row in range(2 * len(seqs)) if row not in taken)
        filled = np.zeros(2 * len(seqs), dtype=np.int64)
        for row in taken:
            filled[row] = self._filled[row]
        self._row_of = {seq: kept[seq] if seq in kept else next(free) for seq in seqs}
        self._rows = np.array(list(self._row_of.values()), dtype=np.int64)
        self._seqs, self._filled = seqs, filled


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

    def __init__(self, path: "TorchAttention", k: Tensor, v: Tensor, workspace_tokens: int = 0) -> None:
        self._path = path
        self.block_size = k.shape[1]
        self.k, self.v = k, v
        self._work_k = k.new_zeros(workspace_tokens, *k.shape[2:])
        self._work_v = v.new_zeros(workspace_tokens, *v.shape[2:])

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
        sizes = [(shape.kv_heads, dim) for shape in shapes for dim in (shape.k_dim, shape.v_dim)]
        # Caches of one size are slices of one tensor, so that a block of all layers is cleared at once.
        self._caches = {
            size: torch.zeros(sizes.count(size), num_blocks, block_size, *size, dtype=dtype, device=device)
            for size in dict.fromkeys(sizes)
        }
        unused = {size: iter(caches) for size, caches in self._caches.items()}
        self.layers: list[TorchLayer] = [
            TorchLayer(self, next(unused[k]), next(unused[v]), workspace_tokens)
            for k, v in zip(sizes[::2], sizes[1::2], strict=True)
        ]

    def begin(self, places: StepPlaces, *, decode_rows: int | None = None) -> None:
        """See `AttentionPath.begin`; this path pads nothing."""
        if decode_rows is not None:
            raise ValueError("the torch attention path does not pad decode steps")
        n, ends = places.singles, places.ends
        placed = None if self._workspace is None else self._workspace.place(places.seqs[:n], ends[:n])
        prefills, first = [], n
        for i in range(n, len(ends)):
            end, length = int(ends[i]), int(places.lengths[i])
            blocks = torch.from_numpy(self._table(places, i, end)).to(self._device) if end > length else None
            prefills.append(PrefillPiece(first, first + length, end, blocks))
            first += length
        self.step = AttentionStep(
            slot_mapping=torch.from_numpy(places.slots).to(self._device),
            num_decodes=n,
            groups=[] if placed is not None else self._groups(places, n),
            rows=None
            if placed is None or self._workspace is None
            else self._rows(places, *placed, self._workspace.width),
            prefills=prefills,
        )

    def _table(self, places: StepPlaces, number: int, tokens: int) -> Ints:
        """The blocks that hold the first tokens of a sequence."""
        return np.array(places.tables[number][: math.ceil(tokens / self._block_size)], dtype=np.int64)

    def end(self) -> None:
        """See `AttentionPath.end`."""
        self.step = None

    @torch.inference_mode()
    def clear(self, blocks: Seq[int]) -> None:
        """Zeroes the blocks in all layers: masked attention still multiplies what lies behind a sequence's end."""
        index = torch.tensor(blocks, device=self._device)
        for caches in self._caches.values():
            caches.index_fill_(1, index, 0)

    def _rows(self, places: StepPlaces, rows: Ints, held: Ints, width: int) -> DecodeRows:
        """The workspace's rows of the decodes, which hold so many tokens."""
        device, ends = self._device, places.ends[: len(rows)]
        lens = np.ones(int(rows.max()) + 1, dtype=np.int64)
        lens[rows] = ends
        refill = []
        for i in np.flatnonzero(held == 0).tolist():
            tokens = int(ends[i]) - 1
            refill.append((int(rows[i]), torch.from_numpy(self._table(places, i, tokens)).to(device), tokens))
        return DecodeRows(
            rows=torch.from_numpy(rows).to(device),
            columns=torch.from_numpy(ends - 1).to(device),
            lens=torch.from_numpy(lens).to(device),
            refill=refill,
            width=width,
            read=-(-int(ends.max()) // READ_STEP) * READ_STEP,
        )

    def _groups(self, places: StepPlaces, count: int) -> list[DecodeGroup]:
        """Decodes by powers of two of their context, those up to 128 together: padding is within 2x or 128 tokens."""
        device, ends = self._device, places.ends[:count]
        _, classes = np.frexp(np.maximum(64, ends - 1))
        groups = []
        for number in np.unique(classes).tolist():
            members = np.flatnonzero(classes == number)
            lens = ends[members]
            # Padding reads a block of the sequence's own, which is finite.
            blocks = places.tables.padded(members, -(-lens // self._block_size))
            groups.append(DecodeGroup(
                tokens=None if len(members) == count else torch.from_numpy(members).to(device),
                blocks=torch.from_numpy(blocks).to(device),
                lens=torch.from_numpy(lens).to(device),
            ))  # fmt: skip
        return groups
