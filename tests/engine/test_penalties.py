"""Penalties and biases: the formulas, by a plain twin in float64, and counts that stay right in any batch."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import VOCAB, family_config, random_model, save_model
from transformers import RepetitionPenaltyLogitsProcessor

from loramux.server.engine.penalties import Penalties
from loramux.server.engine.protocol import EngineRequest, SamplingParams
from loramux.server.engine.sequence import Sequence

CPU = torch.device("cpu")
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.8}, {"frequency_penalty": -0.7}, {},
    {"logit_bias": ((5, 3.5), (9, -100.0))},
    {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 0.4, "logit_bias": ((3, 2.0),)},
]  # fmt: skip


def plain(logits: torch.Tensor, prompt: Seq[int], generated: Seq[int], params: SamplingParams) -> torch.Tensor:
    """What a row becomes, token by token, in float64."""
    row = logits.double().tolist()
    for token, bias in params.logit_bias:
        row[token] += bias
    for token in {*prompt, *generated}:
        row[token] = (
            row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        )
    for token in set(generated):
        row[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    return torch.tensor(row, dtype=torch.float64)


def sequences(prompts: Seq[Seq[int]]) -> list[Sequence]:
    chosen = [SamplingParams(max_tokens=9, **extra) for extra in SETTINGS]
    return [Sequence.from_request(EngineRequest(str(i), tuple(prompts[i]), params)) for i, params in enumerate(chosen)]


def test_all_rows_follow_the_formulas() -> None:
    torch.manual_seed(0)
    prompts = torch.randint(0, 30, (len(SETTINGS), 8)).tolist()
    seqs, penalties = sequences(prompts), Penalties(CPU)
    said: list[list[int]] = [[] for _ in seqs]
    for _ in range(12):
        logits = torch.randn(len(seqs), 40) * 4
        before = logits.clone()
        adjusted = penalties.of(None, seqs, 40)
        changed = penalties.apply(logits, adjusted)
        for seq, row, given, words in zip(seqs, changed, logits, said, strict=True):
            expected = plain(given, seq.request.prompt_token_ids, words, seq.request.sampling)
            assert (row - expected).abs().max() < 1e-4
        assert torch.equal(logits, before)
        tokens = torch.randint(0, 12, (len(seqs),))
        penalties.count(adjusted, tokens)
        for words, token in zip(said, tokens.tolist(), strict=True):
            words.append(token)


def test_repetition_is_what_transformers_does() -> None:
    torch.manual_seed(1)
    logits, prompt = torch.randn(1, 40) * 4, torch.randint(0, 40, (1, 10))
    (seq, *_) = sequences([prompt[0].tolist()] * len(SETTINGS))
    penalties = Penalties(CPU)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits.clone())
    assert torch.equal(penalties.apply(logits, penalties.of(None, [seq], 40)), expected)


def test_a_row_is_clean_for_its_next_user_and_rows_grow() -> None:
    penalties = Penalties(CPU)
    (first, *_) = sequences([[1, 2]] * len(SETTINGS))
    penalties.count(penalties.of(None, [first], 8), torch.tensor([3]))
    assert first.counts is not None
    penalties.release(first)
    many = [sequences([[4]] * len(SETTINGS))[1] for _ in range(20)]
    logits = torch.ones(20, 8)
    assert torch.equal(penalties.apply(logits, penalties.of(None, many, 8)), logits)
    assert len({seq.counts for seq in many}) == 20


def test_only_biases_need_no_counts() -> None:
    penalties = Penalties(CPU)
    biased = sequences([[4]] * len(SETTINGS))[4]
    changed = penalties.apply(torch.zeros(1, 12), penalties.of(None, [biased], 12))
    assert (changed[0, 5], changed[0, 9], biased.counts) == (3.5, -100.0, None)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model(family_config("llama")), tmp_path_factory.mktemp("penalties"))


def workload() -> list[EngineRequest]:
    generator = torch.Generator().manual_seed(5)
    requests = []
    for i in range(14):
        prompt = torch.randint(3, VOCAB, (2 + 3 * i,), generator=generator).tolist()
        noise = {"temperature": 0.9, "seed": i} if i % 2 else {}
        requests.append(request(str(i), prompt, 40, ignore_eos=True, **SETTINGS[i % len(SETTINGS)], **noise))
    return requests


def run(model_dir: Path, **settings: Any) -> tuple[dict[str, list[int]], int]:
    core = make_core(model_dir, model_dir, **settings)
    for one in workload():
        core.add(one)
    found = {key: tokens_of(outputs) for key, outputs in drain(core).items()}
    core.close()
    return found, core.scheduler.preemptions


def test_overlap_chunks_and_preemption_change_nothing(model_dir: Path) -> None:
    expected, _ = run(model_dir)
    assert run(model_dir, overlap=True)[0] == expected
    assert run(model_dir, overlap=True, max_num_seqs=3, max_batched_tokens=16)[0] == expected
    core = make_core(model_dir, model_dir)
    per_block = core.model.kv_bytes_per_token * 4
    core.close()
    for overlap in (False, True):
        found, preemptions = run(model_dir, kv_cache_bytes=per_block * 40, max_model_len=100, overlap=overlap)
        assert preemptions > 0
        assert found == expected


def test_penalties_change_what_is_said(model_dir: Path) -> None:
    core = make_core(model_dir, model_dir, overlap=True)
    core.add(request("often", [5, 6], 30, ignore_eos=True, logit_bias=((7, 100.0),)))
    core.add(request("once", [5, 6], 30, ignore_eos=True, frequency_penalty=1e3))
    core.add(request("never", [5, 6], 1, logit_bias=((7, 100.0),), repetition_penalty=1.0))
    found = {key: tokens_of(outputs) for key, outputs in drain(core).items()}
    core.close()
    assert found["often"] == [7] * 30
    assert len(set(found["once"])) == 30
    assert found["never"] == [7]
