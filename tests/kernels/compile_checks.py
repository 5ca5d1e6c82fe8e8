"""Compiles every kernel variant without a card and reads the machine code. Collected by `test_triton_compile.py`, in a
process without TRITON_INTERPRET, which would exclude compiling."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.lora.expand import expand_kernel
from loramux.kernels.lora.launch import split_columns, variants
from loramux.kernels.lora.shrink import shrink_kernel

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FIXED_POINTERS = {
    "offsets_ptr": "*i64",
    "ranks_ptr": "*i32",
    "scales_ptr": "*fp32",
    "records_ptr": "*i32",
    "entries_ptr": "*i32",
    "tiles_ptr": "*i32",
    "h_ptr": "*fp32",
}
STRIDES = {"in_features", "x_stride", "out_stride"}
ALIGNED = {"x_ptr", "out_ptr", "arena_ptr", "records_ptr", "entries_ptr", "tiles_ptr", "h_ptr", "h_row_stride"}


def machine_code(kernel, dtype, constants, config, capability: int, *, aligned: bool) -> str:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = FIXED_POINTERS.get(name, POINTERS[dtype])
        else:
            signature[name] = "i32"
    divisible = ALIGNED | STRIDES if aligned else ALIGNED
    attributes = {
        (position,): [["tt.divisibility", 16]] for position, name in enumerate(kernel.arg_names) if name in divisible
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["sass"]


def check_code(code: str, dtype: torch.dtype) -> None:
    assert "EXIT" in code
    assert "STL" not in code, "registers spill to local memory"
    assert "LDL" not in code, "registers spill to local memory"
    assert ("HMMA" in code or "HGMMA" in code) == (dtype != torch.float32)


def grid(full: list[tuple[int, int]]) -> list[tuple[torch.dtype, int, int]]:
    """All pairs for two dtypes; the first one for float16, whose code is bfloat16's but for the instructions' type."""
    return [(dtype, *pair) for dtype in POINTERS for pair in (full[:1] if dtype == torch.float16 else full)]


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize(("dtype", "in_features", "partials"), grid([(4096, True), (4096, False), (2049, True)]))
def test_shrink(name: str, dtype: torch.dtype, capability: int, in_features: int, partials: bool) -> None:
    config = getattr(variants(dtype), name).shrink
    columns, splits = split_columns(in_features, config.block_k)
    aligned = in_features % config.block_k == 0
    constants = {
        "SPLIT_K": columns,
        "NUM_SPLITS": splits,
        "PARTIALS": partials,
        "EVEN_K": aligned,
        "ALIGN": 16 // dtype.itemsize,
        "BLOCK_M": config.block_m,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
    }
    code = machine_code(shrink_kernel, dtype, constants, config, capability, aligned=aligned)
    check_code(code, dtype)
    if aligned:
        assert re.search(r"LDG(STS)?\.E\S*\.128", code), "loads are narrower than 16 bytes"


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize(("dtype", "out_align", "partials"), grid([(True, 8), (True, 1), (False, 8)]))
def test_expand(name: str, dtype: torch.dtype, capability: int, out_align: bool, partials: int) -> None:
    config = getattr(variants(dtype), name).expand
    constants = {
        "NUM_PARTIALS": partials,
        "ALIGN": 16 // dtype.itemsize,
        "OUT_ALIGN": 16 // dtype.itemsize if out_align else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block_n,
    }
    code = machine_code(expand_kernel, dtype, constants, config, capability, aligned=out_align)
    check_code(code, dtype)
    if out_align:
        assert re.search(r"LDG(STS)?\.E\S*\.128", code), "loads are narrower than 16 bytes"
