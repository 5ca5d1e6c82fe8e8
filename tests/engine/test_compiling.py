"""Compiled layers give the plain layers' tokens, in one compilation for all layers and batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import family_config, mixed_recipes, random_model, save_adapter, save_model, write_blob

from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import UnsupportedModelError


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, str]:
    model = random_model(family_config("llama"))
    base = save_model(model, tmp_path / "base")
    adapter = save_adapter(model, mixed_recipes(model)[0], tmp_path / "adapters")
    return base, tmp_path / "blobs", write_blob(model, adapter, tmp_path / "blobs")


def run(core: EngineCore, digest: str, count: int) -> dict[str, list[int]]:
    for i in range(count):
        adapters = [(digest, 1.0)] if i % 2 else []
        core.add(request(str(i), [5 + i, 6, 7] * (1 + 2 * i), 6, adapters, ignore_eos=True))
    return {key: tokens_of(outputs) for key, outputs in drain(core).items()}


def test_compiled_layers_give_the_same_tokens(places: tuple[Path, Path, str]) -> None:
    base, blobs, digest = places
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    plain, compiled = make_core(base, blobs), make_core(base, blobs, compile_layers=True)
    assert run(compiled, digest, 3) == run(plain, digest, 3)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert run(compiled, digest, 5) == run(plain, digest, 5)
    assert counters["stats"]["unique_graphs"] == graphs
    plain.close()
    compiled.close()
    torch.compiler.reset()


def test_a_compiler_that_fails_is_told_at_start(
    places: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, blobs, _ = places

    def broken(self: Any, chunks: Any, previous: Any = None) -> None:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("loramux.server.engine.runner.Runner.launch", broken)
    with pytest.raises(UnsupportedModelError, match=r"--compile-layers.*C\+\+ compiler"):
        make_core(base, blobs, compile_layers=True)
