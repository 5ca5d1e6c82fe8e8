"""Fixtures of the observability tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from api.harness import Bench, in_process, make_bench


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A server in this process, with default settings."""
    async with in_process(make_bench(tmp_path)) as made:
        yield made
