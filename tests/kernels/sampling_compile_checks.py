"""Compiles the sampling kernels without a card and reads the machine code. Collected by `test_sampling_kernels.py`, in
a process without TRITON_INTERPRET, which would exclude compiling."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux.kernels.sampling.digits import count_digit_kernel, threshold_kernel
from loramux.kernels.sampling.thresholds import BLOCK, CHUNK, WARPS

TYPES = {
    "counts_ptr": "*i64", "logits_ptr": "*fp32", "tops_ptr": "*fp32", "top_k_ptr": "*fp64", "top_p_ptr": "*fp64",
    "out_ptr": "*fp32",
}  # fmt: skip
COUNTING = [{"MASS": False, "AFTER": False}, {"MASS": True, "AFTER": False}, {"MASS": True, "AFTER": True}]


def machine_code(kernel, constants: dict, capability: int, warps: int) -> str:
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    code = result.asm["sass"]
    assert "EXIT" in code or capability == 100  # where the disassembler of triton 3.6 stops early
    assert "STL" not in code, "registers spill to local memory"
    assert "LDL" not in code, "registers spill to local memory"
    return code


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_they_compile_without_spills(capability: int) -> None:
    for variant in COUNTING:
        code = machine_code(count_digit_kernel, {**variant, "BLOCK": BLOCK, "CHUNK": CHUNK}, capability, WARPS)
        assert "RED" in code or "ATOM" in code
    for has_k, has_p in ((True, True), (True, False), (False, True)):
        machine_code(threshold_kernel, {"HAS_K": has_k, "HAS_P": has_p}, capability, 1)
