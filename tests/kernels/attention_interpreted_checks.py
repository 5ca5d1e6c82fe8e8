"""The attention kernels on the CPU, through Triton's interpreter. Collected by `test_attention_interpreter.py`, which
runs this file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from loramux.kernels.attention import AttentionBatch, AttentionLimits, AttentionShape, make_backend
from loramux.kernels.attention.cases import Case, alone, check, make_step, run, small_cases
from loramux.kernels.attention.interface import Ints
from loramux.kernels.attention.triton_backend import TritonAttentionBackend

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = {case.name: case for case in small_cases()}
SPLITS = Case("splits", AttentionShape(6, 2, 24, 40), ((1, 530), (1, 3), (1, 257)))


@pytest.fixture(autouse=True)
def _bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies those integers; widen them to float32 first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def backend_of(
    case: Case, dtype: torch.dtype = torch.float32, limits: AttentionLimits | None = None
) -> TritonAttentionBackend:
    """A backend whose scratch is NaN, so that a read of what nobody wrote shows."""
    backend = make_backend(
        [case.shape], dtype=dtype, device="cpu", block_size=case.block_size, limits=limits or case.limits
    )
    assert isinstance(backend, TritonAttentionBackend)
    backend._parts.fill_(torch.nan)
    backend._stats.fill_(torch.nan)
    return backend


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(case: Case) -> None:
    assert check(backend_of(case), case, torch.float32, CPU) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dim-80", "dim-96-group-7", "window-softcap-sinks", "decode", "many-heads"])
def test_matches_the_reference_in_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert check(backend_of(case, dtype), case, dtype, CPU) <= TOLERANCE[dtype]


@pytest.mark.parametrize("features", [{}, {"window": 300, "softcap": 3.0, "sinks": True}], ids=["plain", "features"])
def test_a_decode_does_not_depend_on_the_rest_of_the_batch(features: dict) -> None:
    together = replace(SPLITS, **features)
    step = make_step(together, torch.float32)
    out, k, v = run(backend_of(together), together, step, CPU)
    for number in range(len(together.sequences)):
        one = slice(number, number + 1)
        batch = AttentionBatch(
            step.batch.query_lens[one],
            step.batch.contexts[one],
            step.batch.tables[one],
            step.batch.slots[one],
        )
        own = replace(step, batch=batch, q=step.q[one], k=k, v=v, key=step.key[one], value=step.value[one])
        single = alone(together, number)
        result, _, _ = run(backend_of(single), single, own, CPU, decode_rows=None if number else 2)
        assert torch.equal(result[0], out[number])


def test_a_prompt_in_chunks_is_the_prompt() -> None:
    case = Case("whole", AttentionShape(6, 2, 32, 32), ((50, 50),), window=40, softcap=4.0, sinks=True)
    step = make_step(case, torch.float32)
    whole, _, _ = run(backend_of(case), case, step, CPU)
    k, v, pieces = step.k, step.v, []
    for first, end in ((0, 7), (7, 32), (32, 33), (33, 50)):
        part = slice(first, end)
        batch = AttentionBatch([end - first], [end], step.batch.tables, step.batch.slots[part])
        piece = replace(step, batch=batch, q=step.q[part], k=k, v=v, key=step.key[part], value=step.value[part])
        out, k, v = run(backend_of(case), replace(case, sequences=((end - first, end),)), piece, CPU)
        pieces.append(out)
    assert torch.allclose(torch.cat(pieces), whole, rtol=0, atol=1e-6)


def test_padding_rows_neither_write_nor_read() -> None:
    case = replace(SPLITS, sinks=True)
    assert check(backend_of(case), case, torch.float32, CPU, decode_rows=4) <= TOLERANCE[torch.float32]


def test_a_captured_step_serves_later_plans() -> None:
    """Launches over `decode_rows` depend on the rows alone: same grids, same buffers, other contents."""
    case = replace(SPLITS, window=100)
    backend = backend_of(case)
    steps = [make_step(case, torch.float32), make_step(alone(case, 1), torch.float32)]
    plans = [backend.plan(step.batch, decode_rows=5) for step in steps]
    fields = [(plan.num_tokens, plan.num_decodes, plan.longest, plan.tiles) for plan in plans]
    assert fields[0] == fields[1] == (5, 5, None, {})
    step = steps[1]
    k, v = step.k.clone(), step.v.clone()
    with pytest.raises(ValueError, match="outdated"):
        backend.write(k, v, step.key, step.value, plans[0])


def test_one_backend_serves_layers_of_different_shapes() -> None:
    shapes = [AttentionShape(6, 2, 32, 32), AttentionShape(4, 4, 16, 48)]
    cases = [Case("layer", shape, ((1, 30), (9, 40), (3, 3))) for shape in shapes]
    backend = make_backend(shapes, dtype=torch.float32, device="cpu", block_size=16, limits=cases[0].limits)
    assert backend.scratch_bytes > 0
    for case in cases:
        assert check(backend, case, torch.float32, CPU) <= TOLERANCE[torch.float32]


def test_keys_outside_of_the_window_are_not_read() -> None:
    case = Case("window", AttentionShape(2, 1, 16, 16), ((1, 600), (3, 130)), window=50, block_size=8)
    step = make_step(case, torch.float32)
    for table, first in zip(step.batch.tables, (600 - 50, 127 - 49), strict=True):
        for position in range(first):
            step.k[table[position // 8], position % 8] = torch.nan
            step.v[table[position // 8], position % 8] = torch.nan
    out, _, _ = run(backend_of(case), case, step, CPU)
    assert not out.isnan().any()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (AttentionBatch([1, 1], [1], [[0], [1]], [0, 16]), "contexts"),
        (AttentionBatch([1] * 5, [1] * 5, [[0]] * 5, [0] * 5), "5 sequences exceed 4"),
        (AttentionBatch([9], [9], [[0]], list(range(9))), "9 tokens exceed 8"),
        (AttentionBatch([2], [2], [[0]], [0]), "2 queries have 1 slots"),
        (AttentionBatch([2], [1], [[0]], [0, 1]), "context"),
        (AttentionBatch([0], [1], [[0]], []), "needs a query"),
        (AttentionBatch([1], [1], [[0]], [-1]), "negative"),
        (AttentionBatch([1], [17], [[0]], [16]), "1 blocks do not hold 17"),
        (AttentionBatch([2, 1], [2, 1], [[0], [1]], [0, 1, 16]), "come first"),
        (AttentionBatch([1], [160], [list(range(10))], [159]), "10 block table entries exceed 9"),
    ],
)
def test_malformed_batches_are_refused(batch: AttentionBatch, message: str) -> None:
    case = replace(SPLITS, sequences=((1, 5),))
    with pytest.raises(ValueError, match=message):
        backend_of(case, limits=AttentionLimits(8, 4, 9)).plan(batch)


@pytest.mark.parametrize("rows", [0, 5])
def test_padding_is_bounded(rows: int) -> None:
    backend = backend_of(SPLITS, limits=AttentionLimits(8, 4, 9))
    with pytest.raises(ValueError, match=f"{rows} decode rows"):
        backend.plan(AttentionBatch([1], [1], [[0]], [0]), decode_rows=rows)
    with pytest.raises(ValueError, match="4 decode rows"):
        backend.plan(AttentionBatch([2], [2], [[0]], [0, 1]), decode_rows=4)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    backend, step = backend_of(SPLITS), make_step(SPLITS, torch.float32)
    plan = backend.plan(step.batch)
    with pytest.raises(ValueError, match="contiguous"):
        backend.attend(step.q, step.k.double(), step.v, plan, 1.0)
    with pytest.raises(ValueError, match="rows were given"):
        backend.attend(step.q[1:], step.k, step.v, plan, 1.0)
    with pytest.raises(ValueError, match="do not belong"):
        backend.attend(step.q[:, :4], step.k, step.v, plan, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        backend.write(step.k, step.v, step.key[:, :1], step.value, plan)
    with pytest.raises(ValueError, match="window"):
        backend.attend(step.q, step.k, step.v, plan, 1.0, window=0)
    with pytest.raises(ValueError, match="positive"):
        backend.attend(step.q, step.k, step.v, plan, -1.0)
    with pytest.raises(ValueError, match="float64"):
        make_backend([SPLITS.shape], dtype=torch.float64, device="cpu", block_size=16, limits=SPLITS.limits)
    with pytest.raises(ValueError, match="evenly"):
        AttentionShape(3, 2, 16, 16)
    with pytest.raises(ValueError, match="257"):
        AttentionShape(2, 2, 16, 257)


def test_host_arrays_may_be_lists_or_arrays() -> None:
    def arrays(values: Ints | list[int]) -> Ints:
        return np.asarray(values, dtype=np.int32)

    case = CASES["ragged-prefill"]
    step = make_step(case, torch.float32)
    batch = AttentionBatch(
        arrays(step.batch.query_lens),
        arrays(step.batch.contexts),
        [arrays([*table, 0, 0]) for table in step.batch.tables],
        arrays(step.batch.slots),
    )
    results = [run(backend_of(case), case, replace(step, batch=given), CPU)[0] for given in (step.batch, batch)]
    assert torch.equal(*results)
