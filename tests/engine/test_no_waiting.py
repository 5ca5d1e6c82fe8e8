"""A step never looks at the device's numbers: the whole engine runs on tensors that have none.

On the meta device every tensor has a shape and no contents, so an `item()`, a `tolist()`, a truth value, a boolean
index or a copy to the host raises where a card would be waited for. Kernels are recorded and not run. The one place
that may wait, the download of a step's tokens, is replaced and counted.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, request, tokens_of
from support.models import saved_llama

from loramux.kernels.attention import kv_launch
from loramux.kernels.attention import triton_backend as attention
from loramux.kernels.lora import fold_launch
from loramux.kernels.lora import triton_backend as lora
from loramux.kernels.sampling import thresholds
from loramux.server.engine import runner, staging
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.graphs import DecodeGraphs
from loramux.server.engine.loading import LoadedModel, load_model
from loramux.server.engine.runner import Runner

META = torch.device("meta")
KERNELS = (
    (lora, "shrink_kernel"), (lora, "expand_kernel"), (lora, "scale_kernel"), (fold_launch, "fold_kernel"),
    (attention, "decode_kernel"), (attention, "reduce_kernel"), (attention, "prefill_kernel"),
    (kv_launch, "kv_write_kernel"), (thresholds, "count_digit_kernel"), (thresholds, "threshold_kernel"),
)  # fmt: skip


class Launches:
    """Stands for a kernel and counts its launches."""

    def __init__(self, name: str, counts: "Counter[str]") -> None:
        self._name = name
        self._counts = counts

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self._counts[self._name] += 1


class Arrived:
    """Zeros in the place of what a step gives back."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source

    def tensor(self) -> torch.Tensor:
        return torch.zeros(self._source.shape, dtype=self._source.dtype)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
    """Launches by kernel; uploads go to the meta device, and nothing comes back from it but by `Arrived`."""
    counts: Counter[str] = Counter()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Launches(name, counts))
    upload = staging.Staging.upload

    def to_meta(self: Any, *arrays: Any) -> list[torch.Tensor]:
        return [tensor.to(META) for tensor in upload(self, *arrays)]

    monkeypatch.setattr(staging.Staging, "upload", to_meta)
    monkeypatch.setattr(runner, "Download", Arrived)
    return counts


def on_meta(model: LoadedModel) -> LoadedModel:
    """The model without its numbers."""
    model.module.to(META)
    for projection in model.projections:
        projection.to(META)
    model.device = META
    return model


def make_core(root: Path, blobs: Path, *, graphs: bool, **settings: Any) -> EngineCore:
    config = EngineConfig(
        model_path=str(root), blob_dir=str(blobs), dtype="float32", device="cpu", max_num_seqs=8, max_batched_tokens=16,
        block_size=4, kv_cache_bytes=8 << 20, device_adapter_bytes=16 << 20, threads=1, overlap=True,
        lora_implementation="triton", attention_implementation="triton", **settings,
    )  # fmt: skip
    core = EngineCore(config, on_meta(load_model(root, dtype="float32", device="cpu")))
    if graphs:
        path = core.runner.attention
        decodes = DecodeGraphs(core.model, core.backend, path, max_rows=8, capture=False)
        core.runner = Runner(core.model, core.backend, path, block_size=4, graphs=decodes)
    return core


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    return saved_llama(tmp_path_factory.mktemp("no_waiting"), 2)


@pytest.mark.parametrize("graphs", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("fold", [False, True], ids=["apart", "folded"])
def test_a_step_does_not_wait_for_the_device(
    places: tuple[Path, Path, list[str]], launches: "Counter[str]", graphs: bool, fold: bool
) -> None:
    """Greedy and drawn tokens, sets, prompts in chunks, decodes, hidden states, and the next step prepared ahead."""
    base, blobs, (first, second) = places
    core = make_core(base, blobs, graphs=graphs, lora_fold=fold)
    launches.clear()
    core.add(request("base", list(range(3, 30)), 4, ignore_eos=True))
    core.add(request("greedy", [5, 6, 7], 6, [(first, 1.0)], ignore_eos=True))
    core.add(request("set", [5, 6], 5, [(first, 0.5), (second, 0.5)], ignore_eos=True, min_tokens=3))
    core.add(request("drawn", [8, 9], 5, [(second, 1.0)], ignore_eos=True, temperature=0.7, top_p=0.9, top_k=5, seed=3))
    outputs = drain(core)
    core.close()
    assert {key: len(tokens_of(found)) for key, found in outputs.items()} == {
        "base": 4, "greedy": 6, "set": 5, "drawn": 5,
    }  # fmt: skip
    wanted = {"shrink_kernel", "decode_kernel", "prefill_kernel", "fold_kernel" if fold else "expand_kernel"}
    assert wanted <= set(launches)
    assert (launches["count_digit_kernel"], launches["threshold_kernel"]) == (5 * 16, 5)  # a step that draws: 16 digits


@pytest.mark.parametrize("graphs", [False, True], ids=["exact", "padded"])
def test_a_base_batch_launches_no_lora_kernel(
    places: tuple[Path, Path, list[str]], launches: "Counter[str]", graphs: bool
) -> None:
    """Beside adapters that are loaded, too."""
    base, blobs, (first, _) = places
    core = make_core(base, blobs, graphs=graphs, lora_fold=True)
    core.add(request("adapter", [5, 6, 7], 2, [(first, 1.0)], ignore_eos=True))
    drain(core)
    assert launches["shrink_kernel"] > 0 < launches["fold_kernel"]
    launches.clear()
    for i in range(3):
        core.add(request(str(i), [5, 6, 7 + i], 3, ignore_eos=True))
    outputs = drain(core)
    core.close()
    assert [len(tokens_of(found)) for found in outputs.values()] == [3] * 3
    assert launches.keys() <= {"decode_kernel", "reduce_kernel", "prefill_kernel", "kv_write_kernel"}
    assert launches["decode_kernel"] > 0  # and greedy tokens search for no bounds


@pytest.mark.parametrize(
    "wait",
    [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero, bool, int],
    ids=lambda wait: wait.__name__,
)
def test_a_step_that_waits_would_fail(
    places: tuple[Path, Path, list[str]], launches: "Counter[str]", monkeypatch: pytest.MonkeyPatch, wait: Any
) -> None:
    """The tests above can fail: the same engine, looking at one number of a step's logits."""
    base, blobs, _ = places
    core = make_core(base, blobs, graphs=False)
    plain = core.runner.compute

    def looking(*args: Any) -> Any:
        found = plain(*args)
        wait(found[0, 0])
        return found

    monkeypatch.setattr(core.runner, "compute", looking)
    core.add(request("one", [5, 6, 7], 2, ignore_eos=True))
    with pytest.raises((RuntimeError, NotImplementedError, ValueError, TypeError)):
        drain(core)
