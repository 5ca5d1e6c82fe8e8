"""Expand: out[t, n] += sum_i sum_c w_i s_i h_i[t, c] B_i[n, c] for the adapters i of each token's set.

One launch covers all slices of a packed site: the second grid axis counts tiles of outputs through the slices, so a
narrow slice costs what it weighs. h is read as float32 partial sums, added in ascending order, and multiplied by
s_i w_i in float32 before it is rounded to the weights' dtype. Adapters are accumulated in the order of the set, ranks
in ascending order, all in float32; one program owns its tile of out and adds to it once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_module", "num_modules"])  # type: ignore[untyped-decorator]
def expand_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [tokens, outs of all slices], row stride out_stride
    arena_ptr,  # [elements]
    offsets_ptr,  # [slots, modules, 2] int64
    ranks_ptr,  # [slots, modules] int32
    scales_ptr,  # [slots, modules] float32
    records_ptr,  # [programs, 8] int32: first token, tokens, first entry, end of entries, row of h
    entries_ptr,  # [entries, 4] int32: slot, column of h, weight as float32 bits
    tiles_ptr,  # [tiles, 4] int32: slice, first output within it, outputs of the slice, column of the slice in out
    h_ptr,  # [splits, rows, slices, width] float32
    out_stride,
    first_module,
    num_modules,
    h_split_stride,
    h_row_stride,
    h_slice_stride,
    NUM_PARTIALS: tl.constexpr,
    ALIGN: tl.constexpr,  # elements; arena offsets are multiples of it
    OUT_ALIGN: tl.constexpr,  # elements; widths and columns of all slices are multiples of it
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    record = records_ptr + tl.program_id(0) * 8
    tile = tiles_ptr + tl.program_id(1) * 4
    count = tl.load(record + 1)
    first_entry = tl.load(record + 2)
    end_entry = tl.load(record + 3)
    part = tl.load(tile)
    width = tl.multiple_of(tl.load(tile + 2), OUT_ALIGN)
    rows = tl.arange(0, BLOCK_M)
    outputs = tl.multiple_of(tl.load(tile + 1), BLOCK_N) + tl.arange(0, BLOCK_N)
    row_mask = rows < count
    out_mask = outputs < width
    h_rows = tl.load(record + 4).to(tl.int64) + rows
    h_base = h_ptr + part * h_slice_stride + h_rows[:, None] * h_row_stride

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    touched = 0
    for number in range(first_entry, end_entry):
        entry = entries_ptr + number * 4
        module = tl.load(entry).to(tl.int64) * num_modules + first_module + part
        rank = tl.load(ranks_ptr + module)
        h_column = tl.load(entry + 1)
        factor = tl.load(scales_ptr + module) * tl.load(entry + 2).to(tl.float32, bitcast=True)
        b_base = arena_ptr + tl.multiple_of(tl.load(offsets_ptr + module * 2 + 1), ALIGN) + outputs[None, :]
        touched += rank
        for first_rank in range(0, rank, BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            rank_mask = ranks < rank
            h_ptrs = h_base + h_column + ranks[None, :]
            h_mask = row_mask[:, None] & rank_mask[None, :]
            h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for split in range(0, NUM_PARTIALS):
                h += tl.load(h_ptrs + split * h_split_stride, mask=h_mask, other=0.0)
            b_ptrs = b_base + ranks[:, None].to(tl.int64) * width
            b = tl.load(b_ptrs, mask=rank_mask[:, None] & out_mask[None, :], other=0.0)
            acc = tl.dot((h * factor).to(b.dtype), b, acc, input_precision="ieee")

    if touched > 0:
        tokens = tl.load(record).to(tl.int64) + rows
        out_columns = tl.multiple_of(tl.load(tile + 3), OUT_ALIGN) + outputs
        out_ptrs = out_ptr + tokens[:, None] * out_stride + out_columns[None, :]
        out_mask_2d = row_mask[:, None] & out_mask[None, :]
        base = tl.load(out_ptrs, mask=out_mask_2d, other=0.0)
        tl.store(out_ptrs, (base.to(tl.float32) + acc).to(base.dtype), mask=out_mask_2d)
