"""On a card: top-k and top-p keep what sorting keeps, draws are those of the CPU, and nothing is waited for."""

import numpy as np
import pytest
import torch

from loramux.kernels.sampling.thresholds import triton_thresholds
from loramux.server.engine.protocol import SamplingParams
from loramux.server.engine.sampler import SamplingColumns, sample, sorted_thresholds
from loramux.server.engine.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

TOP_K = [0, 1, 20, 5000]
TOP_P = [1.0, 0.9, 0.3]
CASES = [(k, p) for k in TOP_K for p in TOP_P]


def logits(vocab: int) -> torch.Tensor:
    """One row for each of CASES, from flat to peaked."""
    spread = torch.linspace(0.5, 6, len(CASES)).unsqueeze(1)
    return torch.randn(len(CASES), vocab, generator=torch.Generator().manual_seed(3)) * spread


@pytest.mark.parametrize("vocab", [1000, 32_003, 128_256])
def test_what_is_kept_is_what_sorting_keeps(vocab: int) -> None:
    rows = logits(vocab)
    top_k, top_p = (torch.tensor(v, dtype=torch.float64).unsqueeze(1) for v in zip(*CASES, strict=True))
    expected = rows >= sorted_thresholds(rows, top_k, top_p)
    card = rows.cuda()
    found = card >= triton_thresholds(card, top_k.cuda(), top_p.cuda())
    differing = (found.cpu() != expected).sum(1)
    assert differing.max() <= 1, differing  # the token at the bound: the masses are rounded to 2**-40 here
    assert torch.equal(triton_thresholds(card, top_k.cuda(), top_p.cuda()) <= card, found)


def test_a_step_draws_without_waiting_and_as_the_cpu_does() -> None:
    rows, device = logits(4000), torch.device("cuda")
    params = [SamplingParams(1, temperature=0.8, top_k=k, top_p=p, seed=i) for i, (k, p) in enumerate(CASES)]
    settings, places = SamplingColumns.of(params), np.arange(len(CASES))
    expected = sample(rows, settings, places, {}, Staging(torch.device("cpu")))
    card, staging = rows.cuda(), Staging(device)
    sample(card, settings, places, {}, staging)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = sample(card, settings, places, {}, staging)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int((drawn.cpu() != expected).sum()) <= 1  # the exponential of a card rounds otherwise
