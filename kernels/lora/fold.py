"""A projection with the expand in its epilogue: one kernel, one write of the output.

    out[t, n] = sum_k x'[t, k] W[n, k] + b[n] + term[t, n]

term is `expand.py`'s, with W x' + b in registers instead of in memory. The product is accumulated in float32 in
ascending blocks of `BLOCK_K` columns, then the bias is added, then the term of the token's record, which is accumulated
by itself in the expand's order; the sum is rounded once, where the product and the expand by themselves round twice.
Every program goes through all columns: an epilogue needs whole sums, so there is no split.

A tile of rows may hold tokens of many records, and finds them by their first tokens, in which records ascend. The term
of a record reaches its own rows alone, so that neither its numbers nor its infinities are seen by others. A step may
have records of two variants, each with an h of its own. One launch covers all slices of a packed site, tile by tile,
as in the expand. With `DEPENDENT`, the product runs beside the shrink and only the epilogue waits for it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from loramux.kernels.dense.product import accumulate, tile_of

from .expand import record_term


@triton.jit  # type: ignore[untyped-decorator]
def _records_of(records_ptr, begin, end, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[first, until): numbers of the records that hold tokens of [begin, end)."""
    count = tl.load(records_ptr)
    first = 0
    until = 0
    for low in range(0, count, SEARCH):
        numbers = low + tl.arange(0, SEARCH)
        mask = numbers < count
        record = records_ptr + (numbers + 1) * 8
        start = tl.load(record, mask=mask, other=0)
        tokens = tl.load(record + 1, mask=mask, other=0)
        first += tl.sum((mask & (start + tokens <= begin)).to(tl.int32), 0)
        until += tl.sum((mask & (start < end)).to(tl.int32), 0)
    return first, until


@triton.jit  # type: ignore[untyped-decorator]
def _add_terms(  # type: ignore[no-untyped-def]
    total,
    tokens,
    begin,
    records_ptr,
    tile,
    out_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    scales_ptr,
    entries_ptr,
    h_ptr,
    gates_ptr,
    out_stride,
    gates_stride,
    first_module,
    num_modules,
    h_split_stride,
    h_row_stride,
    h_slice_stride,
    NUM_PARTIALS: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    SCALED: tl.constexpr,
    GATES: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """total [BLOCK_M, BLOCK_N] plus the terms of one variant's records."""
    first, until = _records_of(records_ptr, begin, begin + BLOCK_M, SEARCH)
    for number in range(first, until):
        record = records_ptr + (number + 1) * 8
        within = tokens - tl.load(record)
        mine = (within >= 0) & (within < tl.load(record + 1))
        term, touched, _, _ = record_term(
            record, tile, within, mine, total, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr, entries_ptr,
            h_ptr, gates_ptr, out_stride, gates_stride, first_module, num_modules, h_split_stride, h_row_stride,
            h_slice_stride, NUM_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES, True, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        if touched > 0:
            total = tl.where(mine[:, None], total + term, total)
    return total


@triton.jit(do_not_specialize=["rows", "first_module", "num_modules"])  # type: ignore[untyped-decorator]
def fold_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows, outs of all slices], contiguous
    x_ptr,  # [rows, in], row stride x_stride
    weight_ptr,  # [outs of all slices, in], contiguous
    bias_ptr,  # [outs of all slices]; not read without HAS_BIAS
    arena_ptr,  # [elements]
    offsets_ptr,  # [slots, modules, 4] int64
    ranks_ptr,  # [slots, modules] int32
    scales_ptr,  # [slots, modules] float32
    first_records_ptr,  # [1 + records, 8] int32: the expand's records of one variant
    second_records_ptr,  # those of the other; not read without SECOND_PARTIALS
    entries_ptr,  # [entries, 4] int32: slot, column of h, weight as float32 bits
    tiles_ptr,  # [tiles, 4] int32: slice, first output within it, outputs of the slice, column of the slice in out
    first_h_ptr,  # [splits, rows, slices, width] float32
    second_h_ptr,
    gates_ptr,  # [rows, n] float32, row stride gates_stride; not read without GATES
    rows,
    num_tiles,
    in_features,
    x_stride,
    out_stride,
    gates_stride,
    first_module,
    num_modules,
    first_split_stride,
    second_split_stride,
    h_row_stride,
    h_slice_stride,
    FIRST_PARTIALS: tl.constexpr,  # partial sums in the first h
    SECOND_PARTIALS: tl.constexpr,  # in the second; 0 where there is none
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # in_features is a multiple of BLOCK_K
    ALIGN: tl.constexpr,  # elements; arena offsets are multiples of it
    OUT_ALIGN: tl.constexpr,  # elements; widths and columns of all slices are multiples of it
    SCALED: tl.constexpr,  # some adapter may have an output scale
    GATES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched while the shrink runs
    GROUP: tl.constexpr,  # row tiles that share a pass over the weights
    SEARCH: tl.constexpr,  # records that are looked at together
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_tile, out_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), num_tiles, GROUP)
    tile = tiles_ptr + out_tile * 4
    begin = row_tile * BLOCK_M
    tokens = begin + tl.arange(0, BLOCK_M)
    outputs = tl.multiple_of(tl.load(tile + 1), BLOCK_N) + tl.arange(0, BLOCK_N)
    out_mask = outputs < tl.load(tile + 2)
    places = tl.multiple_of(tl.load(tile + 3), OUT_ALIGN) + outputs
    row_mask = tokens < rows
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + columns[None, :]
    weight_ptrs = weight_ptr + places[None, :].to(tl.int64) * in_features + columns[:, None]
    total = accumulate(
        x_ptrs, weight_ptrs, row_mask, out_mask, 0, in_features, in_features, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if HAS_BIAS:
        total += tl.load(bias_ptr + places, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    if DEPENDENT:
        gdc_wait()
    total = _add_terms(
        total, tokens, begin, first_records_ptr, tile, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr,
        entries_ptr, first_h_ptr, gates_ptr, out_stride, gates_stride, first_module, num_modules, first_split_stride,
        h_row_stride, h_slice_stride, FIRST_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES, SEARCH, BLOCK_M, BLOCK_R,
        BLOCK_N,
    )  # fmt: skip
    if SECOND_PARTIALS:
        total = _add_terms(
            total, tokens, begin, second_records_ptr, tile, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr,
            entries_ptr, second_h_ptr, gates_ptr, out_stride, gates_stride, first_module, num_modules,
            second_split_stride, h_row_stride, h_slice_stride, SECOND_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES,
            SEARCH, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * out_stride + places[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])
