"""Compiles every kernel variant without a card and reads the machine code. Collected by `test_triton_compile.py`, in a
process without TRITON_INTERPRET, which would exclude compiling."""

import re
from pathlib import Path

import pytest
import torch

from loramux.kernels.lora.ahead import CAPABILITIES, Code, compile_expand, compile_scale, compile_shrink
from loramux.kernels.lora.launch import VARIANTS, Entry, default_entries, dtype_name
from loramux.kernels.lora.table import DTYPES, TABLES, load_table


def check_code(code: Code, dtype: torch.dtype, *, wide: bool = True) -> None:
    assert "EXIT" in code.sass
    assert not code.spills, "registers spill to local memory"
    assert code.uses_matrix_units == (dtype != torch.float32)
    assert code.has_wide_loads or not wide, "loads are narrower than 16 bytes"


def grid(full: list[tuple[int, int]]) -> list[tuple[torch.dtype, int, int]]:
    """All pairs for bfloat16; the first for the others: float16's code is bfloat16's but for the instructions' type."""
    return [(dtype, *pair) for dtype in DTYPES for pair in (full if dtype == torch.bfloat16 else full[:1])]


def default(dtype: torch.dtype, variant: str) -> Entry:
    return next(entry for entry in default_entries(dtype) if entry.variant == variant)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "in_features", "partials"), grid([(4096, True), (4096, False), (2049, True)]))
def test_shrink(variant: str, dtype: torch.dtype, capability: int, in_features: int, partials: bool) -> None:
    code = compile_shrink(dtype, default(dtype, variant).shrink, in_features, capability, partials=partials)
    check_code(code, dtype, wide=in_features == 4096)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "aligned", "partials"), grid([(True, 8), (True, 1), (False, 8)]))
def test_expand(variant: str, dtype: torch.dtype, capability: int, aligned: bool, partials: int) -> None:
    code = compile_expand(dtype, default(dtype, variant).expand, capability, aligned=aligned, partials=partials)
    check_code(code, dtype, wide=aligned)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_padded_launches(capability: int) -> None:
    dtype, entry = torch.bfloat16, default(torch.bfloat16, "decode")
    check_code(compile_shrink(dtype, entry.shrink, 4096, capability, strided=True), dtype)
    check_code(compile_expand(dtype, entry.expand, capability, strided=True), dtype)
    check_code(compile_expand(dtype, entry.expand, capability, strided=True, scaled=True, gates=True), dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_expand_with_gates_and_scales(variant: str, capability: int) -> None:
    dtype = torch.bfloat16
    check_code(compile_expand(dtype, default(dtype, variant).expand, capability, scaled=True, gates=True), dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_input_scaling(variant: str, capability: int) -> None:
    code = compile_scale(torch.bfloat16, default(torch.bfloat16, variant).shrink.block_m, capability)
    assert not code.spills
    assert code.has_wide_loads


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dependent_expand_reads_nothing_of_the_shrink_before_it_waits(variant: str, capability: int) -> None:
    dtype, entry = torch.bfloat16, default(torch.bfloat16, variant)
    before = compile_shrink(dtype, entry.shrink, 4096, capability, dependents=True)
    check_code(before, dtype)
    assert before.ptx.count("griddepcontrol.launch_dependents") == 1
    after = compile_expand(dtype, entry.expand, capability, dependent=True)
    check_code(after, dtype)
    early, waited, late = after.ptx.partition("griddepcontrol.wait")
    assert waited
    assert not re.search(r"cp\.async|(ld|st)\.global", early)
    assert "ld.global" in late
    assert "st.global" in late


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_table_entries(path: Path, capability: int) -> None:
    """Every shipped entry; nothing to do while no table is shipped."""
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
    for entry in load_table(path).entries:
        dtype = dtypes[entry.dtype]
        check_code(compile_shrink(dtype, entry.shrink, 4096, capability), dtype)
        check_code(compile_expand(dtype, entry.expand, capability), dtype)
