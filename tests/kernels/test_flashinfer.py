"""The flashinfer backend against the reference, over a stand-in for the library: plans, pages, masks and refusals."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import run_checks
from support.engines import make_core
from support.flashinfer import BatchDecodeWithPagedKVCacheWrapper, fake_flashinfer
from support.models import family_config, random_model, save_model
from torch import Tensor

from loramux.kernels.attention import (
    AttentionBatch,
    AttentionLimits,
    AttentionShape,
    attend_reference,
    make_backend,
    write_reference,
)
from loramux.kernels.attention.cases import Case, check, make_step, relative_error, small_cases
from loramux.kernels.attention.flashinfer_backend import RECOMMENDED_WORKSPACE, FlashInferAttentionBackend
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.loading import UnsupportedModelError

CPU = torch.device("cpu")
CHECKS = Path(__file__).with_name("flashinfer_interpreted_checks.py")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    replace(case, shape=AttentionShape(case.shape.heads, case.shape.kv_heads, 64, 64))
    for case in small_cases() if case.name not in ("v-wider", "v-narrower", "dim-1", "dim-256", "many-heads")
]  # fmt: skip
MIXED = Case("mixed", AttentionShape(6, 2, 64, 64), ((1, 40), (1, 5), (7, 7), (5, 38)))
DECODES = Case("decodes", AttentionShape(6, 2, 64, 64), ((1, 1), (1, 17), (1, 300), (1, 32)))


def write(k: Tensor, v: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    live = slots >= 0
    k.flatten(0, 1)[slots[live].long()] = key[live]
    v.flatten(0, 1)[slots[live].long()] = value[live]


def backend_of(case: Case, dtype: torch.dtype = torch.float16, **changes: Any) -> FlashInferAttentionBackend:
    options: dict[str, Any] = {"device": CPU, "block_size": case.block_size, "limits": case.limits, "write": write}
    return FlashInferAttentionBackend([case.shape], dtype=dtype, **options | changes)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_flashinfer()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype, library: Any) -> None:
    assert check(backend_of(case, dtype), case, dtype, CPU) <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.5}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_padded_rows_write_nothing_and_are_zeros(options: dict[str, Any], padding: int, library: Any) -> None:
    case = replace(DECODES, **options)
    rows = len(case.sequences) + padding
    assert check(backend_of(case), case, torch.float16, CPU, decode_rows=rows) <= TOLERANCE[torch.float16]


def test_a_step_of_padding_only_is_zeros(library: Any) -> None:
    backend = backend_of(MIXED)
    step = make_step(MIXED, torch.float16)
    before = step.k.clone()
    plan = backend.plan(AttentionBatch([], [], [], []), decode_rows=3)
    backend.write(step.k, step.v, step.key[:3], step.value[:3], plan)
    assert not backend.attend(step.q[:3], step.k, step.v, plan, 0.1).any()
    assert torch.equal(step.k.nan_to_num(7.0), before.nan_to_num(7.0))


def test_padding_reads_block_0_whatever_earlier_tables_held(library: Any) -> None:
    backend, step = backend_of(MIXED), make_step(MIXED, torch.float16)
    backend.plan(step.batch)
    plan = backend.plan(AttentionBatch([], [], [], []), decode_rows=3)
    assert not backend.attend(step.q[:3], step.k[:1], step.v[:1], plan, 0.1).any()


def test_layers_of_one_kind_share_a_plan_and_each_step_has_its_own(library: Any) -> None:
    backend, step = backend_of(MIXED), make_step(MIXED, torch.float16)
    write_reference(step.k, step.v, step.key, step.value, step.batch)
    kinds: tuple[dict[str, Any], ...] = ({}, {"window": 9}, {"softcap": 2.0}, {"window": 9})
    for number in (1, 2):
        plan = backend.plan(step.batch)
        for kind in kinds:
            backend.attend(step.q, step.k, step.v, plan, 0.1, **kind)
        assert [wrapper.plans for wrapper in library.made] == [number] * 6  # three kinds; decodes apart from the rest
    backend.attend(step.q, step.k, step.v, plan, 0.2)
    assert [wrapper.plans for wrapper in library.made] == [2] * 6 + [1] * 2


def test_a_later_plan_reaches_a_captured_run(library: Any) -> None:
    """A graph holds the library's launches only: what it reads must be new after `plan`, without `attend`."""
    case, rows = DECODES, 5
    backend, step = backend_of(case), make_step(case, torch.float16)
    write_reference(step.k, step.v, step.key, step.value, step.batch)
    q = torch.cat([step.q, step.q[:1]])
    out = torch.empty_like(q)
    for kind in ({}, {"window": 9}):
        backend.attend(q, step.k, step.v, backend.plan(step.batch, decode_rows=rows), case.scale, out=out, **kind)
    for order in ((3, 1), (2,), (0, 1, 2, 3)):
        chosen = AttentionBatch(*([field[i] for i in order] for field in (
            step.batch.query_lens, step.batch.contexts, step.batch.tables, step.batch.slots,
        )))  # fmt: skip
        q[: len(order)] = step.q[list(order)]
        backend.plan(chosen, decode_rows=rows)
        for wrapper, window in zip(library.made, (None, 9), strict=True):
            wrapper.runs[0]()
            expected = attend_reference(q[: len(order)], step.k, step.v, chosen, case.scale, window)
            assert relative_error(out[: len(order)], expected) <= TOLERANCE[torch.float16]


