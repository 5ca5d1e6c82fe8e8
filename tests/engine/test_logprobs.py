"""Log-probabilities of chosen tokens and of prompts, against the model itself; nothing changes them but the tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import VOCAB, family_config, mixed_recipes, random_model, save_adapter, save_model, write_blob

from loramux.server.engine.core import EngineCore
from loramux.server.engine.logprobs import SLICE_ROWS, Floats, logprobs
from loramux.server.engine.protocol import EngineOutput


class Setup:
    """A model, and an adapter that also changes the output projection."""

    def __init__(self, root: Path) -> None:
        self.model: Any = random_model(family_config("llama"))
        self.model_dir = save_model(self.model, root / "base")
        recipes = mixed_recipes(self.model)
        self.paths = {r.name: save_adapter(self.model, r, root / "adapters") for r in recipes}
        self.blobs = root / "blobs"
        self.digests = {name: write_blob(self.model, path, self.blobs) for name, path in self.paths.items()}

    def reference(self, tokens: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """log_softmax of the logits before each token but the first, by transformers or PEFT."""
        model = self.model if adapter is None else peft.PeftModel.from_pretrained(self.model, self.paths[adapter])
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].double(), dim=-1)
        if adapter is not None:
            model.unload()
        return found


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("logprobs"))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def core(setup: Setup, request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    engine = make_core(setup.model_dir, setup.blobs, overlap=request.param)
    yield engine
    engine.close()


def table(parts: Sequence[bytes | None], top: int) -> Floats:
    return np.frombuffer(b"".join(part or b"" for part in parts)).reshape(-1, 1 + 2 * top)


def prompt_of(outputs: Sequence[EngineOutput], top: int) -> Floats:
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    return table([outputs[0].prompt_logprobs], top)


def assert_is(found: Floats, reference: torch.Tensor, tokens: Sequence[int], top: int) -> None:
    assert len(found) == len(tokens) == len(reference)
    expected = reference.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0].numpy()
    assert np.abs(found[:, 0] - expected).max() < 1e-3
    values, ids = reference.topk(top, dim=-1)
    assert np.abs(found[:, 2::2] - values.numpy()).max(initial=0) < 1e-3
    assert (found[:, 1::2] == ids.numpy()).mean() > 0.98 if top else True


def test_slices_are_the_whole() -> None:
    logits, tokens = torch.randn(2 * SLICE_ROWS + 3, 50), torch.arange(2 * SLICE_ROWS + 3) % 50
    found = logprobs(logits, tokens, 3).numpy()
    assert_is(found, torch.log_softmax(logits.double(), -1), tokens.tolist(), 3)


def test_chosen_tokens(setup: Setup, core: EngineCore) -> None:
    wanted = {"a": (None, 0), "b": ("all-r8", 4), "c": ("all-r8", None), "d": (None, 20)}
    changes: dict[str, Any] = {
        "temperature": 1.3,
        "top_k": 5,
        "seed": 3,
        "presence_penalty": 1.5,
        "logit_bias": ((9, 4.0),),
    }
    for i, (key, (adapter, top)) in enumerate(wanted.items()):
        refs = [(setup.digests[adapter], 1.0)] if adapter else []
        core.add(request(key, [5 + i, 6, 7], 12, refs, ignore_eos=True, logprobs=top, **(changes if i % 2 else {})))
    found = drain(core)
    for i, (key, (adapter, top)) in enumerate(wanted.items()):
        tokens = tokens_of(found[key])
        parts = [output.logprobs for output in found[key]]
        if top is None:
            assert not any(parts)
            continue
        reference = setup.reference([5 + i, 6, 7, *tokens], adapter)[2:]
        assert_is(table(parts, top), reference, tokens, top)


@pytest.mark.parametrize("adapter", [None, "all-r8", "lm-head"])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompts(setup: Setup, core: EngineCore, adapter: str | None, max_tokens: int) -> None:
    if adapter is not None and adapter not in setup.digests:
        adapter = next(name for name in setup.digests if name != "all-r8")
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(3, VOCAB, (110,), generator=generator).tolist()  # three chunks, beside another request
    refs = [(setup.digests[adapter], 1.0)] if adapter else []
    core.add(request("warm", prompt, 2, refs))
    drain(core)
    core.add(request("other", [4, 5, 6], 20, ignore_eos=True, prompt_logprobs=1))
    core.add(request("a", prompt, max_tokens, refs, ignore_eos=True, prompt_logprobs=2, logprobs=0))
    outputs = drain(core)["a"]
    assert_is(prompt_of(outputs, 2), setup.reference(prompt, adapter), prompt[1:], 2)
    assert len(tokens_of(outputs)) == max_tokens
    assert (outputs[0].cached_tokens, outputs[-1].finish_reason) == (0, "length")
    assert core.blocks.num_used == 0


def test_the_shortest_and_the_longest_prompt(setup: Setup) -> None:
    core = make_core(setup.model_dir, setup.blobs, max_model_len=32)
    core.add(request("one", [7], 0, prompt_logprobs=0))
    core.add(request("full", [7] * 32, 0, prompt_logprobs=0))
    found = drain(core)
    assert found["one"] == [EngineOutput("one", (), "length", scheduled_at=found["one"][0].scheduled_at)]
    assert len(prompt_of(found["full"], 0)) == 31
    with pytest.raises(ValueError, match="max_tokens"):
        core.add(request("none", [7], 0))
    core.close()


def test_preemption_asks_for_nothing_twice(setup: Setup) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, VOCAB, (30,), generator=generator).tolist() for _ in range(8)]
    probe = make_core(setup.model_dir, setup.blobs)
    size = probe.model.kv_bytes_per_token * 4 * 40
    probe.close()
    for overlap in (False, True):
        core = make_core(setup.model_dir, setup.blobs, kv_cache_bytes=size, max_model_len=100, overlap=overlap)
        for i, prompt in enumerate(prompts):
            core.add(request(str(i), prompt, 40, ignore_eos=True, prompt_logprobs=1, logprobs=1))
        found = drain(core)
        core.close()
        assert core.scheduler.preemptions > 0
        for i, prompt in enumerate(prompts):
            tokens = tokens_of(found[str(i)])
            reference = setup.reference([*prompt, *tokens])
            assert_is(prompt_of(found[str(i)], 1), reference[:29], prompt[1:], 1)
            assert_is(table([o.logprobs for o in found[str(i)]], 1), reference[29:], tokens, 1)
