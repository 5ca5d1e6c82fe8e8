"""An engine that hangs is replaced; one that is idle, or whose reports wait to be read, is not."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest
from support.engines import request
from support.models import family_config, random_model, save_model

from loramux.server.engine.client import FIRST_STEP_FACTOR, ProcessEngineClient
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.protocol import EngineDeadError, EngineOutput

PROMPT = [5, 6, 7, 8, 9]
PATIENCE = 120
TIMEOUT = 3.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A small engine."""
    model = save_model(random_model(family_config("llama")), tmp_path_factory.mktemp("base"))
    return EngineConfig(
        model_path=str(model), blob_dir=str(model / "blobs"), dtype="float32", device="cpu", max_num_seqs=4,
        max_batched_tokens=64, block_size=4, kv_cache_bytes=4 << 20, device_adapter_bytes=16 << 20,
        host_adapter_bytes=16 << 20, threads=1,
    )  # fmt: skip


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; the bound only ends a test that has failed."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


async def rest(stream: AsyncIterator[EngineOutput]) -> int:
    """How many outputs are left."""
    return len([output async for output in stream])


def test_a_stuck_engine_is_replaced(config: EngineConfig) -> None:
    async def run() -> None:
        client = ProcessEngineClient(config, step_timeout_seconds=TIMEOUT)
        try:
            await client.start()
            await client.wait_ready(PATIENCE)
            assert await rest(client.generate(request("first", PROMPT, 2))) > 0
            pid = client.pid
            assert pid is not None

            await asyncio.sleep(1.5 * TIMEOUT)  # idle
            time.sleep(1.5 * TIMEOUT)  # this process is what stands still here
            await asyncio.sleep(0.5 * TIMEOUT)
            assert client.pid == pid
            assert client.restarts == {"died": 0, "stuck": 0}

            streams = [client.generate(request(f"r{i}", PROMPT, 240, ignore_eos=True)) for i in range(3)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            os.kill(pid, signal.SIGSTOP)
            ended = await asyncio.gather(*(rest(stream) for stream in streams), return_exceptions=True)
            assert all(isinstance(end, EngineDeadError) for end in ended)
            await until(lambda: client.state == "ready")
            assert client.pid not in (None, pid)
            assert client.restarts == {"died": 0, "stuck": 1}
            assert await rest(client.generate(request("after", PROMPT, 2))) > 0

            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.restarts == {"died": 1, "stuck": 1})
        finally:
            await client.stop()

    asyncio.run(run())


def test_the_first_step_may_take_longer(config: EngineConfig) -> None:
    async def run() -> None:
        client = ProcessEngineClient(config, step_timeout_seconds=0.5)
        try:
            await client.start()
            await client.wait_ready(PATIENCE)
            await until(lambda: client.stats.steps == 0 and client.pid is not None)
            pid = client.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.5 * FIRST_STEP_FACTOR / 2)
            assert client.pid == pid
            await until(lambda: client.restarts["stuck"] == 1)
        finally:
            await client.stop()

    asyncio.run(run())
