"""Every supported family computes transformers' own logits, in batches that mix prefill, chunks and decode."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import FAMILIES, MORE_FAMILIES, VOCAB, family_config, random_model, save_model

from loramux.kernels.lora import make_backend
from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.loading import (
    LoadedModel,
    UnsupportedModelError,
    check_supported,
    context_limit,
    eos_ids,
    load_model,
    resolve_model,
)
from loramux.server.engine.runner import Runner
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Chunk
from loramux.server.engine.torch_attention import TorchAttention

BLOCK = 4
TOLERANCE = 1e-4


class Harness:
    """Drives a runner chunk by chunk and compares every logit row with the reference model."""

    def __init__(self, reference: Any, loaded: LoadedModel, workspace_tokens: int) -> None:
        self.reference = reference
        path = TorchAttention(
            loaded.attention, num_blocks=64, block_size=BLOCK, dtype=loaded.dtype, device=loaded.device,
            workspace_tokens=workspace_tokens,
        )  # fmt: skip
        backend = make_backend(
            [p.site for p in loaded.projections if p.site is not None], dtype=loaded.dtype, device=loaded.device,
            budget_bytes=1 << 20, max_slots=4, max_tokens=64,
        )  # fmt: skip
        self.runner = Runner(loaded, backend, path, block_size=BLOCK)
        self.blocks = BlockManager(64, BLOCK)
        self.worst = 0.0
        self.rows = 0

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        chunks = []
        for seq, tokens in work:
            assert self.blocks.grow(seq, seq.num_computed + tokens)
            chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + tokens))
        chunks.sort(key=lambda c: c.end - c.start > 1)
        logits, sampled = self.runner.forward(chunks)
        for chunk in chunks:
            chunk.seq.num_computed = chunk.end
        for row, chunk in zip(logits, sampled, strict=True):
            with torch.inference_mode():
                expected = self.reference(torch.tensor([chunk.seq.tokens]), use_cache=False).logits[0, -1]
            self.worst = max(self.worst, (row - expected).abs().max().item())
            self.rows += 1
            chunk.seq.tokens.append(int(expected.argmax()))


def sequences(lengths: tuple[int, ...]) -> list[Sequence]:
    from support.engines import request

    generator = torch.Generator().manual_seed(1)
    return [
        Sequence.from_request(request(str(i), torch.randint(3, VOCAB, (n,), generator=generator).tolist(), 8))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("workspace_tokens", [0, 100_000], ids=["gather", "workspace"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_logits_equal_transformers_eager(family: str, workspace_tokens: int, tmp_path: Path) -> None:
    reference = random_model(family_config(family))
    loaded = load_model(save_model(reference, tmp_path), dtype="float32", device="cpu")
    harness = Harness(reference, loaded, workspace_tokens)
    a, b, c, d = sequences((13, 1, 22, 7))
    harness.step([(a, 13), (b, 1)])
    harness.step([(a, 1), (b, 1), (c, 9)])
    harness.step([(a, 1), (b, 1), (c, 13), (d, 7)])
    for _ in range(4):
        harness.step([(s, 1) for s in (a, b, c, d)])
    harness.step([(s, 1) for s in (b, c, d)])
    harness.step([(s, 1) for s in (d, a, c, b)])
    assert harness.rows == 2 + 2 + 4 + 16 + 3 + 4
    assert harness.worst <= TOLERANCE


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    reference = random_model(family_config("llama"), std=0.05)
    loaded = load_model(save_model(reference, tmp_path), dtype="bfloat16", device="cpu")
    harness = Harness(reference, loaded, 100_000)
    a, b = sequences((9, 5))
    harness.step([(a, 9), (b, 5)])
    harness.step([(a, 1), (b, 1)])
    assert loaded.dtype is torch.bfloat16
    assert 0 < harness.worst < 0.05


def test_decodes_of_very_different_lengths(tmp_path: Path) -> None:
    reference = random_model(family_config("llama"))
    loaded = load_model(save_model(reference, tmp_path), dtype="float32", device="cpu")
    harness = Harness(reference, loaded, 64)
    long, *short = sequences((150, 3, 4, 5))
    harness.step([(long, 150)])
    harness.step([(s, len(s.tokens)) for s in short])
    for _ in range(3):
        harness.step([(s, 1) for s in (*short, long)])
    assert harness.worst <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "attention interface"),
        ("bloom", "attention interface"),
        ("gptj", "attention interface"),
        ("mamba", "recurrent state"),
        ("qwen3_next", "recurrent state"),
        ("t5", "encoder-decoder"),
        ("roberta", "bidirectional"),
        ("llama4_text", "chunked_attention"),
    ],
)
def test_architectures_that_cannot_are_refused_by_name(family: str, reason: str) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(UnsupportedModelError, match=reason):
        check_supported(CONFIG_MAPPING[family]())


def test_quantised_checkpoints_are_refused() -> None:
    config = family_config("llama")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="gptq"):
        check_supported(config)


def test_rescaling_rotary_embeddings_bound_the_context() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    config = family_config("llama", rope_parameters=rope)
    assert context_limit(config, None) == 64
    with pytest.raises(UnsupportedModelError, match="--max-model-len 64"):
        context_limit(config, 128)


def test_generation_config_names_the_ends(tmp_path: Path) -> None:
    model = random_model(family_config("llama"))
    model.generation_config.eos_token_id = [5, 9]
    save_model(model, tmp_path)
    assert eos_ids(tmp_path, model.config) == (5, 9)
    (tmp_path / "generation_config.json").unlink()
    assert eos_ids(tmp_path, model.config) == (2,)


def test_unknown_paths_and_devices_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such directory"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    save_model(random_model(family_config("llama")), tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(UnsupportedModelError, match="cuda"):
        load_model(tmp_path, device="cuda:7")
    with pytest.raises(UnsupportedModelError, match="unknown device"):
        load_model(tmp_path, device="abacus")
