"""The launch of `kv_write.py`, for every backend that leaves the write to it."""

from torch import Tensor

from .kv_write import kv_write_kernel
from .launch import write_block


def write_kv(k: Tensor, v: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """k[slots[t]] = key[t] and v[slots[t]] = value[t] where slots[t] >= 0.

    k and v are contiguous caches [blocks, block_size, kv_heads, dim]; key and value [tokens, kv_heads, dim] of any
    strides; slots int32 [tokens]. Raises ValueError for keys and values that do not fit the caches.
    """
    (tokens, kv_heads, k_dim), v_dim = key.shape, value.shape[2]
    if (kv_heads, k_dim) != tuple(k.shape[2:]) or (kv_heads, v_dim) != tuple(v.shape[2:]) or len(value) != tokens:
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit caches of {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    width = kv_heads * max(k_dim, v_dim)
    block = write_block(width)
    kv_write_kernel[(tokens, -(-width // block))](
        k,
        v,
        key,
        value,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KV_HEADS=kv_heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        BLOCK=block,
        num_warps=4,
    )
