"""softmax(q k^T) v on the CPU with one order of summation per query, whatever is computed beside it.

Keys are cut into blocks of `KEYS` that begin at multiples of it. For a query and each block n of its sequence, with
m the largest of all visible scores u (and of the sink):

    p_n = exp(u_n - m),   out = (sum_n p_n v_n) / (sum_n sum(p_n) + exp(sink - m))

The products of a block are `BatchedTiles`, so neither other queries nor other sequences change their bits; sums over n
go in ascending order, and blocks that a query does not see add zeros. A decode, a chunk and a whole prompt are the same
operations on the same numbers. All of it is float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from loramux.kernels.dense.torch_tiles import BatchedTiles
from loramux.server.engine.torch_attention import PrefillPiece

KEYS = 128
_ELEMENTS = 1 << 22
"""Elements of the largest intermediate tensor; sequences and queries are taken in parts that stay below it."""
_QUERIES = 128


class InvariantMath:
    """The contract is `torch_attention.AttentionMath`. Products are tried at the first use of a head dim."""

    def __init__(self) -> None:
        self._products: dict[tuple[int, int, bool], BatchedTiles] = {}

    def decode(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
               sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, heads, dim], k and v [n, width, kv_heads, dim], bias [n, 1, 1, width] -> [n, heads, v_dim]."""
        n, heads, _ = q.shape
        width, kv_heads = k.shape[1:3]
        queries = q.view(n, kv_heads, heads // kv_heads, -1)
        # A product of few rows is padded to sixteen or fewer, so a sequence has that many rows of scores.
        part = max(1, _ELEMENTS // (width * kv_heads * max(16, heads // kv_heads, q.shape[2], v.shape[3])))
        found = [
            self._attend(queries[i : i + part], k[i : i + part], v[i : i + part], bias[i : i + part, 0].float(),
                         scaling, softcap, sinks)
            for i in range(0, n, part)
        ]  # fmt: skip
        return torch.cat(found).view(n, heads, -1).to(q.dtype)

    def prefill(self, piece: PrefillPiece, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
                softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [heads, t, dim], k and v [context, kv_heads, dim] -> [t, heads, v_dim]."""
        heads, tokens, _ = q.shape
        kv_heads = k.shape[1]
        group = heads // kv_heads
        out = q.new_empty(tokens, heads, v.shape[2])
        part = min(_QUERIES, max(1, _ELEMENTS // (heads * piece.context)))
        visible = piece.mask(window, q.device)
        for low in range(0, tokens, part):
            high = min(low + part, tokens)
            end = piece.context - tokens + high
            begin = 0 if window is None else max(0, end - (high - low) - window + 1) // KEYS * KEYS
            bias = torch.zeros(high - low, end - begin)
            bias = bias.masked_fill_(~visible[low:high, begin:end], float("-inf")).repeat(group, 1)
            queries = q[:, low:high].reshape(1, kv_heads, group * (high - low), -1)
            found = self._attend(queries, k[None, begin:end], v[None, begin:end], bias[None], scaling, softcap, sinks)
            out[low:high] = found.view(heads, high - low, -1).transpose(0, 1)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float, softcap: float | None,
                sinks: Tensor | None) -> Tensor:  # fmt: skip
        """q [n, kv_heads, rows, dim], k and v [n, width, kv_heads, dim], bias [n, rows or 1, width], sinks [heads]
        -> [n, kv_heads, rows, v_dim] in float32; the rows of a key head are its query heads, then their tokens."""
        n, kv_heads, rows, dim = q.shape
        blocks = -(-k.shape[1] // KEYS)
        many = n * kv_heads * blocks
        keys = _by_head(k, blocks).view(many, KEYS, dim)
        values = _by_head(v, blocks).view(many, KEYS, -1)
        queries = q.float().unsqueeze(2).expand(-1, -1, blocks, -1, -1).reshape(many, rows, dim)
        scores = self._product(dim, KEYS, transposed=True)(queries, keys.transpose(1, 2))
        scores = scores.reshape(n, kv_heads, blocks, rows, KEYS) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = F.pad(bias, (0, blocks * KEYS - bias.shape[2]), value=float("-inf"))
        scores = scores + hidden.view(n, 1, -1, blocks, KEYS).transpose(2, 3)
        peak = scores.amax(dim=(2, 4))
        sink = None
        if sinks is not None:
            per_head = sinks.float().view(kv_heads, -1, 1)
            sink = per_head.expand(-1, -1, rows // per_head.shape[1]).reshape(1, kv_heads, rows)
            peak = torch.maximum(peak, sink)
        weights = torch.exp(scores - peak[:, :, None, :, None])
        sums = weights.sum(dim=-1)
        parts = self._product(KEYS, values.shape[2], transposed=False)(weights.view(many, rows, KEYS), values)
        parts = parts.reshape(n, kv_heads, blocks, rows, -1)
        total, out = sums[:, :, 0], parts[:, :, 0]
        for block in range(1, blocks):
            total = total + sums[:, :, block]
            out = out + parts[:, :, block]
        if sink is not None:
            total = total + torch.exp(sink - peak)
        return out / total.unsqueeze(-1)

    def _product(self, inner: int, columns: int, *, transposed: bool) -> BatchedTiles:
        key = (inner, columns, transposed)
        if key not in self._products:
            self._products[key] = BatchedTiles(inner, columns, transposed=transposed)
        return self._products[key]


def _by_head(x: Tensor, blocks: int) -> Tensor:
    """[n, width, kv_heads, dim] -> float32 [n, kv_heads, blocks * KEYS, dim], zeros behind the width."""
    out = x.new_zeros(x.shape[0], x.shape[2], blocks * KEYS, x.shape[3], dtype=torch.float32)
    out[:, :, : x.shape[1]] = x.transpose(1, 2)
    return out
