"""The correctness grid of the attention kernels on a card, and their replay from a captured graph."""

from dataclasses import replace

import pytest
import torch

from loramux.kernels.attention import AttentionBatch, AttentionShape, attend_reference, make_backend, write_reference
from loramux.kernels.attention.cases import (
    Case,
    Step,
    alone,
    check,
    large_cases,
    make_step,
    relative_error,
    run,
    small_cases,
)
from loramux.kernels.attention.triton_backend import TritonAttentionBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [*small_cases(), *large_cases()]
LLAMA = AttentionShape(32, 8, 128, 128)
DECODES = Case("decodes", LLAMA, tuple((1, context) for context in (1, 17, 256, 1000, 3000, 9001)))


def backend_of(case: Case, dtype: torch.dtype) -> TritonAttentionBackend:
    backend = make_backend(
        [case.shape], dtype=dtype, device="cuda", block_size=case.block_size, limits=case.limits
    )  # fmt: skip
    assert isinstance(backend, TritonAttentionBackend)
    backend._parts.fill_(torch.nan)
    backend._stats.fill_(torch.nan)
    return backend


def only(step: Step, number: int, k: torch.Tensor, v: torch.Tensor) -> Step:
    """The step of one of its decodes, with caches that already hold everything."""
    one = slice(number, number + 1)
    batch = AttentionBatch(
        step.batch.query_lens[one], step.batch.contexts[one], step.batch.tables[one], step.batch.slots[one]
    )
    return replace(step, batch=batch, q=step.q[one], k=k, v=v, key=step.key[one], value=step.value[one])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert check(backend_of(case, dtype), case, dtype, torch.device("cuda")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 512])
def test_a_decode_does_not_depend_on_the_rest_of_the_batch(window: int | None, dtype: torch.dtype) -> None:
    together = replace(DECODES, window=window)
    step, device = make_step(together, dtype), torch.device("cuda")
    out, k, v = run(backend_of(together, dtype), together, step, device)
    for number in range(len(together.sequences)):
        single, own = alone(together, number), only(step, number, k, v)
        for rows in (None, 3):
            result, _, _ = run(backend_of(single, dtype), single, own, device, decode_rows=rows)
            assert torch.equal(result[0], out[number])


def test_a_captured_graph_serves_later_plans() -> None:
    case, device, dtype = DECODES, torch.device("cuda"), torch.bfloat16
    backend = backend_of(case, dtype)
    rows = len(case.sequences)
    step = make_step(case, dtype)
    k, v = step.k.to(device), step.v.to(device)
    q, key, value = (tensor.to(device) for tensor in (step.q, step.key, step.value))
    out = torch.full((rows, LLAMA.heads, LLAMA.v_dim), torch.nan, dtype=dtype, device=device)

    def launch(batch: AttentionBatch) -> None:
        plan = backend.plan(batch, decode_rows=rows)
        backend.write(k, v, key, value, plan)
        backend.attend(q, k, v, plan, case.scale, out=out)

    launch(step.batch)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    plan = backend.plan(step.batch, decode_rows=rows)
    with torch.cuda.graph(graph):
        backend.write(k, v, key, value, plan)
        backend.attend(q, k, v, plan, case.scale, out=out)
    expected_k, expected_v = step.k.clone(), step.v.clone()
    write_reference(expected_k, expected_v, step.key, step.value, step.batch)
    for order in (range(rows), range(rows - 1, -1, -1), (3, 1)):
        chosen = AttentionBatch(*([field[i] for i in order] for field in (
            step.batch.query_lens, step.batch.contexts, step.batch.tables, step.batch.slots,
        )))  # fmt: skip
        index = torch.tensor(list(order))
        for static, source in ((q, step.q), (key, step.key), (value, step.value)):
            static.fill_(torch.nan)
            static[: len(index)] = source[index].to(device)
        backend.plan(chosen, decode_rows=rows)
        out.fill_(torch.nan)
        graph.replay()
        expected = attend_reference(step.q[index], expected_k, expected_v, chosen, case.scale)
        assert relative_error(out[: len(index)].cpu(), expected) <= TOLERANCE[dtype]
        assert not out[len(index) :].any()
