"""The engine core on a tiny model: batching, chunking, caching, preemption and switches never change what is said."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import (
    EOS,
    VOCAB,
    AdapterRecipe,
    family_config,
    greedy,
    mixed_recipes,
    random_model,
    save_adapter,
    save_model,
    write_blob,
)

from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import UnsupportedModelError
from loramux.server.engine.protocol import EngineOutput, EngineRequest, PoolingParams
from loramux.server.engine.runner import Launched


@dataclass
class Setup:
    model: Any
    model_dir: Path
    blob_dir: Path
    digests: dict[str, str]

    def core(self, **overrides: Any) -> EngineCore:
        return make_core(self.model_dir, self.blob_dir, **overrides)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("core")
    model = random_model(family_config("llama"))
    model_dir = save_model(model, root / "base")
    digests = {}
    for recipe in mixed_recipes(model):
        path = save_adapter(model, recipe, root / "adapters")
        digests[recipe.name] = write_blob(model, path, root / "blobs")
    return Setup(model, model_dir, root / "blobs", digests)


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def core(setup: Setup, request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    engine = setup.core(overlap=request.param)
    yield engine
    engine.close()


def texts(count: int, low: int = 1, high: int = 40, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def workload(setup: Setup, count: int = 14, tokens: int = 10) -> list[EngineRequest]:
    names = [None, *setup.digests]
    requests = []
    for i, prompt in enumerate(texts(count)):
        name = names[i % len(names)]
        sampling = {"temperature": 0.9, "seed": i, "top_p": 0.9} if i % 3 == 0 else {}
        adapters = [(setup.digests[name], 1.0)] if name else []
        requests.append(request(str(i), prompt, tokens, adapters, ignore_eos=True, **sampling))
    return requests


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[int]]:
    for r in requests:
        core.add(r)
    found = {key: tokens_of(outputs) for key, outputs in drain(core).items()}
    assert core.blocks.num_used == 0
    assert all(a.users == 0 for a in core.tier.residency())
    core.blocks.check()
    return found


def test_every_switch_leaves_the_output_unchanged(setup: Setup) -> None:
    expected: dict[str, list[int]] | None = None
    variants: list[dict[str, Any]] = [
        {},
        {"decode_workspace": False},
        {"packed_projections": False},
        {"enable_prefix_caching": False},
        {"max_batched_tokens": 16},
        {"max_num_seqs": 1},
        {"block_size": 16},
        {"overlap": True},
        {"overlap": True, "max_batched_tokens": 16, "decode_workspace": False},
    ]
    for variant in variants:
        core = setup.core(**variant)
        got = run(core, workload(setup))
        core.close()
        expected = expected or got
        assert got == expected, variant


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_preemption_changes_nothing(setup: Setup, overlap: bool) -> None:
    core = setup.core()
    expected = run(core, workload(setup, tokens=40))
    core.close()
    per_block = core.model.kv_bytes_per_token * 4
    small = setup.core(kv_cache_bytes=per_block * 40, max_model_len=100, overlap=overlap)
    got = run(small, workload(setup, tokens=40))
    small.close()
    assert small.scheduler.preemptions > 0
    assert got == expected


def test_a_repeated_prompt_is_taken_from_the_cache(core: EngineCore, setup: Setup) -> None:
    prompt = texts(1, 33, 34)[0]
    first = run(core, [request("a", prompt, 5)])
    core.add(request("b", prompt, 5))
    outputs = drain(core)["b"]
    assert tokens_of(outputs) == first["a"]
    assert outputs[0].cached_tokens == 32
    core.add(request("c", prompt, 5, [(setup.digests["all-r8"], 1.0)]))
    assert drain(core)["c"][0].cached_tokens == 0
    core.add(request("d", prompt, 5, salt="other"))
    assert drain(core)["d"][0].cached_tokens == 0
    stats = core.stats()
    assert stats.prefix_hit_tokens == 32
    assert stats.prefix_queried_tokens == 4 * 33
    core.add(replace(request("e", prompt, 1), pooling=PoolingParams()))  # a look at the prompt asks nothing of it
    drain(core)
    assert core.stats().prefix_queried_tokens == 4 * 33


def test_end_of_sequence_stops_unless_ignored(setup: Setup, core: EngineCore) -> None:
    prompt = texts(1, 8, 9)[0]
    plain = greedy(setup.model, prompt, 30)
    core.add(request("eos", prompt, 30, stop_token_ids=(plain[4],)))
    outputs = drain(core)["eos"]
    cut = plain.index(plain[4]) + 1
    assert tokens_of(outputs) == plain[:cut]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == plain[4]
    core.add(request("long", prompt, 30, ignore_eos=True))
    outputs = drain(core)["long"]
    assert len(tokens_of(outputs)) == 30
    assert outputs[-1].finish_reason == "length"


def test_min_tokens_keeps_the_end_away(setup: Setup, core: EngineCore) -> None:
    prompt = texts(1, 8, 9)[0]
    plain = greedy(setup.model, prompt, 30)
    core.add(request("r", prompt, 12, stop_token_ids=(plain[0],), min_tokens=6))
    tokens = tokens_of(drain(core)["r"])
    assert len(tokens) >= 6
    assert plain[0] not in tokens[:6]
    assert EOS not in tokens[:6]


def test_requests_that_come_and_go_leave_the_others_alone(setup: Setup) -> None:
    """Ends by length, by stop id and by abort while the next step is under way, on few blocks."""
    few = {"kv_cache_bytes": 120_000, "max_model_len": 100}
    plain, overlapped = (setup.core(overlap=overlap, **few) for overlap in (False, True))
    prompts = texts(30, 1, 50)
    alone = {i: run(plain, [request("r", p, 3 + i % 9, ignore_eos=True)])["r"] for i, p in enumerate(prompts)}
    found: dict[str, list[EngineOutput]] = {}
    for i, prompt in enumerate(prompts):
        stops = (alone[i][2],) if i % 4 == 1 else ()
        overlapped.add(request(str(i), prompt, 3 + i % 9, ignore_eos=True, stop_token_ids=stops))
        for output in overlapped.step().outputs:
            found.setdefault(output.request_id, []).append(output)
        if i % 5 == 4:
            overlapped.abort(str(i - 1))
    for key, outputs in drain(overlapped).items():
        found.setdefault(key, []).extend(outputs)
    for i, tokens in alone.items():
        got = tokens_of(found.get(str(i), []))
        if i % 5 == 3:
            assert got == tokens[: len(got)]
        elif i % 4 == 1:
            assert got == tokens[: tokens.index(tokens[2]) + 1]
        else:
            assert got == tokens
    assert overlapped.blocks.num_used == 0
    overlapped.blocks.check()
    plain.close()
    overlapped.close()


def test_abort_frees_everything_at_once(core: EngineCore, setup: Setup) -> None:
    for r in workload(setup, tokens=60):
        core.add(r)
    for _ in range(4):
        core.step()
    assert core.blocks.num_used > 0
    for r in workload(setup):
        core.abort(r.request_id)
    core.abort("unknown")
    assert core.blocks.num_used == 0
    assert core.stats().running == 0
    assert core.stats().waiting == 0
    assert all(a.users == 0 for a in core.tier.residency())


def test_a_missing_adapter_fails_its_request_alone(core: EngineCore) -> None:
    prompt = texts(1)[0]
    core.add(request("bad", prompt, 4, [("sha256:" + "0" * 64, 1.0)]))
    core.add(request("good", prompt, 4))
    outputs = drain(core)
    assert outputs["bad"][-1].finish_reason == "error"
    assert outputs["bad"][-1].error_kind == "adapter"
    assert len(tokens_of(outputs["good"])) == 4


def test_a_set_that_is_too_wide_fails_its_request_alone(setup: Setup) -> None:
    core = setup.core(max_set_rank=20)
    wide = [(setup.digests[name], 1.0) for name in ("attn-r16", "all-r8")]
    core.add(request("bad", [5, 6, 7], 4, wide))
    core.add(request("good", [5, 6, 7], 4, wide[:1]))
    outputs = drain(core)
    core.close()
    assert outputs["bad"][-1].error_kind == "adapter"
    assert "max_set_rank" in str(outputs["bad"][-1].error)
    assert outputs["good"][-1].finish_reason != "error"
    assert core.blocks.num_used == 0


def test_adapters_on_the_output_projection(setup: Setup, tmp_path: Path) -> None:
    recipe = AdapterRecipe("head", 9, {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]})
    path = save_adapter(setup.model, recipe, tmp_path)
    digest = write_blob(setup.model, path, setup.blob_dir)
    core = setup.core()
    prompts = texts(3, 5, 12)
    for i, prompt in enumerate(prompts):
        core.add(request(str(i), prompt, 10, [] if i == 1 else [(digest, 1.0)]))
    got = drain(core)
    core.close()
    wrapped = peft.PeftModel.from_pretrained(setup.model, path)
    with_adapter = [greedy(wrapped, prompt, 10) for prompt in prompts]
    wrapped.unload()
    assert tokens_of(got["0"]) == with_adapter[0]
    assert tokens_of(got["2"]) == with_adapter[2]
    assert tokens_of(got["1"]) == greedy(setup.model, prompts[1], 10)
    assert tokens_of(got["1"]) != with_adapter[1]


def test_numbers_that_are_not_finite_fail_their_request_alone(core: EngineCore, setup: Setup) -> None:
    prompt = texts(1)[0]
    core.add(request("bad", prompt, 4, [(setup.digests["all-r8"], 1e38)]))
    core.add(request("good", prompt, 4))
    outputs = drain(core)
    assert outputs["bad"][-1].error_kind == "model"
    assert len(tokens_of(outputs["good"])) == 4
    assert core.blocks.num_used == 0


@pytest.mark.parametrize("workspace", [True, False])
def test_numbers_that_are_not_finite_do_not_outlive_their_request(setup: Setup, workspace: bool) -> None:
    """With few blocks and rows, every later request reuses memory that a poisoned one has written."""
    core = setup.core(kv_cache_bytes=setup.core().model.kv_bytes_per_token * 4 * 70, decode_workspace=workspace)
    expected = run(core, workload(setup, 6))
    poisoned = [(setup.digests["all-r8"], 1e38)]
    for i, prompt in enumerate(texts(16, 30, 60)):
        core.add(request(f"bad{i}", prompt, 4, poisoned))
    assert all(outputs[-1].error_kind == "model" for outputs in drain(core).values())
    assert run(core, workload(setup, 6)) == expected
    core.close()


@pytest.mark.parametrize("workspace", [True, False])
def test_a_reused_request_id_starts_afresh(setup: Setup, workspace: bool) -> None:
    core = setup.core(decode_workspace=workspace)
    first, second = texts(2, 20, 21)
    shorter = second[:12]
    alone = run(core, [request("other", shorter, 6)])["other"]
    run(core, [request("r", first[:6], 7, ignore_eos=True)])
    assert run(core, [request("r", shorter, 6)])["r"] == alone
    core.close()


def test_a_step_that_fails_fails_its_requests_alone(
    core: EngineCore, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = core.runner.launch
    calls = iter([True])

    def once(chunks: Any, previous: Any) -> Launched:
        if next(calls, False):
            raise RuntimeError("a kernel failed")
        return real(chunks, previous)

    monkeypatch.setattr(core.runner, "launch", once)
    core.add(request("unlucky", [5, 6, 7], 4))
    outputs = drain(core)["unlucky"]
    assert outputs[-1].error_kind == "model"
    assert core.blocks.num_used == 0
    assert len(run(core, [request("next", [5, 6, 7], 4, ignore_eos=True)])["next"]) == 4


def test_a_step_that_fails_again_and_again_ends_the_engine(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(chunks: Any, previous: Any) -> Launched:
        raise RuntimeError("broken")

    monkeypatch.setattr(core.runner, "launch", never)
    for i in range(2):
        core.add(request(str(i), [5, 6, 7], 4))
        assert core.step().outputs[0].error_kind == "model"
    core.add(request("last", [5, 6, 7], 4))
    with pytest.raises(RuntimeError, match="broken"):
        core.step()


@pytest.mark.parametrize(
    ("prompt", "tokens", "phrase"),
    [
        ([], 1, "empty"),
        ([5] * 250, 7, "context"),
        ([5], 10**9, "context"),
        ([5, VOCAB], 1, "vocabulary"),
        ([-1], 1, "vocabulary"),
        ([5], 0, "max_tokens"),
    ],
)
def test_requests_that_cannot_run_are_refused(core: EngineCore, prompt: list[int], tokens: int, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        core.add(request("r", prompt, tokens))


def test_an_id_is_used_once_at_a_time(core: EngineCore) -> None:
    core.add(request("r", [5], 1))
    with pytest.raises(ValueError, match="in use"):
        core.add(request("r", [5], 1))


def test_a_cache_that_cannot_hold_one_sequence_is_refused(setup: Setup) -> None:
    with pytest.raises(UnsupportedModelError, match="--max-model-len"):
        setup.core(kv_cache_bytes=1 << 12)


def test_a_context_longer_than_the_positions_is_refused(setup: Setup) -> None:
    with pytest.raises(UnsupportedModelError, match="--max-model-len 256"):
        setup.core(max_model_len=257)


def test_a_forgotten_adapter_is_freed_after_its_last_use(core: EngineCore, setup: Setup) -> None:
    digest = setup.digests["all-r8"]
    core.add(request("r", [5, 6, 7], 20, [(digest, 1.0)], ignore_eos=True))
    while not core.stats().running:
        core.step()
    core.forget_adapter(digest)
    core.step()
    assert core.backend.bytes_used > 0
    tokens = tokens_of(drain(core)["r"])
    assert len(tokens) >= 17
    assert core.backend.bytes_used == 0
    assert core.host.bytes_used == 0


def test_more_adapters_than_fit_take_turns(setup: Setup) -> None:
    needed = max(
        setup.core().backend.bytes_needed({"model.layers.0.mlp.up_proj": 8}) * 24, 1
    )  # about one all-linear adapter
    core = setup.core(device_adapter_bytes=needed * 2)
    got = run(core, workload(setup, tokens=6))
    wide = setup.core()
    assert got == run(wide, workload(setup, tokens=6))
    assert core.tier.evictions > 0
    assert core.backend.bytes_used <= core.backend.bytes_total
    core.close()
    wide.close()


@pytest.mark.parametrize("prefix", [False, True], ids=["alone", "after-generating"])
def test_pooling_gives_the_mean_hidden_states(setup: Setup, core: EngineCore, prefix: bool) -> None:
    prompts = texts(3, 40, 90)
    if prefix:
        run(core, [request(f"g{i}", prompt, 4) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        core.add(replace(request(str(i), prompt, 1), pooling=PoolingParams((-1, 0, 1))))
        core.add(request(f"beside{i}", prompt[:7], 5, [(setup.digests["all-r8"], 1.0)], ignore_eos=True))
    outputs = drain(core)
    for i, prompt in enumerate(prompts):
        (output,) = outputs[str(i)]
        assert output.finish_reason == "stop"
        got = torch.frombuffer(bytearray(output.embedding or b""), dtype=torch.float32).view(3, -1)
        with torch.inference_mode():
            states = setup.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
            layers = setup.model.model.layers
            expected = [states[-1], layers[0].input_layernorm(states[0]), layers[1].input_layernorm(states[1])]
        assert (got - torch.stack([e[0].mean(0) for e in expected])).abs().max() < 1e-4
        assert len(tokens_of(outputs[f"beside{i}"])) == 5
    assert core.blocks.num_used == 0
    core.add(request("after", prompts[0], 1))
    assert drain(core)["after"][0].cached_tokens == (len(prompts[0]) - 1) // 4 * 4


def test_pooling_gives_the_last_tokens_states(setup: Setup, core: EngineCore) -> None:
    prompts = texts(3, 20, 90)
    for i, prompt in enumerate(prompts):
        core.add(replace(request(str(i), prompt, 1), pooling=PoolingParams((1, -1), tokens=30)))
    outputs = drain(core)
    for i, prompt in enumerate(prompts):
        got = torch.frombuffer(bytearray(outputs[str(i)][0].embedding or b""), dtype=torch.float32)
        with torch.inference_mode():
            states = setup.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
            expected = [setup.model.model.layers[1].input_layernorm(states[1]), states[-1]]
        count = min(30, len(prompt))
        assert (got.view(2, count, -1) - torch.stack([e[0, -count:] for e in expected])).abs().max() < 1e-4


def test_pooling_layers_that_are_not_there_are_refused(core: EngineCore) -> None:
    for layers in ((), (9,), (-9,)):
        with pytest.raises(ValueError, match="layers"):
            core.add(replace(request("p", [5, 6], 1), pooling=PoolingParams(layers)))
