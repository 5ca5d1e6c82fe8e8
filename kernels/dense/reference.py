"""The plain twins of the kernels, in the precision of their inputs: float64 in, float64 out."""

import torch
from torch import Tensor


def product_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = x W^T + b. x [tokens, in], weight [out, in], bias [out] -> [tokens, out]."""
    out = torch.mm(x, weight.t())
    return out if bias is None else out + bias


def row_mean_reference(x: Tensor) -> Tensor:
    """out[t] = mean of x[t, :]. [..., features] -> [...]."""
    return x.mean(dim=-1)
