"""The engine in its own process: requests, cancellation, crashes, refusals, and the end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.engines import request
from support.models import family_config, greedy, mixed_recipes, random_model, save_adapter, save_model, write_blob

from loramux.server.engine.client import ProcessEngineClient
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.protocol import (
    AdapterLoadError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    EngineOutput,
    EngineRequest,
    QueueFullError,
    QueueTimeoutError,
)

PROMPT = [5, 6, 7, 8, 9]
START_SECONDS = 120


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model(family_config("llama")), tmp_path_factory.mktemp("base"))


def config(model_dir: Path, **overrides: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "max_num_seqs": 4, "max_batched_tokens": 64, "block_size": 4,
        "kv_cache_bytes": 4 << 20, "device_adapter_bytes": 16 << 20, "host_adapter_bytes": 16 << 20, "threads": 1,
    }  # fmt: skip
    return EngineConfig(model_path=str(model_dir), blob_dir=str(model_dir / "blobs"), **{**settings, **overrides})


def with_client(
    engine: EngineConfig,
    body: Callable[[ProcessEngineClient], Coroutine[Any, Any, None]],
    *,
    ready: bool = True,
    **timeouts: float,
) -> None:
    """Runs `body` with a started client and ends the engine whatever happens."""

    async def run() -> None:
        client = ProcessEngineClient(engine, **timeouts)
        try:
            await client.start()
            if ready:
                await client.wait_ready(START_SECONDS)
            await body(client)
        finally:
            await client.stop()
        assert client.pid is None

    asyncio.run(run())


async def collect(client: ProcessEngineClient, req: EngineRequest) -> list[EngineOutput]:
    return [output async for output in client.generate(req)]


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; the test's own time limit is asyncio's."""
    async with asyncio.timeout(START_SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


def test_requests_stats_and_cancellation(model_dir: Path) -> None:
    model = random_model(family_config("llama"))
    recipe = mixed_recipes(model)[0]
    digest = write_blob(model, save_adapter(model, recipe, model_dir / "adapters"), model_dir / "blobs")

    async def body(client: ProcessEngineClient) -> None:
        assert client.state == "ready"
        assert client.info.max_model_len == 256
        outputs = await asyncio.gather(
            *(collect(client, request(f"r{i}", PROMPT, 8, [(digest, 1.0)] if i % 2 else [])) for i in range(8))
        )
        tokens = [[t for o in out for t in o.token_ids] for out in outputs]
        assert tokens[0] == greedy(model, PROMPT, 8)
        assert all(t == tokens[i % 2] for i, t in enumerate(tokens))
        assert tokens[0] != tokens[1]
        assert outputs[0][-1].finish_reason in ("length", "stop")
        assert sum(e.scheduled_tokens for e in client.drain_events()) > 8 * len(PROMPT) // 2
        assert client.drain_events() == []
        await until(lambda: client.stats.adapter_loads == 1 and client.stats.running == 0)
        assert client.stats.adapters[0].digest == digest

        stream = client.generate(request("left", PROMPT, 240, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await until(lambda: client.stats.running == 0 and client.stats.blocks_used == 0)

        await client.pin_adapter(digest, True)
        await until(lambda: client.stats.adapters[0].pinned)
        await client.pin_adapter(digest, False)
        await client.forget_adapter(digest)
        await until(lambda: client.stats.device_adapter_bytes_used == 0 and client.stats.host_adapter_bytes_used == 0)

        with pytest.raises(AdapterLoadError):
            await collect(client, request("bad", PROMPT, 2, [("sha256:" + "0" * 64, 1.0)]))
        with pytest.raises(EngineError, match="context"):
            await collect(client, request("long", PROMPT, 10_000))

    with_client(config(model_dir), body)


def test_a_killed_engine_fails_its_requests_and_comes_back(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        streams = [client.generate(request(f"r{i}", PROMPT, 240, ignore_eos=True)) for i in range(6)]
        firsts = [asyncio.create_task(_anext(s)) for s in streams]
        await firsts[0]
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        running, *waiting = await asyncio.gather(_rest(streams[0]), *firsts[1:], return_exceptions=True)
        assert isinstance(running, EngineDeadError)
        assert any(isinstance(w, EngineDeadError) for w in waiting)
        await until(lambda: client.state == "dead")
        with pytest.raises(EngineDeadError):
            await collect(client, request("meanwhile", PROMPT, 2))
        await until(lambda: client.state == "ready")
        assert client.pid not in (None, pid)
        assert (await collect(client, request("after", PROMPT, 2)))[-1].finish_reason is not None

    with_client(config(model_dir), body)


async def _anext(stream: AsyncIterator[EngineOutput]) -> EngineOutput:
    return await anext(stream)


async def _all(stream: AsyncIterator[EngineOutput]) -> list[EngineOutput]:
    return [output async for output in stream]


async def _rest(stream: AsyncIterator[EngineOutput]) -> None:
    async for _ in stream:
        pass


def test_the_queue_has_a_bound(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        streams = [client.generate(request(f"r{i}", PROMPT, 240, ignore_eos=True)) for i in range(3)]
        firsts = [asyncio.create_task(_anext(s)) for s in streams]
        await firsts[0]
        with pytest.raises(QueueFullError) as caught:
            await collect(client, request("too many", PROMPT, 2))
        assert caught.value.retry_after >= 1
        for first, stream in zip(firsts, streams, strict=True):
            await first
            await stream.aclose()
        assert (await collect(client, request("now", PROMPT, 2)))[-1].finish_reason is not None

    with_client(config(model_dir, max_num_seqs=2, max_queue=1), body)


def test_the_queue_has_a_bound_of_tokens(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            long = list(range(5, 25))
            first = asyncio.create_task(collect(client, request("alone, however long", long, 2)))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="20 tokens wait"):
                await collect(client, request("too much", PROMPT, 2))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await first)[-1].finish_reason is not None
        both = await asyncio.gather(*(collect(client, request(name, PROMPT, 2)) for name in "ab"))
        assert all(outputs[-1].finish_reason is not None for outputs in both)

    with_client(config(model_dir, max_queue_tokens=12), body)


def test_a_request_waits_no_longer_than_it_may(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(QueueTimeoutError, match=r"0\.5 s") as caught:
                await collect(client, request("waits", PROMPT, 2))
            assert caught.value.retry_after > 1
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: client.stats.running == client.stats.waiting == 0)

    with_client(config(model_dir), body, queue_timeout_seconds=0.5)


def test_an_answer_takes_no_longer_than_it_may(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        pid = client.pid
        assert pid is not None
        stream = client.generate(request("long", PROMPT, 200, ignore_eos=True))
        await anext(stream)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError):
                await _rest(stream)
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: client.stats.running == client.stats.waiting == 0)

    with_client(config(model_dir), body, request_timeout_seconds=5.0)


def test_stop_drains_running_requests(model_dir: Path) -> None:
    async def run() -> None:
        client = ProcessEngineClient(config(model_dir))
        await client.start()
        await client.wait_ready(START_SECONDS)
        stream = client.generate(request("r", PROMPT, 240, ignore_eos=True))
        first = await anext(stream)
        running = asyncio.create_task(_all(stream))
        stopping = asyncio.create_task(client.stop(drain_seconds=START_SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError):
            await collect(client, request("late", PROMPT, 2))
        outputs = await running
        assert sum(len(o.token_ids) for o in [first, *outputs]) == 240
        await stopping
        assert client.pid is None

    asyncio.run(run())


def test_an_engine_that_cannot_start_says_why(model_dir: Path) -> None:
    async def body(client: ProcessEngineClient) -> None:
        with pytest.raises(EngineError, match="--max-model-len"):
            await client.wait_ready(START_SECONDS)
        assert client.state == "dead"

    with_client(config(model_dir, kv_cache_bytes=4096), body, ready=False)


def test_an_engine_ends_with_its_parent(model_dir: Path, tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import asyncio, sys, json\n"
        "from loramux.server.engine.client import ProcessEngineClient\n"
        "from loramux.server.engine.config import EngineConfig\n"
        "async def main():\n"
        "    client = ProcessEngineClient(EngineConfig(**json.loads(sys.argv[1])))\n"
        "    await client.start(); await client.wait_ready()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    import json
    import subprocess
    import sys
    import time

    settings = json.dumps(config(model_dir).to_dict())
    parent = subprocess.Popen([sys.executable, str(program), settings], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        for _ in range(1000):
            if not Path(f"/proc/{engine}").exists() or "Z" in Path(f"/proc/{engine}/stat").read_text().split()[2]:
                return
            time.sleep(0.02)
        raise AssertionError("the engine outlived its parent")
    finally:
        if parent.poll() is None:
            parent.kill()
        if parent.stdout is not None:
            parent.stdout.close()
