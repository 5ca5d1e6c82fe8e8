"""The engine on the Triton kernels, on the CPU through Triton's interpreter. Collected by `test_kernel_path.py`, which
runs this file in a process of its own: the interpreter is chosen when triton is imported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import VOCAB, family_config, mixed_recipes, random_model, save_adapter, save_model, write_blob

from loramux.kernels.attention import launch
from loramux.server.engine.core import EngineCore
from loramux.server.engine.graphs import DecodeGraphs
from loramux.server.engine.kernel_attention import KernelAttention
from loramux.server.engine.protocol import EngineRequest
from loramux.server.engine.runner import Runner

KERNELS = {"attention_implementation": "triton", "lora_implementation": "triton", "max_set_rank": 64}


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 splits to a padded decode instead of 64, nearly all empty, which take the interpreter's time; attention's own
    checks launch them."""
    monkeypatch.setattr(launch, "_SPLIT_PROGRAMS", 16)


def with_graphs(core: EngineCore) -> EngineCore:
    """The same core with decode steps over the static inputs of graphs, which a CPU computes op by op."""
    path, size = core.runner.attention, core.config.block_size
    graphs = DecodeGraphs(core.model, core.backend, path, max_rows=core.config.max_num_seqs, capture=False)
    core.runner = Runner(core.model, core.backend, path, block_size=size, graphs=graphs)
    return core


class Counted:
    """Counts the calls of a backend's method from now on."""

    def __init__(self, backend: Any, name: str) -> None:
        self.calls = 0
        self._method = getattr(backend, name)
        setattr(backend, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._method(*args)


def prepare(root: Path, family: str) -> tuple[Path, list[str]]:
    model = random_model(family_config(family))
    save_model(model, root / "base")
    recipes = mixed_recipes(model)[:3]
    return root, [write_blob(model, save_adapter(model, r, root / "adapters"), root / "blobs") for r in recipes]


def workload(digests: list[str]) -> list[EngineRequest]:
    generator = torch.Generator().manual_seed(5)
    sets = [[], [(digests[0], 1.0)], [(digests[1], 0.5), (digests[2], 1.0)], [(digests[2], 1.0)]]
    return [
        request(str(i), torch.randint(3, VOCAB, (3 + 9 * (i % 3),), generator=generator).tolist(), 3, sets[i % 4],
                ignore_eos=True)
        for i in range(4)
    ]  # fmt: skip


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[int]]:
    for r in requests:
        core.add(r)
    found = {key: tokens_of(outputs) for key, outputs in drain(core).items()}
    core.close()
    return found


def test_kernels_give_the_torch_paths_tokens(tmp_path: Path) -> None:
    path, digests = prepare(tmp_path, "gpt_oss")
    expected = run(make_core(path / "base", path / "blobs"), workload(digests))
    core = make_core(path / "base", path / "blobs", max_batched_tokens=16, **KERNELS)
    assert isinstance(core.runner.attention, KernelAttention)
    assert run(core, workload(digests)) == expected


@pytest.mark.parametrize(("family", "padded"), [("qwen2", True), ("gpt_oss", False)])
def test_folded_projections_give_the_same_tokens(tmp_path: Path, family: str, padded: bool) -> None:
    """With biases, mixed ranks and sets, prompts and decodes in one step; no expand is launched by itself."""
    path, digests = prepare(tmp_path, family)
    expected = run(make_core(path / "base", path / "blobs"), workload(digests))
    core = make_core(path / "base", path / "blobs", lora_fold=True, max_num_seqs=8, **KERNELS)
    folded, apart = Counted(core.backend, "project"), Counted(core.backend, "finish")
    assert run(with_graphs(core) if padded else core, workload(digests)) == expected
    assert folded.calls > apart.calls == 0


def test_padded_decode_steps_give_the_same_tokens(tmp_path: Path) -> None:
    path, digests = prepare(tmp_path, "gemma3_text")
    expected = run(make_core(path / "base", path / "blobs"), workload(digests))
    core = make_core(path / "base", path / "blobs", overlap=True, max_num_seqs=8, **KERNELS)
    assert run(with_graphs(core), workload(digests)) == expected
