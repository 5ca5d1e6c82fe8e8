"""The kernels of `product` and `row_mean` on tensors."""

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .launch import GROUP, PARTIAL_ROWS, SUM_BLOCK, product_config, splits
from .product import product_kernel, sum_splits_kernel
from .row_mean import row_mean_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, partials: bool | None = None) -> Tensor:
    """out = x W^T + b. x [tokens, in], weight [out, in] contiguous, bias [out], one dtype -> [tokens, out].

    `partials` says whether splits run side by side (default: by the number of rows); it changes no bit.
    Raises ValueError for tensors that the kernel does not serve.
    """
    _check(x, product_kernel)
    if weight.dtype != x.dtype or not weight.is_contiguous() or x.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{x.dtype} rows {tuple(x.shape)} and {weight.dtype} weights {tuple(weight.shape)} do not fit")
    if x.stride(1) != 1:
        x = x.contiguous()
    (rows, in_features), outs = x.shape, len(weight)
    out = x.new_empty(rows, outs)
    config = product_config(x.dtype)
    columns, number = splits(outs, in_features, config)
    if partials is None:
        partials = rows <= PARTIAL_ROWS
    partials = partials and number > 1
    target = torch.empty(number, rows, outs, dtype=torch.float32, device=x.device) if partials else out
    programs = -(-rows // config.block_m) * -(-outs // config.block_n)
    product_kernel[(programs, number if partials else 1)](
        target,
        x,
        weight,
        weight if bias is None else bias,
        rows,
        outs,
        in_features,
        x.stride(0),
        SPLIT_K=columns,
        NUM_SPLITS=number,
        PARTIALS=partials,
        HAS_BIAS=bias is not None,
        EVEN_K=in_features % config.block_k == 0,
        GROUP=GROUP,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if partials:
        sum_splits_kernel[(rows, -(-outs // SUM_BLOCK))](
            out,
            target,
            weight if bias is None else bias,
            rows,
            outs,
            NUM_SPLITS=number,
            HAS_BIAS=bias is not None,
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return out


def triton_row_mean(x: Tensor) -> Tensor:
    """Means over the last dimension: [..., features] -> [...], in x's dtype, summed in float32."""
    _check(x, row_mean_kernel)
    x = x.contiguous()
    features = x.shape[-1]
    out = x.new_empty(x.shape[:-1])
    if out.numel():
        block = min(1024, max(32, 1 << (features - 1).bit_length()))
        row_mean_kernel[(out.numel(),)](out, x, features, BLOCK=block, num_warps=4)
    return out


def _check(x: Tensor, kernel: object) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"dtype {x.dtype} is not served; use float32, bfloat16 or float16")
    if x.device.type != "cuda" and isinstance(kernel, JITFunction):
        raise ValueError(f"Triton kernels do not run on {x.device}")
