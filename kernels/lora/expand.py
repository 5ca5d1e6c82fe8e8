"""Expand: out[t, n] += sum_i w_i ((g_i[n] - 1) out[t, n] + sum_c s_i h_i[t, c] B_i[n, c]) for each token's adapters i.

B lies multiplied by g in the arena; g - 1 is read for adapters that have it, in launches with `SCALED`. One launch
covers all slices of a packed site: the second grid axis counts tiles of outputs through the slices, so a narrow slice
costs what it weighs. h is read as float32 partial sums, added in ascending order, and multiplied by s_i w_i in float32
before it is rounded to the weights' dtype. Adapters are accumulated in the order of the set, ranks in ascending order,
all in float32; one program owns its tile of out and adds to it once. With `GATES`, the token's gate multiplies w_i.

With `STRIDED`, a program takes every `num_programs`-th record, as in the shrink.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit  # type: ignore[untyped-decorator]
def _out(out_ptr, out_stride, record, tile, rows, outputs, OUT_ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the record's rows and the tile's outputs; made where they are used, to hold no registers before."""
    tokens = tl.load(record).to(tl.int64) + rows
    columns = tl.multiple_of(tl.load(tile + 3), OUT_ALIGN) + outputs
    return out_ptr + tokens[:, None] * out_stride + columns[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def record_term(  # type: ignore[no-untyped-def]
    record,
    tile,
    within,  # [BLOCK_M]: each row's place among the record's tokens
    row_mask,  # [BLOCK_M]: which rows are the record's
    base,  # [BLOCK_M, BLOCK_N] float32, the base product of these rows; not used unless FOLDED
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
    FOLDED: tl.constexpr,  # the base product is in registers, not in out
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(the record's term [BLOCK_M, BLOCK_N] float32, 0 if no adapter has any there, the tile's outputs, their mask)."""
    part = tl.load(tile)
    width = tl.multiple_of(tl.load(tile + 2), OUT_ALIGN)
    outputs = tl.multiple_of(tl.load(tile + 1), BLOCK_N) + tl.arange(0, BLOCK_N)
    out_mask = outputs < width
    first_entry = tl.load(record + 2)
    end_entry = tl.load(record + 3)
    h_rows = tl.load(record + 4).to(tl.int64) + within
    h_base = h_ptr + part * h_slice_stride + h_rows[:, None] * h_row_stride

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    touched = 0
    for number in range(first_entry, end_entry):
        entry = entries_ptr + number * 4
        module = tl.load(entry).to(tl.int64) * num_modules + first_module + part
        rank = tl.load(ranks_ptr + module)
        h_column = tl.load(entry + 1)
        weight = tl.load(entry + 2).to(tl.float32, bitcast=True)
        factor = tl.load(scales_ptr + module) * weight
        b_base = arena_ptr + tl.multiple_of(tl.load(offsets_ptr + module * 4 + 1), ALIGN) + outputs[None, :]
        touched += rank
        if GATES:
            tokens = tl.load(record).to(tl.int64) + within
            gate = tl.load(gates_ptr + tokens * gates_stride + (number - first_entry), mask=row_mask, other=0.0)
        if SCALED:
            scale = tl.load(offsets_ptr + module * 4 + 2)
            if scale >= 0:
                g = tl.load(arena_ptr + tl.multiple_of(scale, ALIGN) + outputs, mask=out_mask, other=0.0)
                if FOLDED:
                    before = base
                else:
                    out_ptrs = _out(out_ptr, out_stride, record, tile, within, outputs, OUT_ALIGN)
                    before = tl.load(out_ptrs, mask=row_mask[:, None] & out_mask[None, :], other=0.0).to(tl.float32)
                term = before * (g.to(tl.float32) * weight)
                acc += term * gate[:, None] if GATES else term
                touched += 1
        for first_rank in range(0, rank, BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            rank_mask = ranks < rank
            h_ptrs = h_base + h_column + ranks[None, :]
            h_mask = row_mask[:, None] & rank_mask[None, :]
            h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for split in range(0, NUM_PARTIALS):
                h += tl.load(h_ptrs + split * h_split_stride, mask=h_mask, other=0.0)
            h *= factor
            if GATES:
                h *= gate[:, None]
            b_ptrs = b_base + ranks[:, None].to(tl.int64) * width
            b = tl.load(b_ptrs, mask=rank_mask[:, None] & out_mask[None, :], other=0.0)
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    return acc, touched, outputs, out_mask


@triton.jit  # type: ignore[untyped-decorator]
def _expand_record(  # type: ignore[no-untyped-def]
    record,
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
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(record + 1)
    acc, touched, outputs, out_mask = record_term(
        record, tile, rows, row_mask, 0.0, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr, entries_ptr, h_ptr,
        gates_ptr, out_stride, gates_stride, first_module, num_modules, h_split_stride, h_row_stride, h_slice_stride,
        NUM_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES, False, BLOCK_M, BLOCK_R, BLOCK_N,
    )  # fmt: skip
    if touched > 0:
        out_ptrs = _out(out_ptr, out_stride, record, tile, rows, outputs, OUT_ALIGN)
        out_mask_2d = row_mask[:, None] & out_mask[None, :]
        base = tl.load(out_ptrs, mask=out_mask_2d, other=0.0)
        tl.store(out_ptrs, (base.to(tl.float32) + acc).to(base.dtype), mask=out_mask_2d)


@triton.jit(do_not_specialize=["first_module", "num_modules"])  # type: ignore[untyped-decorator]
def expand_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [tokens, outs of all slices], row stride out_stride
    arena_ptr,  # [elements]
    offsets_ptr,  # [slots, modules, 4] int64
    ranks_ptr,  # [slots, modules] int32
    scales_ptr,  # [slots, modules] float32
    records_ptr,  # [1 + records, 8] int32: records; then first token, tokens, first entry, end of entries, row of h
    entries_ptr,  # [entries, 4] int32: slot, column of h, weight as float32 bits
    tiles_ptr,  # [tiles, 4] int32: slice, first output within it, outputs of the slice, column of the slice in out
    h_ptr,  # [splits, rows, slices, width] float32
    gates_ptr,  # [tokens, n] float32, row stride gates_stride; not read without GATES
    out_stride,
    gates_stride,
    first_module,
    num_modules,
    h_split_stride,
    h_row_stride,
    h_slice_stride,
    NUM_PARTIALS: tl.constexpr,
    ALIGN: tl.constexpr,  # elements; arena offsets are multiples of it
    OUT_ALIGN: tl.constexpr,  # elements; widths and columns of all slices are multiples of it
    STRIDED: tl.constexpr,
    SCALED: tl.constexpr,  # some adapter may have an output scale
    GATES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched while the shrink runs
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
    tile = tiles_ptr + tl.program_id(1) * 4
    if STRIDED:
        for number in range(tl.program_id(0), tl.load(records_ptr), tl.num_programs(0)):
            _expand_record(
                records_ptr + (number + 1) * 8,
                tile, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr, entries_ptr, h_ptr, gates_ptr, out_stride,
                gates_stride, first_module, num_modules, h_split_stride, h_row_stride, h_slice_stride,
                NUM_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES, BLOCK_M, BLOCK_R, BLOCK_N,
            )  # fmt: skip
    else:
        _expand_record(
            records_ptr + (tl.program_id(0) + 1) * 8,
            tile, out_ptr, arena_ptr, offsets_ptr, ranks_ptr, scales_ptr, entries_ptr, h_ptr, gates_ptr, out_stride,
            gates_stride, first_module, num_modules, h_split_stride, h_row_stride, h_slice_stride,
            NUM_PARTIALS, ALIGN, OUT_ALIGN, SCALED, GATES, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
