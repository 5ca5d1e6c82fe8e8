"""The benchmark scripts as modules, and servers that answer whatever a test wants."""

import asyncio
import importlib
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
SCRIPTS = ("report", "serve")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="session")
def scripts() -> SimpleNamespace:
    """benchmarks/*.py as `python benchmarks/serve.py` imports them; the path and the short names are put back."""
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    sys.path.insert(0, FOLDER)
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(FOLDER)
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="session")
def serve(scripts: SimpleNamespace) -> Any:
    """benchmarks/serve.py."""
    return scripts.serve


@dataclass
class Asked:
    """A request as the server got it."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> Any:
        return json.loads(self.body)


Handler = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class FakeServer:
    """What a fake server was asked, and where it listens."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def listening(handler: Handler) -> Iterator[FakeServer]:
    """A server on a free local port, in a thread of its own; every connection is one request for `handler`."""
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            fake.asked.append(asked := Asked(first, headers, body))
            await handler(asked, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert started.wait(30)
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


@pytest.fixture
def fake() -> Callable[[Handler], Any]:
    """`listening`."""
    return listening


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def text_event(text: str, finish: str | None = None, **extra: Any) -> bytes:
    """One event of a text completion."""
    choice = {"index": 0, "text": text, "finish_reason": finish, **extra}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """A correct stream: a token of text per arrival, usage, [DONE]."""
    wanted = asked.fields["max_tokens"]
    usage = {"prompt_tokens": len(asked.fields["prompt"]), "completion_tokens": wanted}
    writer.write(HEAD)
    for i in range(wanted):
        writer.write(chunk(text_event(f"t{i} ", "length" if i == wanted - 1 else None)))
        await writer.drain()
    writer.write(chunk(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"))
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


@pytest.fixture
def wire() -> SimpleNamespace:
    """The pieces that handlers are made of."""
    return SimpleNamespace(HEAD=HEAD, chunk=chunk, text_event=text_event, answer=answer)
