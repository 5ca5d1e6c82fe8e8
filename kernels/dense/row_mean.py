"""Means of rows on a card: one program per row, blocks of columns in ascending order, in float32.

torch's own reduction shares a row out over as many threads as the number of rows leaves free.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def row_mean_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows]
    x_ptr,  # [rows, features], contiguous
    features,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, features, BLOCK):
        mask = first + columns < features
        sums += tl.load(x_ptr + row * features + first + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, (tl.sum(sums, 0) / features).to(out_ptr.dtype.element_ty))
