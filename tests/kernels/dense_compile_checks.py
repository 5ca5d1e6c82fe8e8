"""Compiles the dense kernels without a card and reads the machine code. Collected by `test_dense_compile.py`, in a
process without TRITON_INTERPRET, which would exclude compiling."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.dense.launch import GROUP, SUM_BLOCK, product_config
from loramux.kernels.dense.product import product_kernel, sum_splits_kernel
from loramux.kernels.dense.row_mean import row_mean_kernel

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CARDS = (80, 90, pytest.param(100, marks=pytest.mark.slow))
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Per program. Code for 8.0 must also fit cards of capability 8.6 and 8.9."""
MATRIX_UNIT = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def compiled(kernel, dtype, constants, capability: int, config=None, float32: tuple[str, ...] = ()):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in float32 else POINTERS[dtype]
        else:
            signature[name] = "i32"
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ("in_features", "x_stride", "outs")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {} if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= SHARED_BYTES[capability]
    code = result.asm["sass"]
    assert "EXIT" in code or capability == 100  # where the disassembler of triton 3.6 stops early
    assert "STL" not in code, "registers spill to local memory"
    assert "LDL" not in code, "registers spill to local memory"
    assert not re.search(r"\b(ATOMG?|REDG?)\b", code), "atomics on global memory"
    return result


def product_constants(dtype: torch.dtype, *, partials: bool, even: bool) -> dict:
    config = product_config(dtype)
    return {
        "SPLIT_K": 512, "NUM_SPLITS": 8, "PARTIALS": partials, "HAS_BIAS": True, "EVEN_K": even, "GROUP": GROUP,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize(("dtype", "even"), [*((dtype, True) for dtype in POINTERS), (torch.bfloat16, False)], ids=str)
def test_products_compile_and_both_variants_use_the_same_instructions(
    dtype: torch.dtype, capability: int, even: bool
) -> None:
    instructions = []
    for partials in (False, True):
        result = compiled(
            product_kernel, dtype, product_constants(dtype, partials=partials, even=even), capability,
            product_config(dtype), float32=("out_ptr",) if partials else (),
        )  # fmt: skip
        instructions.append(set(re.findall(rf"\S*{MATRIX_UNIT[capability]}\S*", result.asm["ptx"])))
    assert instructions[0] == instructions[1]
    assert bool(instructions[0]) == (dtype is not torch.float32)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_sums_compile(dtype: torch.dtype, capability: int) -> None:
    constants = {"NUM_SPLITS": 8, "HAS_BIAS": True, "BLOCK": SUM_BLOCK}
    compiled(sum_splits_kernel, dtype, constants, capability, float32=("parts_ptr",))
    compiled(row_mean_kernel, dtype, {"BLOCK": 1024}, capability)