def test_row_counts_have_wrappers_of_their_own(library: Any) -> None:
    backend, step = backend_of(DECODES), make_step(DECODES, torch.float16)
    write_reference(step.k, step.v, step.key, step.value, step.batch)
    held = []
    for rows in (6, 5, 6, None):
        q = torch.cat([step.q, step.q])[: rows or 4]
        out = backend.attend(q, step.k, step.v, backend.plan(step.batch, decode_rows=rows), DECODES.scale)
        expected = attend_reference(step.q, step.k, step.v, step.batch, DECODES.scale)
        assert relative_error(out[:4], expected) <= TOLERANCE[torch.float16]
        held.append(backend.scratch_bytes)
    assert [wrapper.plans for wrapper in library.made] == [2, 1, 1]
    assert all(isinstance(wrapper, BatchDecodeWithPagedKVCacheWrapper) for wrapper in library.made)
    assert held[0] == held[1] == held[2] < held[3]


def test_an_outdated_plan_and_passed_limits_are_refused(library: Any) -> None:
    backend, step = backend_of(DECODES), make_step(DECODES, torch.float16)
    outdated = backend.plan(step.batch)
    backend.plan(step.batch)
    with pytest.raises(ValueError, match="the plan is outdated"):
        backend.write(step.k, step.v, step.key, step.value, outdated)
    tight = replace(DECODES.limits, max_table_entries=DECODES.limits.max_table_entries - 1)
    with pytest.raises(ValueError, match="24 block table entries exceed 23"):
        backend_of(DECODES, limits=tight).plan(step.batch)
    with pytest.raises(ValueError, match="3 decode rows cannot hold 4 decodes"):
        backend.plan(step.batch, decode_rows=3)


def test_tensors_that_do_not_belong_are_refused(library: Any) -> None:
    backend, step = backend_of(DECODES), make_step(DECODES, torch.float16)
    plan = backend.plan(step.batch)
    q, k, v = step.q, step.k, step.v
    with pytest.raises(ValueError, match=r"3 rows were given to a plan of 4"):
        backend.attend(q[:3], k, v, plan, 0.1)
    with pytest.raises(ValueError, match=r"a cache is torch.float32 .* must be contiguous, torch.float16"):
        backend.attend(q, k.float(), v, plan, 0.1)
    with pytest.raises(ValueError, match=r"must have one shape"):
        backend.attend(q, k, v[:-1], plan, 0.1)
    with pytest.raises(ValueError, match=r"do not belong to the caches"):
        backend.attend(q[:, :4], k, v, plan, 0.1)
    with pytest.raises(ValueError, match=r"out .* must be contiguous"):
        backend.attend(q, k, v, plan, 0.1, out=q.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match=r"window 0 must be positive"):
        backend.attend(q, k, v, plan, 0.1, window=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (AttentionShape(4, 2, 64, 64), torch.float32, "float16 and bfloat16, not torch.float32"),
        (AttentionShape(4, 2, 80, 80), torch.float16, "head dims 64, 128, 256, not 80"),
        (AttentionShape(4, 2, 128, 64), torch.float16, "keys and values of one head dim, not 128 and 64"),
    ],
    ids=["dtype", "dim", "v-narrower"],
)
def test_what_it_does_not_serve_is_refused_at_once(
    shape: AttentionShape, dtype: torch.dtype, message: str, library: Any
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*--attention-implementation triton"):
        backend_of(replace(DECODES, shape=shape), dtype)


def test_a_processor_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="flashinfer does not run on cpu: use --attention-implementation torch"):
        make_backend(
            [DECODES.shape], dtype=torch.float16, device="cpu", block_size=16, limits=DECODES.limits,
            implementation="flashinfer",
        )  # fmt: skip


def test_tiles_only_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="flashinfer's results depend on the batch"):
        make_backend(
            [DECODES.shape], dtype=torch.float16, device="cpu", block_size=16, limits=DECODES.limits, tiles_only=True,
            implementation="flashinfer",
        )  # fmt: skip


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ValueError, match=r"pip install 'loramux\[flashinfer\]', or use --attention-implementation tri"):
        backend_of(DECODES)


def test_the_workspace_grows_with_the_rows_that_a_graph_may_hold(library: Any) -> None:
    shape = AttentionShape(64, 8, 128, 128)
    few, many = (
        backend_of(replace(DECODES, shape=shape), limits=AttentionLimits(1024, rows, 1024)).scratch_bytes
        for rows in (16, 1024)
    )
    assert RECOMMENDED_WORKSPACE < few < many
    tiles = 1024 * 8 // 16 + 1024  # of 16 packed queries: what the planner counts for one-token rows in groups of 8
    assert many > 64 * tiles * 16 * 129 * 4


def test_the_triton_write_under_the_interpreter() -> None:
    run_checks(CHECKS, interpreted=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "flashinfer does not run on cpu: use --attention-implementation torch$"),
        ({"deterministic": True}, "--deterministic needs --attention-implementation torch on cpu"),
    ],
    ids=["device", "deterministic"],
)
def test_the_engine_refuses_it_without_a_card(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_model(random_model(family_config("llama")), tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        make_core(directory, tmp_path, attention_implementation="flashinfer", **options)


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_implementation must be torch, triton or flashinfer, got 'numpy'"):
        EngineConfig("model", "blobs", attention_implementation="numpy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_implementation must be torch or triton, got 'flashinfer'"):
        EngineConfig("model", "blobs", lora_implementation="flashinfer")  # type: ignore[arg-type]
