"""Input scaling, in place on a copy of x: x[t, k] *= 1 + sum_i w_i (l_i[k] - 1) for the adapters i of each token's set.

Reads the expand's records. A row whose adapters do not scale the input is not written.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["module_number", "num_modules"])  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [tokens, in], row stride x_stride
    arena_ptr,  # [elements]
    offsets_ptr,  # [slots, modules, 4] int64
    records_ptr,  # [1 + records, 8] int32: records; then first token, tokens, first entry, end of entries
    entries_ptr,  # [entries, 4] int32: slot, column of h, weight as float32 bits
    gates_ptr,  # [tokens, n] float32, row stride gates_stride; not read without GATES
    in_features,
    x_stride,
    gates_stride,
    module_number,
    num_modules,
    ALIGN: tl.constexpr,  # elements; arena offsets are multiples of it
    GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < in_features
    for index in range(tl.program_id(0), tl.load(records_ptr), tl.num_programs(0)):
        record = records_ptr + (index + 1) * 8
        row_mask = rows < tl.load(record + 1)
        tokens = tl.load(record).to(tl.int64) + rows
        first_entry = tl.load(record + 2)
        factor = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype=tl.float32)
        touched = 0
        for number in range(first_entry, tl.load(record + 3)):
            entry = entries_ptr + number * 4
            module = tl.load(entry).to(tl.int64) * num_modules + module_number
            scale = tl.load(offsets_ptr + module * 4 + 3)
            if scale >= 0:
                ptrs = arena_ptr + tl.multiple_of(scale, ALIGN) + columns
                term = tl.load(ptrs, mask=column_mask, other=0.0).to(tl.float32)
                term *= tl.load(entry + 2).to(tl.float32, bitcast=True)
                if GATES:
                    gates = gates_ptr + tokens * gates_stride + (number - first_entry)
                    factor += tl.load(gates, mask=row_mask, other=0.0)[:, None] * term[None, :]
                else:
                    factor += term[None, :]
                touched += 1
        if touched > 0:
            ptrs = x_ptr + tokens[:, None] * x_stride + columns[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            x = tl.load(ptrs, mask=mask, other=0.0)
            tl.store(ptrs, (x.to(tl.float32) * factor).to(x.dtype), mask=mask)
