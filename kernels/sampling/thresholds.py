"""The kernels of `digits` on tensors."""

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .digits import COUNTS, DIGITS, count_digit_kernel, threshold_kernel

BLOCK = 256
CHUNK = 4096
"""Tokens of one program."""
WARPS = 4


def triton_thresholds(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, *, has_k: bool = True, has_p: bool = True
) -> Tensor:
    """The lowest logit [rows, 1] that top_k, then top_p keep, without sorting and without waiting for the device.

    scaled [rows, vocab] float32 with unit stride in the last dimension, top_k and top_p [rows, 1] float64; top_k 0 and
    top_p 1 keep everything. With p_i = softmax over what top_k keeps, top_p keeps the fewest best tokens whose p_i
    sum to top_p; tokens as likely as the last that is kept are kept too. A probability below 2**-40 of the largest
    counts as 0. `has_k` and `has_p` false say that no row has such a bound: its search is left out. At most 19
    launches, whatever the rows. Raises ValueError for tensors that the kernels do not serve.
    """
    rows, vocab = scaled.shape
    if scaled.dtype != torch.float32 or scaled.stride(1) != 1:
        raise ValueError(f"logits must be float32 with unit stride in the last dimension, not {scaled.dtype}")
    if scaled.device.type != "cuda" and isinstance(count_digit_kernel, JITFunction):
        raise ValueError(f"Triton kernels do not run on {scaled.device}")
    for name, bound in (("top_k", top_k), ("top_p", top_p)):
        if bound.dtype != torch.float64 or bound.shape != (rows, 1) or not bound.is_contiguous():
            raise ValueError(f"{name} must be contiguous float64 {(rows, 1)}, not {bound.dtype} {tuple(bound.shape)}")
    lowest = torch.empty(rows, 1, dtype=torch.float32, device=scaled.device)
    if not rows:
        return lowest
    counts = torch.zeros(rows, 2 * COUNTS.value, dtype=torch.int64, device=scaled.device)
    tops = scaled.amax(-1)
    for mass in (False, True):
        if not (has_p if mass else has_k):
            continue
        for digit in range(DIGITS.value):
            count_digit_kernel[(rows, -(-vocab // CHUNK))](
                counts, scaled, tops, top_k, top_p, scaled.stride(0), vocab, digit,
                MASS=mass, AFTER=mass and has_k, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=WARPS,
            )  # fmt: skip
    threshold_kernel[(rows,)](lowest, counts, top_k, top_p, vocab, HAS_K=has_k, HAS_P=has_p, num_warps=1)
    return lowest
