"""Shrink: h[t, slice, c] = sum_k x[t, k] A[c, k] for the adapters of each token's set, packed slices in one launch.

The inputs are cut into splits of `SPLIT_K` columns, a function of in_features alone. Within a split, blocks of
`BLOCK_K` columns are accumulated in float32, in ascending order, by `tl.dot`; splits are summed in ascending order.
Two variants differ only in who adds the splits up, so they give the same sum in the same order:

- `PARTIALS`: one program per split, each writes its own h; the expand adds them when it reads them. Used where
  tokens are few, so that few adapters still occupy the whole card.
- otherwise: one program goes through all splits and writes their sum.

With `STRIDED`, a program takes every `num_programs`-th record and the device reads how many there are, so that the grid
need not match them; otherwise there is one program per record, which takes fewer registers.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit  # type: ignore[untyped-decorator]
def _shrink_record(  # type: ignore[no-untyped-def]
    record,
    x_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    entries_ptr,
    h_ptr,
    in_features,
    x_stride,
    first_module,
    num_modules,
    h_split_stride,
    h_row_stride,
    h_slice_stride,
    SPLIT_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PARTIALS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    part = tl.program_id(2)
    count = tl.load(record + 1)
    entry = entries_ptr + tl.load(record + 2) * 4
    module = tl.load(entry).to(tl.int64) * num_modules + first_module + part
    rank = tl.load(ranks_ptr + module)
    first_rank = tl.load(record + 3) * BLOCK_R
    if first_rank < rank:
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_K)
        ranks = first_rank + tl.arange(0, BLOCK_R)
        row_mask = rows < count
        rank_mask = ranks < rank
        offset = tl.multiple_of(tl.load(offsets_ptr + module * 4), ALIGN)
        tokens = tl.load(record).to(tl.int64) + rows
        x_ptrs = x_ptr + tokens[:, None] * x_stride + columns[None, :]
        a_ptrs = arena_ptr + offset + ranks[None, :].to(tl.int64) * in_features + columns[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for step in range(0, 1 if PARTIALS else NUM_SPLITS):
            begin = (split + step) * SPLIT_K
            end = tl.minimum(begin + SPLIT_K, in_features)
            partial = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k in range(begin, end, BLOCK_K):
                if EVEN_K:
                    x = tl.load(x_ptrs + k, mask=row_mask[:, None], other=0.0)
                    a = tl.load(a_ptrs + k, mask=rank_mask[None, :], other=0.0)
                else:
                    k_mask = k + columns < in_features
                    x = tl.load(x_ptrs + k, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
                    a = tl.load(a_ptrs + k, mask=k_mask[:, None] & rank_mask[None, :], other=0.0)
                partial = tl.dot(x, a, partial, input_precision="ieee")
            total += partial
        h_rows = tl.load(record + 4).to(tl.int64) + rows
        h_columns = tl.load(entry + 1) + ranks
        h_ptrs = h_ptr + split.to(tl.int64) * h_split_stride + part * h_slice_stride
        h_ptrs += h_rows[:, None] * h_row_stride + h_columns[None, :]
        tl.store(h_ptrs, total, mask=row_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["first_module", "num_modules"])  # type: ignore[untyped-decorator]
def shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [tokens, in], row stride x_stride
    arena_ptr,  # [elements]
    offsets_ptr,  # [slots, modules, 4] int64
    ranks_ptr,  # [slots, modules] int32
    records_ptr,  # [1 + records, 8] int32: records; then first token, tokens, entry, rank block, row of h
    entries_ptr,  # [entries, 4] int32: slot, column of h, weight as float32 bits
    h_ptr,  # [splits, rows, slices, width] float32
    in_features,
    x_stride,
    first_module,
    num_modules,
    h_split_stride,
    h_row_stride,
    h_slice_stride,
    SPLIT_K: tl.constexpr,  # columns of x per split, a multiple of BLOCK_K
    NUM_SPLITS: tl.constexpr,
    PARTIALS: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    ALIGN: tl.constexpr,  # elements; arena offsets are multiples of it
    STRIDED: tl.constexpr,
    DEPENDENTS: tl.constexpr,  # the expand may be launched while this kernel runs
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if DEPENDENTS:
        gdc_launch_dependents()
    if STRIDED:
        for number in range(tl.program_id(0), tl.load(records_ptr), tl.num_programs(0)):
            _shrink_record(
                records_ptr + (number + 1) * 8,
                x_ptr, arena_ptr, offsets_ptr, ranks_ptr, entries_ptr, h_ptr, in_features, x_stride, first_module,
                num_modules, h_split_stride, h_row_stride, h_slice_stride, SPLIT_K, NUM_SPLITS, PARTIALS, EVEN_K, ALIGN,
                BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
    else:
        _shrink_record(
            records_ptr + (tl.program_id(0) + 1) * 8,
            x_ptr, arena_ptr, offsets_ptr, ranks_ptr, entries_ptr, h_ptr, in_features, x_stride, first_module,
            num_modules, h_split_stride, h_row_stride, h_slice_stride, SPLIT_K, NUM_SPLITS, PARTIALS, EVEN_K, ALIGN,
            BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
