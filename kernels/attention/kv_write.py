"""KV write: k[slot of t] = key[t] and v[slot of t] = value[t], both in one launch; slots below 0 are padding."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def kv_write_kernel(  # type: ignore[no-untyped-def]
    k_ptr,  # [blocks * block_size, KV_HEADS * K_DIM]
    v_ptr,  # [blocks * block_size, KV_HEADS * V_DIM]
    key_ptr,  # [tokens, KV_HEADS, K_DIM]
    value_ptr,  # [tokens, KV_HEADS, V_DIM]
    slots_ptr,  # [tokens] int32
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    places = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < KV_HEADS * K_DIM
    key_ptrs = key_ptr + token * key_token_stride + places // K_DIM * key_head_stride + places % K_DIM
    key = tl.load(key_ptrs, mask=mask)
    tl.store(k_ptr + slot * (KV_HEADS * K_DIM) + places, key.to(k_ptr.dtype.element_ty), mask=mask)
    mask = places < KV_HEADS * V_DIM
    value_ptrs = value_ptr + token * value_token_stride + places // V_DIM * value_head_stride + places % V_DIM
    value = tl.load(value_ptrs, mask=mask)
    tl.store(v_ptr + slot * (KV_HEADS * V_DIM) + places, value.to(v_ptr.dtype.element_ty), mask=mask)
