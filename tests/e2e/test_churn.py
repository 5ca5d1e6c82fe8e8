"""Adapters are uploaded, replaced and deleted under traffic: every answer is that of the version it names."""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
from support.live import LiveServer, live_server
from support.models import AdapterRecipe, family_config, greedy, random_model, save_adapter, save_model

NAMES = 20
REQUESTS = 200
TOKENS = 8
SHAPES: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    {"r": 3, "lora_alpha": 9, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]


@dataclass
class World:
    """Two contents for each name, and what each says to each prompt according to PEFT."""

    model_dir: Path
    contents: dict[tuple[str, int], Path]
    expected: dict[tuple[str, int, int], list[int]]
    prompts: list[list[int]]


@dataclass
class Traffic:
    """What happened: which version has which content, and every answer."""

    content_of: dict[tuple[str, int], int] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    answers: int = 0
    not_found: int = 0
    left: int = 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("churn")
    model = random_model(family_config("llama", vocab_size=262))
    save_model(model, root / "base", tokenizer=True)
    prompts = [[10, 20, 30, 40], [50, 60, 70, 80, 90, 100, 110]]
    contents, expected = {}, {}
    for i in range(NAMES):
        for content in (0, 1):
            recipe = AdapterRecipe(f"c{i}-{content}", 10 * i + content, SHAPES[(i + content) % len(SHAPES)])
            path = save_adapter(model, recipe, root / "adapters", std=0.15)
            contents[f"c{i}", content] = path
            wrapped = peft.PeftModel.from_pretrained(model, path)
            for p, prompt in enumerate(prompts):
                expected[f"c{i}", content, p] = greedy(wrapped, prompt, TOKENS)
            wrapped.unload()
    for p in range(len(prompts)):
        distinct = {tuple(tokens) for (_, _, prompt), tokens in expected.items() if prompt == p}
        assert len(distinct) == 2 * NAMES, "the adapters must be told apart by their answers"
    return World(root / "base", contents, expected, prompts)


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ["--model", str(world.model_dir), "--dtype", "float32", "--max-num-seqs", "12", "--block-size", "4",
             "--max-batched-tokens", "32", "--device-adapter-bytes", "600KiB", "--host-adapter-bytes", "400KiB",
             "--kv-cache-bytes", "2MiB", "--max-model-len", "128"]  # fmt: skip
    with live_server(tmp_path_factory.mktemp("server"), *flags) as running:
        yield running


async def push(client: httpx.AsyncClient, world: World, traffic: Traffic, name: str, content: int) -> None:
    """Uploads a content under a name and notes which version it became."""
    path = world.contents[name, content]
    files = [("files", (f, (path / f).read_bytes())) for f in ("adapter_config.json", "adapter_model.safetensors")]
    response = await client.post("/v1/adapters", data={"name": name}, files=files)
    assert response.status_code in (200, 201), response.text
    traffic.content_of[name, response.json()["version"]] = content


async def ask(client: httpx.AsyncClient, world: World, traffic: Traffic, rng: random.Random) -> None:
    """One request; its answer must be that of the very version it says it used."""
    name = f"c{rng.randrange(NAMES)}"
    prompt = rng.randrange(len(world.prompts))
    body = {
        "model": name, "prompt": world.prompts[prompt], "max_tokens": TOKENS, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    if rng.random() < 0.1:
        with contextlib.suppress(httpx.TimeoutException):
            await client.post("/v1/completions", json=body, timeout=0.03)
        traffic.left += 1
        return
    response = await client.post("/v1/completions", json=body)
    if response.status_code == 404:
        assert name in traffic.deleted, response.text
        traffic.not_found += 1
        return
    assert response.status_code == 200, response.text
    answer = response.json()
    (used,) = answer["loramux"]["adapters"]
    assert used["name"] == name
    while (name, used["version"]) not in traffic.content_of:  # its upload's own answer is still on the way
        await asyncio.sleep(0.01)
    content = traffic.content_of[name, used["version"]]
    assert answer["choices"][0]["token_ids"] == world.expected[name, content, prompt]
    traffic.answers += 1


async def churn(client: httpx.AsyncClient, world: World, traffic: Traffic) -> None:
    """Replaces eight adapters, deletes four, and brings two of those back with their other content."""
    for i in range(8):
        await push(client, world, traffic, f"c{i}", 1)
        await asyncio.sleep(0.02)
    for i in range(8, 12):
        traffic.deleted.add(f"c{i}")
        assert (await client.delete(f"/v1/adapters/c{i}")).status_code in (200, 204)
        await asyncio.sleep(0.02)
    for i in range(8, 10):
        await push(client, world, traffic, f"c{i}", 1)
    for i in range(8):
        await push(client, world, traffic, f"c{i}", 0)


def test_no_answer_is_lost_or_wrong(server: LiveServer, world: World) -> None:
    async def run() -> Traffic:
        traffic = Traffic()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            for i in range(NAMES):
                await push(client, world, traffic, f"c{i}", 0)
            rng = random.Random(5)
            requests = [ask(client, world, traffic, random.Random(rng.random())) for _ in range(REQUESTS)]
            await asyncio.gather(churn(client, world, traffic), *requests)
            versions = await client.get("/v1/adapters", params={"limit": 100})
            assert {a["name"] for a in versions.json()["data"]} == {f"c{i}" for i in range(NAMES) if i not in (10, 11)}
            second = await client.post(
                "/v1/completions",
                json={"model": "c0@1", "prompt": world.prompts[0], "max_tokens": TOKENS, "temperature": 0,
                      "return_token_ids": True},
            )  # fmt: skip
            assert second.json()["choices"][0]["token_ids"] == world.expected["c0", 0, 0]
            for i in range(NAMES):
                assert (await client.delete(f"/v1/adapters/c{i}")).status_code in (200, 204, 404)
        return traffic

    traffic = asyncio.run(run())
    assert traffic.answers + traffic.not_found + traffic.left == REQUESTS
    assert traffic.answers > REQUESTS * 0.6
    assert_all_free(server)


def assert_all_free(server: LiveServer) -> None:
    """Blocks, slots and queues are empty once the engine has told its latest numbers."""
    import time

    wanted = {
        "vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "vllm:kv_cache_usage_perc": 0,
        'loramux_adapter_bytes{tier="device"}': 0, 'loramux_adapter_bytes{tier="host"}': 0,
        'loramux_adapters{tier="disk"}': 0, 'loramux_adapter_bytes{tier="disk"}': 0,
    }  # fmt: skip
    found: dict[str, float] = {}
    for _ in range(200):
        samples = server.metrics()
        found = {k: v for k, v in samples.items() if any(k == w or k.startswith(w + "{") for w in wanted)}
        if len(found) == len(wanted) and not any(found.values()):
            return
        time.sleep(0.05)
    raise AssertionError(f"something was not freed: {found}")
