"""Compiles every kernel variant without a card and reads the machine code. Collected by `test_triton_compile.py`, in a
process without TRITON_INTERPRET, which would exclude compiling."""

import re
from pathlib import Path

import pytest
import torch

from loramux.kernels.lora.ahead import CAPABILITIES, Code, compile_expand, compile_fold, compile_scale, compile_shrink
from loramux.kernels.lora.launch import VARIANTS, Entry, FoldConfig, default_entries, default_folds, dtype_name
from loramux.kernels.lora.table import DTYPES, TABLES, load_table

CARDS = [pytest.param(c, marks=pytest.mark.slow) if c == 100 else c for c in CAPABILITIES]
"""What is said of sm_100 in the tests below that name it is checked always, the rest with the slow suites."""


def check_code(code: Code, dtype: torch.dtype, *, wide: bool = True) -> None:
    assert "EXIT" in code.sass
    assert code.fits, f"{code.shared} bytes of shared memory"
    assert not code.spills, "registers spill to local memory"
    assert code.uses_matrix_units == (dtype != torch.float32)
    assert code.has_wide_loads or not wide, "loads are narrower than 16 bytes"


def grid(full: list[tuple[int, int]]) -> list[tuple[torch.dtype, int, int]]:
    """All pairs for bfloat16; the first for the others: float16's code is bfloat16's but for the instructions' type."""
    return [(dtype, *pair) for dtype in DTYPES for pair in (full if dtype == torch.bfloat16 else full[:1])]


def default(dtype: torch.dtype, variant: str) -> Entry:
    return next(entry for entry in default_entries(dtype) if entry.variant == variant)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "in_features", "partials"), grid([(4096, True), (4096, False), (2049, True)]))
def test_shrink(variant: str, dtype: torch.dtype, capability: int, in_features: int, partials: bool) -> None:
    code = compile_shrink(dtype, default(dtype, variant).shrink, in_features, capability, partials=partials)
    check_code(code, dtype, wide=in_features == 4096)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "aligned", "partials"), grid([(True, 8), (True, 1), (False, 8)]))
def test_expand(variant: str, dtype: torch.dtype, capability: int, aligned: bool, partials: int) -> None:
    code = compile_expand(dtype, default(dtype, variant).expand, capability, aligned=aligned, partials=partials)
    check_code(code, dtype, wide=aligned)


@pytest.mark.parametrize("capability", CARDS)
def test_padded_launches(capability: int) -> None:
    dtype, entry = torch.bfloat16, default(torch.bfloat16, "decode")
    check_code(compile_shrink(dtype, entry.shrink, 4096, capability, strided=True), dtype)
    check_code(compile_expand(dtype, entry.expand, capability, strided=True), dtype)
    check_code(compile_expand(dtype, entry.expand, capability, strided=True, scaled=True, gates=True), dtype)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_expand_with_gates_and_scales(variant: str, capability: int) -> None:
    dtype = torch.bfloat16
    check_code(compile_expand(dtype, default(dtype, variant).expand, capability, scaled=True, gates=True), dtype)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_input_scaling(variant: str, capability: int) -> None:
    code = compile_scale(torch.bfloat16, default(torch.bfloat16, variant).shrink.block_m, capability)
    assert not code.spills
    assert code.has_wide_loads


FOLDS = [(torch.bfloat16, config) for _, config in default_folds(torch.bfloat16)]
MOST = {"partials": (8, 1), "scaled": True, "gates": True}
"""All that an epilogue can have to do: records of both variants, scale vectors and gates."""


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize(
    ("dtype", "config"), [*FOLDS, *((torch.float32, config) for _, config in default_folds(torch.float32))], ids=str
)
def test_folded_projections(dtype: torch.dtype, config: FoldConfig, capability: int) -> None:
    check_code(compile_fold(dtype, config, 4096, capability, **MOST), dtype)
    if dtype is torch.bfloat16:
        check_code(compile_fold(dtype, config, 4096, capability), dtype)


def test_folded_projections_of_odd_shapes_and_float16() -> None:
    for dtype, config in FOLDS:
        check_code(compile_fold(dtype, config, 2049, 90, aligned=False), dtype, wide=False)
    check_code(compile_fold(torch.float16, FOLDS[-1][1], 2880, 90), torch.float16)


@pytest.mark.parametrize(("capability", "unit"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTC.?HMMA")])
def test_long_folded_steps_use_the_cards_own_matrix_units(capability: int, unit: str) -> None:
    assert re.search(unit, compile_fold(torch.bfloat16, FOLDS[-1][1], 4096, capability).sass)


@pytest.mark.parametrize("capability", [90, 100])
def test_a_dependent_fold_multiplies_before_it_waits_and_reads_nothing_of_the_shrink(capability: int) -> None:
    dtype, config = FOLDS[0]
    code = compile_fold(dtype, config, 4096, capability, dependent=True)
    check_code(code, dtype)
    early, waited, late = code.ptx.partition("griddepcontrol.wait")
    assert waited
    assert "mma" in early
    assert not re.search(r"st\.global", early)
    assert "st.global" in late
    argument = re.search(r"(\w+_param_12)\b", code.ptx)  # first_h_ptr
    assert argument
    register = re.search(rf"ld\.param\.b64\s+(%rd\d+), \[{argument[1]}\]", code.ptx)
    assert register
    assert not re.search(rf"ld\.global[^;]*\[{register[1]}\b", early)


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


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_table_entries(path: Path, capability: int) -> None:
    """Every shipped entry; nothing to do while no table is shipped."""
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
    table = load_table(path)
    for entry in table.entries:
        dtype = dtypes[entry.dtype]
        check_code(compile_shrink(dtype, entry.shrink, 4096, capability), dtype)
        check_code(compile_expand(dtype, entry.expand, capability), dtype)
    for fold in table.folds:
        dtype = dtypes[fold.dtype]
        check_code(compile_fold(dtype, fold.fold, fold.in_features, capability, **MOST), dtype)
