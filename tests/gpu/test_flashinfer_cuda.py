"""The flashinfer backend on a card, where the library is installed: the grid, and a captured graph."""

import importlib.util
from typing import Any

import pytest
import torch

from loramux.kernels.attention import AttentionBackend, AttentionBatch, attend_reference, make_backend, write_reference
from loramux.kernels.attention.cases import Case, check, large_cases, make_step, relative_error, small_cases
from loramux.kernels.attention.flashinfer_backend import HEAD_DIMS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs flashinfer"),
]

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    case for case in (*small_cases(), *large_cases())
    if case.shape.k_dim == case.shape.v_dim and case.shape.k_dim in HEAD_DIMS
]  # fmt: skip
DECODE = next(case for case in CASES if case.name == "llama-decode")


def backend_of(case: Case, dtype: torch.dtype) -> AttentionBackend:
    return make_backend(
        [case.shape], dtype=dtype, device="cuda", block_size=case.block_size, limits=case.limits,
        implementation="flashinfer",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert check(backend_of(case, dtype), case, dtype, torch.device("cuda")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["llama-decode", "qwen-decode"])
def test_padded_decodes_match_the_reference(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    rows = len(case.sequences) + 2
    assert check(backend_of(case, dtype), case, dtype, torch.device("cuda"), decode_rows=rows) <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 20.0}], ids=str)
def test_a_captured_graph_serves_later_plans(options: dict[str, Any]) -> None:
    case, device, dtype = DECODE, torch.device("cuda"), torch.bfloat16
    rows = len(case.sequences)
    backend, step = backend_of(case, dtype), make_step(case, dtype)
    write_reference(step.k, step.v, step.key, step.value, step.batch)
    k, v, q = step.k.to(device), step.v.to(device), step.q.to(device)
    sinks = torch.randn(case.shape.heads, generator=torch.Generator().manual_seed(1))
    static, out = q.clone(), torch.full_like(q, torch.nan)
    plan = backend.plan(AttentionBatch([], [], [], []), decode_rows=rows)
    backend.attend(static, k, v, plan, case.scale, sinks=sinks.to(device), out=out, **options)  # compiles
    moved = sinks.to(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.attend(static, k, v, plan, case.scale, sinks=moved, out=out, **options)
    for order in (range(rows), range(rows - 1, -1, -1), (3, 1)):
        chosen = AttentionBatch(*([field[i] for i in order] for field in (
            step.batch.query_lens, step.batch.contexts, step.batch.tables, step.batch.slots,
        )))  # fmt: skip
        index = torch.tensor(list(order))
        static.fill_(torch.nan)
        static[: len(index)] = q[index.to(device)]
        backend.plan(chosen, decode_rows=rows)
        out.fill_(torch.nan)
        graph.replay()
        expected = attend_reference(step.q[index], step.k, step.v, chosen, case.scale, sinks=sinks, **options)
        assert relative_error(out[: len(index)].cpu(), expected) <= TOLERANCE[dtype]
        assert not out[len(index) :].any()
