"""out = x W^T + b on a card, with one order of summation for any number of rows.

The inner dimension is cut into splits of `SPLIT_K` columns, a function of the weights' shape alone. Within a split,
blocks of `BLOCK_K` columns are accumulated in float32, in ascending order, by `tl.dot` on tiles of one fixed shape;
splits are summed in ascending order, then the bias is added. Two variants differ only in who adds the splits up:

- `PARTIALS`: one program per split, each writes its own sum; `sum_splits_kernel` adds them. For few rows, which alone
  would not occupy a card.
- otherwise: one program goes through all splits.

The tile is the same for both, so they run the same matrix instructions in the same order.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(program, row_tiles, out_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row tile, output tile) of a program: `GROUP` row tiles go through the same weights side by side."""
    first_row_tile = program // (GROUP * out_tiles) * GROUP
    height = tl.minimum(row_tiles - first_row_tile, GROUP)
    row_tile = first_row_tile + program % (GROUP * out_tiles) % height
    return row_tile, program % (GROUP * out_tiles) // height


@triton.jit  # type: ignore[untyped-decorator]
def accumulate(  # type: ignore[no-untyped-def]
    x_ptrs,  # [BLOCK_M, BLOCK_K] of the first columns
    weight_ptrs,  # [BLOCK_K, BLOCK_N] of the first columns
    row_mask,
    out_mask,
    begin,
    end,
    in_features,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k x[t, k] W[n, k] over columns [begin, end), blocks in ascending order, in float32."""
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_ptrs + k, mask=out_mask[None, :], other=0.0)
        else:
            k_mask = k + columns < in_features
            x = tl.load(x_ptrs + k, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs + k, mask=k_mask[:, None] & out_mask[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows, outs]; with PARTIALS [splits, rows, outs] float32
    x_ptr,  # [rows, in], row stride x_stride
    weight_ptr,  # [outs, in], contiguous
    bias_ptr,  # [outs]
    rows,
    outs,
    in_features,
    x_stride,
    SPLIT_K: tl.constexpr,  # columns of a split, a multiple of BLOCK_K
    NUM_SPLITS: tl.constexpr,
    PARTIALS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    GROUP: tl.constexpr,  # row tiles that share a pass over the weights
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tile, out_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(outs, BLOCK_N), GROUP)
    split = tl.program_id(1)

    tokens = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = out_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = tokens < rows
    out_mask = outputs < outs
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + columns[None, :]
    weight_ptrs = weight_ptr + outputs[None, :].to(tl.int64) * in_features + columns[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 1 if PARTIALS else NUM_SPLITS):
        begin = (split + step) * SPLIT_K
        end = tl.minimum(begin + SPLIT_K, in_features)
        total += accumulate(
            x_ptrs, weight_ptrs, row_mask, out_mask, begin, end, in_features, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
        )

    mask = row_mask[:, None] & out_mask[None, :]
    places = (split.to(tl.int64) * rows + tokens[:, None]) * outs + outputs[None, :]
    if PARTIALS:
        tl.store(out_ptr + places, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def sum_splits_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows, outs]
    parts_ptr,  # [NUM_SPLITS, rows, outs] float32
    bias_ptr,  # [outs]
    rows,
    outs,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outputs < outs
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, NUM_SPLITS):
        total += tl.load(parts_ptr + (split * rows.to(tl.int64) + row) * outs + outputs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * outs + outputs, total.to(out_ptr.dtype.element_ty), mask=mask)
