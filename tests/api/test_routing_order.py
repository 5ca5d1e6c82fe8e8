"""Changes of one adapter that overtake each other: what the router knows in the end is what the store holds."""

import asyncio
import json
import threading
from typing import Any

import pytest
from api.harness import Bench
from api.test_routing import SPELL, SUM, TALK, ready, teach

from loramux.adapters_store.registry import AdapterVersion

pytestmark = pytest.mark.anyio


@pytest.fixture
async def late(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, "asyncio.Task[Any]", asyncio.Event]:
    """A server with one skill, a change of its examples that the store has and the router not yet, and what lets it."""
    bench: Bench = await make(base_examples=TALK)
    await ready(bench)
    await teach(bench, "skill", TALK, 1)
    pinning, go_on = asyncio.Event(), asyncio.Event()

    async def held(digest: str, pinned: bool) -> None:
        pinning.set()
        await go_on.wait()

    monkeypatch.setattr(bench.engine, "pin_adapter", held)
    change = {"examples": SPELL, "pinned": True}
    patch = asyncio.create_task(bench.client.patch("/v1/adapters/skill", json=change))
    await pinning.wait()
    return bench, patch, go_on


def known(bench: Bench) -> dict[str, tuple[str, ...]]:
    """The texts that count, by adapter."""
    assert bench.state.router is not None
    return {key: texts.texts for key, texts in bench.state.router._learner._counted.items() if key}


async def test_the_newer_examples_stay(late: tuple[Bench, "asyncio.Task[Any]", asyncio.Event]) -> None:
    bench, patch, go_on = late
    assert (await bench.client.patch("/v1/adapters/skill", json={"examples": SUM})).status_code == 200
    go_on.set()
    assert (await patch).status_code == 200
    assert known(bench) == {"skill": tuple(SUM)}


async def test_the_deleted_stays_deleted(late: tuple[Bench, "asyncio.Task[Any]", asyncio.Event]) -> None:
    bench, patch, go_on = late
    deleting = asyncio.create_task(bench.client.delete("/v1/adapters/skill"))
    while known(bench):
        await asyncio.sleep(0.001)
    go_on.set()
    response = await patch
    assert (await deleting).status_code == 200
    assert "x-loramux-router" not in response.headers
    assert (await bench.client.get("/v1/router")).json()["adapters"]["registered"] == 0


async def test_what_is_deleted_while_the_store_is_read_stays_out(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Bench = await make(base_examples=TALK)
    await ready(bench)
    service = bench.state.router
    assert service is not None
    found, go_on = threading.Event(), threading.Event()
    read = bench.store.by_key

    def slow(key: str) -> AdapterVersion:
        version = read(key)
        found.set()
        go_on.wait()
        return version

    monkeypatch.setattr(bench.store, "by_key", slow)
    upload = asyncio.create_task(bench.upload("skill", 1, examples=json.dumps(SPELL)))
    while not found.is_set():
        await asyncio.sleep(0.001)
    deleting = asyncio.create_task(bench.client.delete("/v1/adapters/skill"))
    while not service._deletions:
        await asyncio.sleep(0.001)
    go_on.set()
    assert "x-loramux-router" not in (await upload).headers
    assert (await deleting).status_code == 200
    assert not service.knows("skill")
    assert known(bench) == {}
