"""Compiles the kernels for any card, here or not, and says what the machine code is like.

Not possible in a process that runs under TRITON_INTERPRET.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.dense.launch import GROUP

from .arena import ALIGNMENT_BYTES
from .expand import expand_kernel
from .fold import fold_kernel
from .fold_launch import fold_options
from .launch import (
    MOST_REGISTERS,
    SCALE_ELEMENTS,
    SEARCH_RECORDS,
    ExpandConfig,
    FoldConfig,
    ShrinkConfig,
    split_columns,
)
from .scale import scale_kernel
from .shrink import shrink_kernel

CAPABILITIES = (80, 90, 100)
"""What kernels are held to compile for: Ampere, Hopper and Blackwell data-centre cards."""
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory of a program at most. Code for 8.0 must also fit cards of capability 8.6 and 8.9."""

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_FIXED_POINTERS = {
    "offsets_ptr": "*i64",
    "ranks_ptr": "*i32",
    "scales_ptr": "*fp32",
    "records_ptr": "*i32",
    "entries_ptr": "*i32",
    "tiles_ptr": "*i32",
    "h_ptr": "*fp32",
    "first_records_ptr": "*i32",
    "second_records_ptr": "*i32",
    "first_h_ptr": "*fp32",
    "second_h_ptr": "*fp32",
    "gates_ptr": "*fp32",
}
_ALIGNED = {
    "x_ptr", "out_ptr", "weight_ptr", "bias_ptr", "arena_ptr", "records_ptr", "first_records_ptr",
    "second_records_ptr", "entries_ptr", "tiles_ptr", "h_ptr", "first_h_ptr", "second_h_ptr", "h_row_stride",
}  # fmt: skip
_ALIGNED_NUMBERS = {"in_features", "x_stride", "out_stride"}


@dataclass(frozen=True, slots=True)
class Code:
    """What a kernel compiles to for a card of a capability; `shared` is its bytes of shared memory."""

    ptx: str
    sass: str
    shared: int
    capability: int

    @property
    def fits(self) -> bool:
        """Whether it finds its shared memory on every card of that capability."""
        return self.shared <= SHARED_BYTES[self.capability]

    @property
    def spills(self) -> bool:
        """Whether registers spill to local memory."""
        return re.search(r"\b(STL|LDL)\b", self.sass) is not None

    @property
    def uses_matrix_units(self) -> bool:
        """Whether there is a tensor core instruction of Ampere, Hopper or Blackwell."""
        return re.search(r"HMMA|HGMMA|UTC\w*MMA", self.sass) is not None

    @property
    def has_wide_loads(self) -> bool:
        """Whether some loads are of 16 bytes."""
        return re.search(r"LDG(STS)?\.E\S*\.128", self.sass) is not None


def compile_shrink(
    dtype: torch.dtype, config: ShrinkConfig, in_features: int, capability: int, *, partials: bool = True,
    strided: bool = False, dependents: bool = False,
) -> Code:  # fmt: skip
    """The shrink of sites with so many inputs."""
    columns, splits = split_columns(in_features, config.block_k)
    even = in_features % config.block_k == 0
    constants = {
        "SPLIT_K": columns,
        "NUM_SPLITS": splits,
        "PARTIALS": partials,
        "EVEN_K": even,
        "ALIGN": ALIGNMENT_BYTES // dtype.itemsize,
        "STRIDED": strided,
        "DEPENDENTS": dependents,
        "BLOCK_M": config.block_m,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compile(shrink_kernel, dtype, constants, options, capability, aligned=even)


def compile_expand(
    dtype: torch.dtype, config: ExpandConfig, capability: int, *, aligned: bool = True, partials: int = 8,
    strided: bool = False, scaled: bool = False, gates: bool = False, dependent: bool = False,
) -> Code:  # fmt: skip
    """The expand of sites whose widths are multiples of 16 bytes (`aligned`) or odd, over so many partial sums."""
    align = ALIGNMENT_BYTES // dtype.itemsize
    constants = {
        "NUM_PARTIALS": partials,
        "ALIGN": align,
        "OUT_ALIGN": align if aligned else 1,
        "STRIDED": strided,
        "SCALED": scaled,
        "GATES": gates,
        "DEPENDENT": dependent,
        "BLOCK_M": config.block_m,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block_n,
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": dependent,
        "maxnreg": MOST_REGISTERS,
    }
    return _compile(expand_kernel, dtype, constants, options, capability, aligned=aligned)


def compile_fold(
    dtype: torch.dtype, config: FoldConfig, in_features: int, capability: int, *, aligned: bool = True,
    partials: tuple[int, int] = (8, 0), scaled: bool = False, gates: bool = False, dependent: bool = False,
) -> Code:  # fmt: skip
    """The folded projection with a bias, over so many partial sums of each variant."""
    align = ALIGNMENT_BYTES // dtype.itemsize
    first, second = partials
    options: dict[str, Any] = fold_options(config, dependent=dependent)
    constants = {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")} | {
        "FIRST_PARTIALS": first,
        "SECOND_PARTIALS": second,
        "HAS_BIAS": True,
        "EVEN_K": in_features % config.block_k == 0,
        "ALIGN": align,
        "OUT_ALIGN": align if aligned else 1,
        "SCALED": scaled,
        "GATES": gates,
        "DEPENDENT": dependent,
        "GROUP": GROUP,
        "SEARCH": SEARCH_RECORDS,
    }
    return _compile(fold_kernel, dtype, constants, options, capability, aligned=aligned)


def compile_scale(dtype: torch.dtype, block_m: int, capability: int) -> Code:
    """The input scaling, with gates, at the rows of a variant's tiles."""
    constants = {
        "ALIGN": ALIGNMENT_BYTES // dtype.itemsize,
        "GATES": True,
        "BLOCK_M": block_m,
        "BLOCK_N": SCALE_ELEMENTS // block_m,
    }
    return _compile(scale_kernel, dtype, constants, {}, capability, aligned=True)


def _compile(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, Any], capability: int, *,
    aligned: bool,
) -> Code:  # fmt: skip
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _FIXED_POINTERS.get(name, _POINTERS[dtype])
        else:
            signature[name] = "i32"
    divisible = _ALIGNED | _ALIGNED_NUMBERS if aligned else _ALIGNED
    attributes = {
        (position,): [["tt.divisibility", 16]] for position, name in enumerate(kernel.arg_names) if name in divisible
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Code(result.asm["ptx"], result.asm["sass"], result.metadata.shared, capability)
