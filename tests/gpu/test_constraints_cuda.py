"""On a card: masks forbid what they forbid on the host, and are applied without waiting; answers match."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import drain, request, tokens_of
from support.models import byte_tokenizer, family_config, random_model, save_model

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.constraints import Held, Live, Masks, Words
from loramux.server.engine.core import EngineCore
from loramux.server.engine.grammars import Matcher
from loramux.server.engine.protocol import Constraint, EngineRequest, SamplingParams
from loramux.server.engine.sequence import Sequence

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

VOCAB = 1000


class RandomMasks(Masks):
    """Masks that come from a generator instead of a grammar."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._generator = np.random.default_rng(0)

    def _filled(self, live: Live, rows: int) -> tuple[Words, Words]:
        words = -(-VOCAB // 32)
        size = rows * words
        flat = self._generator.integers(-(2**31), 2**31, size + size % 2).astype(np.int32)
        return flat, flat[:size].reshape(rows, words)


class Fine:
    """llguidance's part of a matcher that has no errors."""

    def is_error(self) -> bool:
        return False


def held(rows: tuple[int, ...]) -> Held:
    inner: Any = Fine()
    seqs = []
    for row in rows:
        seq = Sequence.from_request(EngineRequest(str(row), (1,), SamplingParams(1)))
        seq.matcher = Matcher(inner, 1)
        seqs.append(seq)
    return Held(rows, tuple(seqs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (0, 2, 3), (0, 1, 2, 3, 4)])
def test_masks_are_those_of_the_host_and_nothing_waits(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    on_host, on_card = RandomMasks(torch.device("cpu")), RandomMasks(torch.device("cuda"))
    there = logits.cuda()
    for step in range(8):  # more than there are pinned buffers
        ends = {rows[0]: (step, 33)}
        expected = on_host.apply(logits, held(rows), ends)
        if step:  # the first one allocates
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = on_card.apply(there, held(rows), ends)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), expected)
    assert torch.equal(there.cpu(), logits)


def test_answers_match_beside_free_ones(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    model = random_model(family_config("llama", vocab_size=264, max_position_embeddings=1024))
    base = save_model(model, tmp_path / "base", tokenizer=True)
    answers = []
    for overlap in (True, False):
        config = EngineConfig(
            model_path=str(base), blob_dir=str(tmp_path), dtype="float32", device="cuda", max_num_seqs=8,
            max_batched_tokens=64, block_size=16, kv_cache_bytes=8 << 20, device_adapter_bytes=16 << 20,
            overlap=overlap,
        )  # fmt: skip
        core = EngineCore(config)
        for i in range(4):
            constraint = Constraint("regex", "[a-f]{2,9}-[0-9]{3}") if i % 2 else None
            core.add(request(str(i), [5, 6, 7], 20, temperature=1.2, seed=i, constraint=constraint, ignore_eos=True))
        answers.append({name: tokens_of(outputs) for name, outputs in drain(core).items()})
        core.close()
    assert answers[0] == answers[1]
    for i in (1, 3):
        assert re.fullmatch("[a-f]{2,9}-[0-9]{3}", byte_tokenizer().decode(answers[0][str(i)]))
    assert [len(answers[0][str(i)]) for i in (0, 2)] == [20, 20]
