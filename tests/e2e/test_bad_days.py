"""Clients that vanish and an engine that is killed, on the demo: nothing is left behind, and everything comes back."""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.live import LiveServer, live_server

from loramux.server.api.app import create_app
from loramux.server.api.serve import Server, assemble, server_config
from loramux.server.api.state import ServerState
from loramux.server.engine.client import ProcessEngineClient
from loramux.server.settings import Settings

BASE = "loramux-demo"
CLIENTS = 500
AT_ONCE = 24
STREAMS = 100
RUNNING = 64
PATIENCE_SECONDS = 60.0
STAY_SECONDS = 3.0
ADAPTER = Path(__file__).parents[2] / "server" / "demo" / "adapters" / "reverse"


@dataclass
class Inside:
    """A server on a thread and an event loop of its own, with its engine's process: what it holds can be looked at."""

    state: ServerState
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return self.server.address

    def ask(self, coroutine: Awaitable[Any]) -> Any:
        """Runs something on the server's loop."""

        async def run() -> Any:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def tasks(self) -> Counter[str]:
        """The loop's tasks by what they run."""

        async def names() -> Counter[str]:
            mine = asyncio.current_task()
            return Counter(getattr(t.get_coro(), "__qualname__", "?") for t in asyncio.all_tasks() if t is not mine)

        found: Counter[str] = self.ask(names())
        return found

    def held(self) -> dict[str, Any]:
        """What requests hold while they run; all of it empty when none does."""
        engine = self.state.engine
        assert isinstance(engine, ProcessEngineClient)
        with self.state.store._guard:
            leases = dict(self.state.store._leases)
        return {
            "streams": list(engine._streams),
            "calls": list(engine._calls),
            "leases": leases,
            "in use": dict(self.state._in_use),
            "pinned": dict(self.state.pinned),
            "admitted": {k: use.sequences for k, use in self.state.gate._uses.items() if use.sequences},
            "connections": len(self.server.server_state.connections),
            "slots": [a.digest for a in engine.stats.adapters if a.users],
            "running": engine.stats.running,
            "waiting": engine.stats.waiting,
            "uploads": list(self.state.settings.store_dir.glob("**/uploads/*")),
        }


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    settings = Settings(port=0, store_dir=tmp_path, threads=1, max_num_seqs=16)
    state = assemble(settings).state
    server = Server(server_config(state, create_app(state)), state)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    wait_for("the server", lambda: server.started or not thread.is_alive())
    made = Inside(state, server, loops[0])
    made.ask(state.engine.wait_ready())
    yield made
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_SECONDS * 20)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} was waited for in vain")


