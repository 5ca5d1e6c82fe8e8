"""Compiles the attention kernels without a card and reads the machine code. Collected by `test_attention_compile.py`,
in a process without TRITON_INTERPRET, which would exclude compiling."""

import itertools
import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.attention import AttentionLimits, AttentionShape, make_backend
from loramux.kernels.attention.decode import decode_kernel, reduce_kernel
from loramux.kernels.attention.kv_write import kv_write_kernel
from loramux.kernels.attention.launch import MIN_SPLIT, SPLITS_AT_ONCE, shape_config, write_block
from loramux.kernels.attention.prefill import prefill_kernel

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FIXED_POINTERS = {
    "parts_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "tables_ptr": "*i32",
    "contexts_ptr": "*i32",
    "first_entries_ptr": "*i32",
    "slots_ptr": "*i32",
    "tiles_ptr": "*i32",
}
LLAMA, QWEN = AttentionShape(32, 8, 128, 128), AttentionShape(14, 2, 64, 64)
GEMMA, PHI = AttentionShape(8, 4, 256, 256), AttentionShape(32, 32, 80, 80)
PLAIN, FEATURES = (False, False, False), (True, True, True)
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Per program. Code for 8.0 must also fit cards of capability 8.6 and 8.9."""
# Every entry of the table of tiles; float16's code is bfloat16's but for the instructions' type.
SAMPLE = [
    (LLAMA, torch.bfloat16, 80, PLAIN),
    (LLAMA, torch.bfloat16, 90, PLAIN),
    (LLAMA, torch.bfloat16, 100, PLAIN),
    (LLAMA, torch.float32, 90, PLAIN),
    (QWEN, torch.bfloat16, 90, FEATURES),
    (QWEN, torch.float32, 90, PLAIN),
    (GEMMA, torch.bfloat16, 80, FEATURES),
    (GEMMA, torch.bfloat16, 90, FEATURES),
    (GEMMA, torch.float32, 80, FEATURES),
    (PHI, torch.bfloat16, 80, FEATURES),
]
ALL = itertools.product((LLAMA, QWEN, GEMMA, PHI), (torch.bfloat16, torch.float32), (80, 90, 100), (PLAIN, FEATURES))
VARIANTS = [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in SAMPLE)]
"""The rest of the product only for `pytest -m slow`."""


def machine_code(kernel, dtype, constants, config, capability: int) -> str:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = FIXED_POINTERS.get(name, POINTERS[dtype])
        else:
            signature[name] = "fp32" if name in ("inner", "coefficient") else "i32"
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_stride"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps, stages = config
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    code = compiled.asm["sass"]
    assert "EXIT" in code or capability == 100  # where the disassembler of triton 3.6 stops early
    assert "STL" not in code, "registers spill to local memory"
    assert "LDL" not in code, "registers spill to local memory"
    assert not re.search(r"\b(ATOMG?|REDG?)\b", code), "atomics on global memory"
    return code


def layer_constants(shape: AttentionShape, config, window: bool, softcap: bool) -> dict:
    return {
        "GROUP": shape.group,
        "K_DIM": shape.k_dim,
        "V_DIM": shape.v_dim,
        "KV_HEADS": shape.kv_heads,
        "BLOCK_SIZE": 16,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "BLOCK_D": config.block_d,
        "BLOCK_V": config.block_v,
    }


def check_products(code: str, dtype: torch.dtype, units: str) -> None:
    assert bool(re.search(units, code)) == (dtype != torch.float32)
    assert re.search(r"LDG(STS)?\.E\S*\.128", code), "loads are narrower than 16 bytes"
    assert re.search(r"LDGSTS\.E\S*\.128", code) or dtype == torch.float32, "keys are not loaded ahead"


def ids(value: object) -> str | None:
    if isinstance(value, AttentionShape):
        return f"{value.heads}x{value.kv_heads}x{value.k_dim}"
    if isinstance(value, tuple):
        return "features" if value[0] else "plain"
    return None


@pytest.mark.parametrize(("shape", "dtype", "capability", "features"), VARIANTS, ids=ids)
def test_prefill(shape: AttentionShape, dtype: torch.dtype, capability: int, features: tuple) -> None:
    config = shape_config(shape, dtype, capability)
    window, softcap, sinks = features
    constants = {
        **layer_constants(shape, config, window, softcap),
        "HAS_SINKS": sinks,
        "BLOCK_M": config.prefill.block_m,
        "BLOCK_N": config.prefill.block_n,
    }
    options = (config.prefill.num_warps, config.prefill.num_stages)
    code = machine_code(prefill_kernel, dtype, constants, options, capability)
    check_products(code, dtype, {80: "HMMA", 90: "HGMMA", 100: "UTC.?HMMA"}[capability])


@pytest.mark.parametrize(("shape", "dtype", "capability", "features"), VARIANTS, ids=ids)
def test_decode(shape: AttentionShape, dtype: torch.dtype, capability: int, features: tuple) -> None:
    config = shape_config(shape, dtype, capability)
    window, softcap, _ = features
    constants = {
        **layer_constants(shape, config, window, softcap),
        "MIN_SPLIT": MIN_SPLIT,
        "MAX_SPLITS": config.max_splits,
        "HEAD_TILES": config.head_tiles,
        "BLOCK_M": config.decode.block_m,
        "BLOCK_N": config.decode.block_n,
    }
    options = (config.decode.num_warps, config.decode.num_stages)
    check_products(machine_code(decode_kernel, dtype, constants, options, capability), dtype, "HMMA")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=ids)
def test_reduce(shape: AttentionShape, capability: int) -> None:
    config = shape_config(shape, torch.bfloat16, capability)
    constants = {
        "V_DIM": shape.v_dim,
        "HAS_WINDOW": True,
        "HAS_SINKS": True,
        "MIN_SPLIT": MIN_SPLIT,
        "MAX_SPLITS": config.max_splits,
        "SPLITS_AT_ONCE": SPLITS_AT_ONCE,
        "BLOCK_N": config.decode.block_n,
        "BLOCK_V": config.block_v,
    }
    machine_code(reduce_kernel, torch.bfloat16, constants, (4, 3), capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", [LLAMA, PHI], ids=ids)
def test_kv_write(shape: AttentionShape, capability: int) -> None:
    width = shape.kv_heads * shape.k_dim
    constants = {"KV_HEADS": shape.kv_heads, "K_DIM": shape.k_dim, "V_DIM": shape.v_dim, "BLOCK": write_block(width)}
    code = machine_code(kv_write_kernel, torch.bfloat16, constants, (4, 3), capability)
    assert re.search(r"STG\.E\S*\.128", code), "stores are narrower than 16 bytes"


def test_a_cpu_is_refused_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match="do not run on cpu"):
        make_backend([LLAMA], dtype=torch.float32, device="cpu", block_size=16, limits=AttentionLimits(1, 1, 1))
