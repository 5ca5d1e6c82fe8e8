"""Prefill: tiles of queries against their sequence's keys, cached prefix and chunk alike, read through the blocks.

The query heads that share a key head are packed: row r of a sequence is head r % GROUP of query r // GROUP, so keys
are read once per tile for all of them. One launch covers all sequences of the step; the host lists the tiles.
"""

import triton
import triton.language as tl

from .keys import attend_keys


@triton.jit  # type: ignore[untyped-decorator]
def prefill_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [tokens, heads, V_DIM]
    q_ptr,  # [tokens, heads, K_DIM]
    k_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, K_DIM]
    v_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, V_DIM]
    sinks_ptr,  # [heads]
    tables_ptr,  # [entries] int32
    tiles_ptr,  # [tiles, 8] int32: first token, queries, context, first entry of the table, first packed row
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    window,
    inner,
    coefficient,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    queries = tl.load(tile + 1)
    first_row = tl.load(tile + 4)
    cached = tl.load(tile + 2) - queries
    table_ptr = tables_ptr + tl.load(tile + 3)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < queries * GROUP
    tokens = (tl.load(tile) + rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    positions = cached + rows // GROUP
    first_position = cached + first_row // GROUP
    last_position = cached + (tl.minimum(first_row + BLOCK_M, queries * GROUP) - 1) // GROUP

    dims = tl.arange(0, BLOCK_D)
    q_rows = tokens * q_token_stride + heads.to(tl.int64) * q_head_stride
    q_ptrs = q_ptr + q_rows[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=row_mask[:, None] & (dims < K_DIM)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    if HAS_SINKS:
        peak = tl.load(sinks_ptr + heads, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    else:
        peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    high = last_position + 1
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0)
        middle = low // BLOCK_N * BLOCK_N
    else:
        low = 0
        middle = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, total, peak = attend_keys(
            acc, total, peak, q, positions, k_ptr, v_ptr, table_ptr, kv_head, 0, middle, 0, middle,
            window, inner, coefficient, K_DIM, V_DIM, KV_HEADS, BLOCK_SIZE, False, HAS_SOFTCAP, False,
            BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    acc, total, peak = attend_keys(
        acc, total, peak, q, positions, k_ptr, v_ptr, table_ptr, kv_head, middle, high, low, high,
        window, inner, coefficient, K_DIM, V_DIM, KV_HEADS, BLOCK_SIZE, HAS_WINDOW, HAS_SOFTCAP, True,
        BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_V)
    out_rows = tokens * out_token_stride + heads.to(tl.int64) * out_head_stride
    out_ptrs = out_ptr + out_rows[:, None] + dims[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=row_mask[:, None] & (dims < V_DIM)[None, :])