def body_of(chance: random.Random) -> tuple[str, bytes, str]:
    """Some request: its path, its body and the body's type."""
    model = chance.choice([BASE, "reverse", "roman", "caesar", "auto"])
    sampling = {"model": model, "stream": chance.random() < 0.8, "max_tokens": 60, "ignore_eos": True}
    text = f"Reverse this: {chance.random()}"
    kind = chance.randrange(6)
    if kind == 0:
        boundary = "vanishing"
        parts = [
            f'--{boundary}\r\ncontent-disposition: form-data; name="name"\r\n\r\nhalf-{chance.random()}\r\n'.encode()
        ]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            head = f'--{boundary}\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
            parts.append(head.encode() + (ADAPTER / name).read_bytes() + b"\r\n")
        whole = b"".join(parts) + f"--{boundary}--\r\n".encode()
        return "/v1/adapters", whole[: len(whole) * 9 // 10], f"multipart/form-data; boundary={boundary}"
    if kind == 1:
        request: dict[str, Any] = {"model": BASE, "input": [text] * 4}
        return "/v1/embeddings", json.dumps(request).encode(), "application/json"
    if kind == 2:
        request = {**sampling, "model": BASE if model == "auto" else model, "prompt": [text] * 3, "logprobs": 2}
        return "/v1/completions", json.dumps(request).encode(), "application/json"
    request = {**sampling, "messages": [{"role": "user", "content": text}], "n": chance.choice([1, 1, 2])}
    return "/v1/chat/completions", json.dumps(request).encode(), "application/json"


async def vanish(host: str, port: int, chance: random.Random) -> bool:
    """One client: it sends all of a request or some of it, reads some of the answer or none, and goes, politely or by
    a reset. Returns whether it read anything."""
    path, body, kind = body_of(chance)
    declared = len(body) + (len(body) // 9 if path == "/v1/adapters" else 0)  # uploads break off
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {declared}\r\n\r\n".encode()
    data, patience = head + body, [0.0, 0.05, STAY_SECONDS]
    if chance.random() < 0.2:
        data = data[: chance.randrange(len(data))]
    if len(data) < len(head) + declared:
        patience.pop()  # there will be no answer
    reader, writer = await asyncio.open_connection(host, port)
    got = b""
    try:
        writer.write(data)
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(chance.choice(patience)):
                for _ in range(chance.randrange(1, 8)):
                    got += await reader.read(1 << chance.randrange(4, 12))
    except ConnectionError:
        pass
    finally:
        if chance.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # a reset instead of an end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return bool(got)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_clients_that_vanish_leave_nothing_behind(inside: Inside) -> None:
    address = httpx.URL(inside.url)
    question = {"model": "reverse", "messages": [{"role": "user", "content": "Reverse this: planet"}], "temperature": 0}

    def ask() -> Any:
        answer = httpx.post(f"{inside.url}/v1/chat/completions", json=question, timeout=60)
        return answer.status_code, answer.json()["choices"][0]["message"]["content"]

    right = ask()

    async def storm(clients: int, seed: int) -> int:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> bool:
            async with gate:
                return await vanish(address.host, address.port or 0, random.Random(seed + number))

        return sum(await asyncio.gather(*(one(number) for number in range(clients))))

    def idle() -> bool:
        return not any(inside.held().values())

    asyncio.run(storm(AT_ONCE, 10_000))  # what is made once and kept: threads, the router's probes
    wait_for("the warm-up's end", idle)
    files, tasks = open_files(), inside.tasks()

    assert asyncio.run(storm(CLIENTS, 0)) > CLIENTS // 5
    try:
        wait_for("an empty server", idle)
    except AssertionError:
        raise AssertionError(f"still held: {inside.held()}") from None
    wait_for("all tasks' end", lambda: not inside.tasks() - tasks)
    wait_for("all files' end", lambda: open_files() <= files)

    def samples() -> dict[str, float]:
        lines = httpx.get(f"{inside.url}/metrics", timeout=30).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    wait_for("empty blocks", lambda: not any(v for k, v in samples().items() if k.startswith(names)))
    assert not [
        a["name"] for a in httpx.get(f"{inside.url}/v1/adapters").json()["data"] if a["name"].startswith("half")
    ]
    assert ask() == right == (200, "tenalp")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path, "--max-num-seqs", str(RUNNING)) as server:
        yield server


def engine_of(server: LiveServer) -> int:
    """The engine's process: the server's child that runs it."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (pid,) = [int(c) for c in children if b"engine.process" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return pid


def test_a_killed_engine_under_load(demo: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    def adapters() -> list[tuple[str, str]]:
        data = httpx.get(f"{demo.url}/v1/adapters", timeout=60).json()["data"]
        return [(adapter["name"], adapter["digest"]) for adapter in data]

    before, pid = adapters(), engine_of(demo)
    ends: list[BaseException | None] = []
    killed_at = 0.0

    async def load() -> None:
        started = 0
        async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def one(number: int) -> None:
                nonlocal started
                first = True
                try:
                    stream = await client.chat.completions.create(
                        model=[BASE, "reverse", "roman", "caesar"][number % 4], stream=True, max_tokens=900,
                        messages=[{"role": "user", "content": f"Count to {number}."}],
                        extra_body={"ignore_eos": True},
                    )  # fmt: skip
                    async for _ in stream:
                        started, first = started + first, False
                except openai.APIError as error:
                    ends.append(error)
                else:
                    ends.append(None)

            tasks = [asyncio.create_task(one(number)) for number in range(STREAMS)]
            while started < RUNNING and not any(task.done() for task in tasks):
                await asyncio.sleep(0.01)
            nonlocal killed_at
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            await asyncio.gather(*tasks)

    asyncio.run(load())
    question = {"model": "reverse", "messages": [{"role": "user", "content": "Reverse this: planet"}], "temperature": 0}
    refusals = set()
    while time.monotonic() < killed_at + PATIENCE_SECONDS:
        answer = httpx.post(f"{demo.url}/v1/chat/completions", json=question, timeout=60)
        if answer.status_code == 200:
            break
        refusals.add((answer.status_code, "retry-after" in answer.headers))
        time.sleep(0.05)
    seconds = time.monotonic() - killed_at
    with capsys.disabled():
        sys.stdout.write(f"\nthe demo answered {seconds:.1f} s after its engine was killed under {STREAMS} streams\n")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "tenalp"
    assert refusals <= {(503, True)}
    assert len(ends) == STREAMS
    assert all(isinstance(end, openai.APIError) for end in ends)
    assert Counter(getattr(end, "code", None) for end in ends) == {"engine_dead": STREAMS}
    assert adapters() == before
    assert engine_of(demo) != pid
    (restarts,) = [
        v for k, v in demo.metrics().items() if k.startswith("loramux_engine_restarts_total") and "died" in k
    ]
    assert restarts == 1
