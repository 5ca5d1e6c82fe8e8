"""The inner loop that prefill and decode share: a tile of queries against a range of one sequence's keys.

Softmax is computed online in float32 and base 2: with u the masked scores and c their coefficient,

    peak' = max(peak, c max(u)),  p = 2^(c u - peak'),  total' = total 2^(peak - peak') + sum p,  acc likewise with p v

Keys come in tiles of `BLOCK_N` that start at multiples of it, in ascending order, whatever the queries are. A tile in
which a query sees nothing leaves that query's sums as they were, and `MASKED` changes no bit of what a visible key
adds (the exponent is one explicit fma), so a query's result does not depend on which queries share its tile.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def attend_keys(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M, BLOCK_V] float32
    total,  # [BLOCK_M] float32
    peak,  # [BLOCK_M] float32, base 2
    q,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M] of the queries in their sequence
    k_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, K_DIM], contiguous
    v_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, V_DIM], contiguous
    table_ptr,  # the sequence's blocks, int32
    kv_head,
    begin,  # keys [begin, end) are gone through; begin is a multiple of BLOCK_N
    end,
    low,  # keys outside [low, high) are not read
    high,
    window,
    inner,  # exponent of the soft-cap's exponential; unused without
    coefficient,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,  # otherwise every key of the range is visible to every query
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_N)
    k_dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_V)
    for start in range(begin, end, BLOCK_N):
        keys = start + columns
        if MASKED:
            exists = (keys >= low) & (keys < high)
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        else:
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        places = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * KV_HEADS + kv_head
        k_ptrs = k_ptr + places[None, :] * K_DIM + k_dims[:, None]
        v_ptrs = v_ptr + places[:, None] * V_DIM + v_dims[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=exists[None, :] & (k_dims < K_DIM)[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=exists[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs) if BLOCK_D == K_DIM else tl.load(k_ptrs, mask=(k_dims < K_DIM)[:, None], other=0.0)
            v = tl.load(v_ptrs) if BLOCK_V == V_DIM else tl.load(v_ptrs, mask=(v_dims < V_DIM)[None, :], other=0.0)
        u = tl.dot(q, k, input_precision="ieee")
        if HAS_SOFTCAP:
            u = 1.0 - 2.0 / (tl.exp2(u * inner) + 1.0)  # tanh
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            u = tl.where(visible, u, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(u, 1) * coefficient)
        shift = new_peak
        if MASKED:
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet: no -inf - -inf
        p = tl.exp2(tl.fma(u, coefficient, -shift[:, None]))
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak
