"""Decode: one query per sequence against its keys, which are cut into splits that run side by side and are then added
up in ascending order by a second kernel. No atomics.

The splits of a sequence follow from its own context, the window and constants alone (`split_range`), so its result has
the same bits whatever else is in the batch. The grid is bounded by rows and `MAX_SPLITS`; programs without work leave
at once, and a row of context 0 is padding.
"""

import triton
import triton.language as tl

from .keys import attend_keys


@triton.jit  # type: ignore[untyped-decorator]
def split_range(  # type: ignore[no-untyped-def]
    context,
    window,
    HAS_WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first visible key, where the first split begins, keys of a split, splits); the last two are 0 for padding."""
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(context - window, 0)
    begin = low // BLOCK_N * BLOCK_N
    size = tl.maximum(tl.cdiv(context - begin, MAX_SPLITS), MIN_SPLIT)
    size = tl.cdiv(size, BLOCK_N) * BLOCK_N
    return low, begin, size, tl.cdiv(context - begin, size)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # [rows, heads, MAX_SPLITS, V_DIM] float32
    stats_ptr,  # [rows, heads, MAX_SPLITS, 2] float32: peak, total
    q_ptr,  # [rows, heads, K_DIM]
    k_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, K_DIM]
    v_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, V_DIM]
    tables_ptr,  # [entries] int32
    contexts_ptr,  # [rows] int32
    first_entries_ptr,  # [rows] int32
    q_token_stride,
    q_head_stride,
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
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HEAD_TILES: tl.constexpr,  # tiles of BLOCK_M heads in a group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_TILES
    split = tl.program_id(2)
    context = tl.load(contexts_ptr + row)
    low, begin, size, splits = split_range(context, window, HAS_WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    if split >= splits:
        return
    begin += split * size
    end = tl.minimum(begin + size, context)
    members = tl.program_id(1) % HEAD_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    member_mask = members < GROUP
    heads = (kv_head * GROUP + members).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + row * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=member_mask[:, None] & (dims < K_DIM)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    positions = tl.zeros((BLOCK_M,), dtype=tl.int32) + (context - 1)
    acc, total, peak = attend_keys(
        acc, total, peak, q, positions, k_ptr, v_ptr, tables_ptr + tl.load(first_entries_ptr + row), kv_head,
        begin, end, low, end, window, inner, coefficient, K_DIM, V_DIM, KV_HEADS, BLOCK_SIZE, HAS_WINDOW, HAS_SOFTCAP,
        True, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    places = (row * (KV_HEADS * GROUP) + heads) * MAX_SPLITS + split
    tl.store(stats_ptr + places * 2, peak, mask=member_mask)
    tl.store(stats_ptr + places * 2 + 1, total, mask=member_mask)
    dims = tl.arange(0, BLOCK_V)
    parts_ptrs = parts_ptr + places[:, None] * V_DIM + dims[None, :]
    tl.store(parts_ptrs, acc, mask=member_mask[:, None] & (dims < V_DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def reduce_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows, heads, V_DIM]
    parts_ptr,  # [rows, heads, MAX_SPLITS, V_DIM] float32
    stats_ptr,  # [rows, heads, MAX_SPLITS, 2] float32: peak, total
    sinks_ptr,  # [heads]
    contexts_ptr,  # [rows] int32
    out_token_stride,
    out_head_stride,
    window,
    V_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of the decode kernel
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    _, _, _, splits = split_range(tl.load(contexts_ptr + row), window, HAS_WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    dims = tl.arange(0, BLOCK_V)
    dim_mask = dims < V_DIM
    out_ptrs = out_ptr + row * out_token_stride + head * out_head_stride + dims
    if splits == 0:
        tl.store(out_ptrs, tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty), mask=dim_mask)
        return
    place = (row * tl.num_programs(1) + head) * MAX_SPLITS
    numbers = tl.arange(0, MAX_SPLITS)
    used = numbers < splits
    stats = stats_ptr + (place + numbers) * 2
    peaks = tl.load(stats, mask=used, other=float("-inf"))
    peak = tl.max(peaks, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    total = tl.sum(tl.load(stats + 1, mask=used, other=0.0) * tl.exp2(peaks - peak), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    acc = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        chosen = first + tl.arange(0, SPLITS_AT_ONCE)
        mask = chosen < splits
        fade = tl.exp2(tl.load(stats_ptr + (place + chosen) * 2, mask=mask, other=float("-inf")) - peak)
        parts_ptrs = parts_ptr + (place + chosen)[:, None] * V_DIM + dims[None, :]
        parts = tl.load(parts_ptrs, mask=mask[:, None] & dim_mask[None, :], other=0.0)
        acc += tl.sum(parts * fade[:, None], 0)
    tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=dim_mask)
