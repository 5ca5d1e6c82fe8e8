"""The flashinfer backend's write by the Triton kernel, under Triton's interpreter. Collected by `test_flashinfer.py`,
which runs this file in a process of its own: the interpreter is chosen when triton is imported."""

import sys
from dataclasses import replace

import pytest
import torch
from support.flashinfer import fake_flashinfer

from loramux.kernels.attention import AttentionShape
from loramux.kernels.attention.cases import check, small_cases
from loramux.kernels.attention.flashinfer_backend import FlashInferAttentionBackend
from loramux.kernels.attention.kv_launch import write_kv

CPU = torch.device("cpu")
CASES = {case.name: replace(case, shape=AttentionShape(6, 2, 64, 64)) for case in small_cases()}


@pytest.mark.parametrize(("name", "rows"), [("window", None), ("block-size-7", None), ("decode", None), ("decode", 5)])
def test_the_triton_write_fills_the_steps_slots_only(
    name: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    case = CASES[name]
    backend = FlashInferAttentionBackend(
        [case.shape], dtype=torch.float16, device=CPU, block_size=case.block_size, limits=case.limits, write=write_kv
    )
    assert check(backend, case, torch.float16, CPU, decode_rows=rows) <= 2e-3


def test_keys_that_do_not_fit_are_refused() -> None:
    cache, rows = torch.zeros(2, 4, 2, 8), torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match=r"keys \(3, 1, 8\) and values \(3, 2, 8\) do not fit"):
        write_kv(cache, cache, rows[:, :1], rows, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"keys \(3, 2, 8\) and values \(2, 2, 8\) do not fit"):
        write_kv(cache, cache, rows, rows[:2], torch.zeros(3, dtype=torch.int32))
