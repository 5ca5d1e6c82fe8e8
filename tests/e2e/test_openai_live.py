"""The official client against a real server: the whole way from HTTP through the engine to PEFT's own numbers."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
from support.live import LiveServer, live_server, wait_ready
from support.models import byte_tokenizer, family_config, greedy, mixed_recipes, random_model, save_adapter, save_model

TOKENS = 10
MESSAGES: list[Any] = [{"role": "user", "content": "hello there"}]


@dataclass
class World:
    server: LiveServer
    model: Any
    adapters: dict[str, Path]
    prompt: list[int]

    def client(self, **kwargs: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", **kwargs)

    def expected(self, adapter: str | None) -> list[int]:
        """PEFT's greedy tokens for the chat prompt."""
        if adapter is None:
            return greedy(self.model, self.prompt, TOKENS)
        wrapped = peft.PeftModel.from_pretrained(self.model, self.adapters[adapter])
        tokens = greedy(wrapped, self.prompt, TOKENS)
        wrapped.unload()
        return tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("live")
    model = random_model(family_config("llama", vocab_size=262))
    save_model(model, root / "base", tokenizer=True)
    adapters = {r.name: save_adapter(model, r, root / "adapters") for r in mixed_recipes(model)}
    prompt = byte_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    flags = ["--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8", "--drain-seconds", "60"]
    with live_server(root, *flags) as server:
        for name, path in adapters.items():
            response = server.upload(name, path, description=f"adapter {name}")
            assert response.status_code == 201, response.text
        yield World(server, model, adapters, prompt)


def test_what_peft_saves_is_served_unchanged(world: World) -> None:
    async def ask(client: openai.AsyncOpenAI, model: str) -> Any:
        return await client.chat.completions.create(
            model=model, messages=MESSAGES, temperature=0, max_tokens=TOKENS, extra_body={"return_token_ids": True}
        )

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=world.server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, m) for m in ("base", *world.adapters)))

    answers = asyncio.run(run())
    for name, answer in zip((None, *world.adapters), answers, strict=True):
        assert answer.prompt_token_ids == world.prompt
        assert answer.choices[0].token_ids == world.expected(name), name
        assert answer.usage.completion_tokens == len(answer.choices[0].token_ids)
        used = [a["name"] for a in answer.loramux["adapters"]]
        assert used == ([] if name is None else [name])
    assert len({tuple(a.choices[0].token_ids) for a in answers}) > 4


def test_streaming_says_the_same(world: World) -> None:
    client = world.client()
    options: dict[str, Any] = {"model": "rslora", "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    whole = client.chat.completions.create(**options)
    parts, usage, finish = [], None, None
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        if chunk.choices:
            parts.append(chunk.choices[0].delta.content or "")
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert "".join(parts) == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert usage.prompt_tokens_details is not None


def test_completions_take_tokens_and_lists(world: World) -> None:
    client = world.client()
    answer = client.completions.create(
        model="all-r8", prompt=[world.prompt, [10, 11, 12]], max_tokens=4, temperature=0,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.choices[0].token_ids == world.expected("all-r8")[:4]  # type: ignore[attr-defined]


def test_a_seed_repeats_whatever_else_runs(world: World) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=world.server.url + "/v1", api_key="none") as client:

            async def ask(seed: int, model: str) -> str | None:
                answer = await client.chat.completions.create(
                    model=model, messages=MESSAGES, temperature=1.2, seed=seed, max_tokens=12
                )
                return answer.choices[0].message.content

            alone = await ask(7, "all-r8")
            crowd = await asyncio.gather(
                *(ask(7 if i == 3 else i + 100, "all-r8" if i % 2 else "rslora") for i in range(8))
            )
            return [alone, crowd[3], crowd[5]]

    alone, again, other = asyncio.run(run())
    assert alone == again
    assert alone != other


def test_errors_become_the_clients_exceptions(world: World) -> None:
    client = world.client(max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt=[5] * 300, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    assert "256" in long.value.message
    for extra in ({"n": 9}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"top_logprobs": 1}):
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.chat.completions.create(model="base", messages=MESSAGES, **extra)  # type: ignore[call-overload]
        assert unsupported.value.param == next(iter(extra))
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="auto", messages=MESSAGES, extra_body={"router": {"top_k": 0}})
    assert wrong.value.param == "router.top_k"
    answer = client.chat.completions.create(model="auto", messages=MESSAGES, max_tokens=2)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_models_list_the_adapters(world: World) -> None:
    models = {m.id: m for m in world.client().models.list()}
    assert set(models) == {"base", *world.adapters}
    assert models["rslora"].parent == "base"  # type: ignore[attr-defined]
    assert world.client().models.retrieve("patterns").id == "patterns"


