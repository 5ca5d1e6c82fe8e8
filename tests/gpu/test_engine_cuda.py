"""On a card: the engine's steps do not wait for it, and greedy tokens do not change with any switch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, request, tokens_of
from support.models import VOCAB, saved_llama

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

SWITCHES: list[dict[str, Any]] = [
    {}, {"lora_fold": True}, {"lora_overlap": "stream"}, {"lora_overlap": "launch"},
    {"lora_overlap": "launch", "lora_fold": True}, {"cuda_graphs": False}, {"overlap": False},
    {"lora_implementation": "torch"},
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    return saved_llama(tmp_path_factory.mktemp("engine_cuda"), 3)


def make_core(places: tuple[Path, Path, list[str]], **settings: Any) -> EngineCore:
    base, blobs, _ = places
    config = EngineConfig(
        model_path=str(base), blob_dir=str(blobs), dtype="float32", device="cuda", max_num_seqs=8,
        max_batched_tokens=64, block_size=16, kv_cache_bytes=8 << 20, device_adapter_bytes=16 << 20, **settings,
    )  # fmt: skip
    return EngineCore(config)


def run(core: EngineCore, digests: list[str]) -> dict[str, list[int]]:
    """Greedy tokens of base requests, single adapters and sets, prompts longer than a step among them."""
    generator = torch.Generator().manual_seed(5)
    sets = [[], [(digests[0], 1.0)], [(digests[1], 0.5), (digests[2], 1.0)], [(digests[2], 1.0)]]
    for i in range(6):
        prompt = torch.randint(3, VOCAB, (3 + 29 * (i % 3),), generator=generator).tolist()
        core.add(request(str(i), prompt, 6, sets[i % 4], ignore_eos=True))
    return {key: tokens_of(outputs) for key, outputs in drain(core).items()}


@pytest.mark.parametrize("settings", SWITCHES, ids=lambda settings: ", ".join(settings) or "default")
def test_no_switch_changes_greedy_tokens(places: tuple[Path, Path, list[str]], settings: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    if settings.get("lora_overlap") == "launch" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    found = []
    for chosen in ({"lora_fold": False}, settings):
        core = make_core(places, **chosen)
        found.append(run(core, places[2]))
        core.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("fold", [False, True])
def test_steps_do_not_wait_for_the_card(places: tuple[Path, Path, list[str]], fold: bool) -> None:
    """Once kernels are compiled and adapters are loaded; `Download` alone waits, for an event."""
    core = make_core(places, lora_fold=fold)
    expected = run(core, places[2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert run(core, places[2]) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")
        core.close()
