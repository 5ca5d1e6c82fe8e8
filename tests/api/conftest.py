"""Fixtures of the API's tests."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from api.harness import Bench, in_process, listening, make_bench

from loramux.server import cli_registry


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A server in this process, with default settings."""
    async with in_process(make_bench(tmp_path)) as made:
        yield made


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes a server in this process with other settings."""
    async with AsyncExitStack() as stack:

        async def build(**settings: Any) -> Bench:
            return await stack.enter_async_context(in_process(make_bench(tmp_path, **settings)))

        yield build


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes a server behind a real socket."""
    with ExitStack() as stack:

        def build(**settings: Any) -> Bench:
            return stack.enter_context(listening(make_bench(tmp_path, **settings)))

        yield build


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A live server, whose store the commands find."""
    for name in ("LORAMUX_URL", "LORAMUX_API_KEY", "LORAMUX_STORE_DIR", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with listening(make_bench(tmp_path)) as bench:
        monkeypatch.setattr(cli_registry, "store_root", lambda settings: bench.store.registry_path.parent)
        yield bench