def test_a_fusion_is_the_weighted_sum(world: World) -> None:
    """Weight 1 of one adapter and weight 0 of another is the one alone, and the order of a fusion is irrelevant."""

    def tokens(adapters: list[dict[str, Any]]) -> Any:
        answer = world.client().chat.completions.create(
            model="base", messages=MESSAGES, temperature=0, max_tokens=TOKENS,
            extra_body={"adapters": adapters, "return_token_ids": True},
        )  # fmt: skip
        return answer.choices[0].token_ids  # type: ignore[attr-defined]

    assert tokens([{"name": "rslora", "weight": 1.0}, {"name": "all-r8", "weight": 0.0}]) == world.expected("rslora")
    mixed = [{"name": "rslora", "weight": 0.5}, {"name": "all-r8", "weight": 0.6}]
    assert tokens(mixed) == tokens(mixed[::-1])


def test_a_client_that_leaves_frees_its_blocks(world: World) -> None:
    body = {"model": "all-r8", "prompt": [5, 6], "max_tokens": 250, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", world.server.url + "/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    assert_idle(world.server)


def assert_idle(server: LiveServer) -> None:
    """Nothing runs and no block is held once the engine has told its latest numbers."""
    for _ in range(200):
        samples = server.metrics()
        wanted = [v for k, v in samples.items() if k.startswith(("vllm:num_requests_running", "vllm:kv_cache_usage"))]
        if len(wanted) == 2 and not any(wanted):
            return
        time.sleep(0.05)
    raise AssertionError("blocks or requests are still held")


def test_a_killed_engine_is_an_error_then_comes_back(world: World) -> None:
    children = Path(f"/proc/{world.server.process.pid}/task/{world.server.process.pid}/children").read_text().split()
    engine = next(int(c) for c in children if b"engine.process" in Path(f"/proc/{c}/cmdline").read_bytes())
    body = {"model": "all-r8", "prompt": [5, 6], "max_tokens": 250, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", world.server.url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(engine, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-1]
    assert "[DONE]" not in rest[-1]
    ready = httpx.get(world.server.url + "/ready")
    if ready.status_code != 200:
        refused = httpx.post(world.server.url + "/v1/completions", json={**body, "stream": False})
        assert refused.status_code in (200, 503)
        assert refused.status_code == 200 or int(refused.headers["retry-after"]) >= 1
    assert httpx.get(world.server.url + "/health").status_code == 200
    wait_ready(world.server)
    test_streaming_says_the_same(world)
    assert {m.id for m in world.client().models.list()} == {"base", *world.adapters}


def test_sigterm_lets_running_requests_finish(world: World, tmp_path: Path) -> None:
    import threading

    with live_server(
        tmp_path, "--model", str(world.adapters["all-r8"].parents[1] / "base"), "--dtype", "float32"
    ) as server:
        answers: list[httpx.Response] = []
        body = {"model": "base", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(server.url + "/v1/completions", json=body, timeout=120))
        )
        thread.start()
        for _ in range(500):
            if any(v for k, v in server.metrics().items() if k.startswith("vllm:num_requests_running")):
                break
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 200
        assert server.process.wait(60) == 0
