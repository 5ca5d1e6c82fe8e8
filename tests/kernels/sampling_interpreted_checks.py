"""The sampling kernels on the CPU, through Triton's interpreter. Collected by `test_sampling_kernels.py`, which runs
this file in a process of its own: the interpreter is chosen when triton is imported, and excludes compiling."""

import pytest
import torch
from torch import Tensor

from loramux.kernels.sampling import thresholds
from loramux.kernels.sampling.thresholds import triton_thresholds
from loramux.server.engine.protocol import SamplingParams
from loramux.server.engine.sampler import SamplingColumns, sample, sorted_thresholds
from loramux.server.engine.staging import Staging

TOP_K = [0, 1, 2, 40, 300, 700, 709, 0]
TOP_P = [1.0] * 8 + [0.9] * 8 + [0.3, 0.999, 1.0, 1e-6] * 2


def exact(row: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens are kept [vocab], by sorting in float64."""
    values, order = row.double().sort(descending=True)
    count = min(top_k or len(row), len(row))
    probs = values[:count].softmax(-1)
    before = probs.cumsum(-1) - probs
    count = count if top_p >= 1 else max(1, int((before < top_p).sum()))
    return (row >= row[order[count - 1]]) & torch.isfinite(row)


def kept(logits: Tensor, top_k: Tensor, top_p: Tensor, **options: bool) -> Tensor:
    return (logits >= triton_thresholds(logits, top_k, top_p, **options)) & torch.isfinite(logits)


def bounds(top_k: list[int], top_p: list[float]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in (top_k, top_p))  # type: ignore


def rows(vocab: int) -> Tensor:
    """Flat to peaked rows of both signs, one token that is possible, ties, both zeros, huge and tiny numbers."""
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(vocab))
    logits *= torch.linspace(0.01, 8, 24).unsqueeze(1)
    logits[3, 1:] = float("-inf")
    logits[4] = 0.0
    logits[5] = torch.where(torch.arange(vocab) % 3 == 0, 0.0, -0.0)
    logits[6] = logits[6].round()
    logits[7] = -logits[7].abs() * 1e30
    logits[8] = logits[8] * 1e-42
    logits[9, ::2] = float("-inf")
    return logits


@pytest.mark.parametrize("vocab", [1, 255, 700])
def test_what_is_kept_is_what_sorting_keeps(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "CHUNK", 512)  # several programs share a row
    logits = rows(vocab)
    top_k, top_p = bounds(TOP_K * 3, TOP_P)
    found = kept(logits, top_k, top_p)
    for row in range(24):
        assert torch.equal(found[row], exact(logits[row], int(top_k[row]), float(top_p[row]))), row


def test_a_search_that_no_row_needs_is_left_out() -> None:
    logits = rows(90)[:8]
    by_k, by_p = bounds(TOP_K, [1.0] * 8), bounds([0] * 8, TOP_P[-8:])
    assert torch.equal(kept(logits, *by_k, has_p=False), kept(logits, *by_k))
    assert torch.equal(kept(logits, *by_p, has_k=False), kept(logits, *by_p))
    nothing = triton_thresholds(logits, *bounds([0] * 8, [1.0] * 8), has_k=False, has_p=False)
    assert bool((nothing == float("-inf")).all())


def test_rows_may_be_strided_and_broken_rows_harm_no_other() -> None:
    wide = torch.cat([rows(70)[:4], torch.full((4, 6), torch.nan)], dim=1)
    top_k, top_p = bounds([5, 0, 9, 3], [0.9, 0.5, 1.0, 0.7])
    expected = triton_thresholds(wide[:, :70].contiguous(), top_k, top_p)
    assert torch.equal(triton_thresholds(wide[:, :70], top_k, top_p), expected)
    broken = wide[:, :70].clone()
    broken[1, 3], broken[2] = torch.nan, torch.inf
    found = triton_thresholds(broken, top_k, top_p)
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    assert triton_thresholds(wide[:0, :70], top_k[:0], top_p[:0]).shape == (0, 1)


def test_the_same_tokens_are_drawn() -> None:
    logits = rows(120)
    params = [
        SamplingParams(1, temperature=0.7, seed=i, top_k=TOP_K[i % 8], top_p=TOP_P[i], min_p=0.01 * (i % 2))
        for i in range(24)
    ]
    settings, places = SamplingColumns.of(params), torch.arange(24).numpy()
    staging = Staging(torch.device("cpu"))
    drawn = [sample(logits, settings, places, {}, staging, how) for how in (sorted_thresholds, triton_thresholds)]
    assert torch.equal(*drawn)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    logits = rows(30)[:2]
    top_k, top_p = bounds([1, 2], [1.0, 1.0])
    with pytest.raises(ValueError, match="float32"):
        triton_thresholds(logits.double(), top_k, top_p)
    with pytest.raises(ValueError, match="unit stride"):
        triton_thresholds(logits.t().contiguous().t(), top_k, top_p)
    with pytest.raises(ValueError, match="top_p"):
        triton_thresholds(logits, top_k, top_p.float())
