"""The plain reference of paged attention: loops over sequences and tokens, nothing clever."""

import torch
from torch import Tensor

from .interface import AttentionBatch


def write_reference(k: Tensor, v: Tensor, key: Tensor, value: Tensor, batch: AttentionBatch) -> None:
    """k[slot of t] = key[t] and v[slot of t] = value[t], in place; caches are [blocks, block_size, kv_heads, dim]."""
    for token, slot in enumerate(batch.slots):
        block, row = divmod(int(slot), k.shape[1])
        k[block, row] = key[token].to(k.dtype)
        v[block, row] = value[token].to(v.dtype)


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """q [tokens, heads, k_dim] against the caches -> [tokens, heads, v_dim] in `compute_dtype`; see `interface`."""
    group = q.shape[1] // k.shape[2]
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=compute_dtype, device=q.device)
    first = 0
    for count, context, table in zip(batch.query_lens, batch.contexts, batch.tables, strict=True):
        blocks = torch.as_tensor(table, dtype=torch.int64, device=k.device)
        keys = k[blocks].flatten(0, 1)[:context].to(compute_dtype).repeat_interleave(group, dim=1)
        values = v[blocks].flatten(0, 1)[:context].to(compute_dtype).repeat_interleave(group, dim=1)
        for token in range(int(count)):
            position = int(context) - int(count) + token
            low = 0 if window is None else max(position - window + 1, 0)
            visible = slice(low, position + 1)
            scores = torch.einsum("hd,jhd->hj", q[first + token].to(compute_dtype), keys[visible]) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(compute_dtype).unsqueeze(1)], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : position + 1 - low]
            out[first + token] = torch.einsum("hj,jhd->hd", weights, values[visible])
        first += int(count)
    return out
