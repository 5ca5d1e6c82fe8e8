"""Routing for several tenants: whose probes they are, what they cost, and what each is told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from api.harness import Bench, in_process, make_bench
from api.test_routing import NOBODYS, QUERY, SPELL, SUM, TALK, ready, teach
from api.test_tenants import As

from loramux.server.api.lanes import LANES

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": QUERY}]
QUERIES = [f"{QUERY}, then {number}" for number in range(3 * LANES)]


@pytest.fixture
async def acme(tmp_path: Path) -> AsyncIterator[As]:
    """A tenant of a server with one public adapter of the local tenant's; keys exist from here on."""
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1, visibility="public")
        yield As(bench, "acme")


def probes(bench: Bench, start: int) -> list[tuple[str, int]]:
    """Whose the probes since then are, and their tokens."""
    return [(probe.tenant, len(probe.prompt_token_ids)) for probe in bench.engine.probes[start:]]


@pytest.mark.parametrize("described", [True, False])
async def test_probes_are_the_callers(acme: As, described: bool) -> None:
    """By the embedding's probe, and by that of the states that adapters' weights are asked of."""
    bench = acme.bench
    if not described:
        assert (await acme.upload("mute", 2)).status_code == 201
        while not _weighed(bench):
            await asyncio.sleep(0.005)
    before = len(bench.engine.probes)
    router = {} if described else {"router": {"candidates": ["mute"]}}
    assert (await acme.chat("auto", messages=USER, **router)).status_code == 200
    assert (await acme.ask("POST", "/v1/route", json={"input": "Who is it?", **router})).status_code == 200
    assert [tenant for tenant, _ in probes(bench, before)] == ["acme", "acme"]


def _weighed(bench: Bench) -> int:
    """How many adapters are known by their weights."""
    assert bench.state.router is not None
    return int(bench.state.router._weights.report()["adapters"])


async def test_a_long_list_leaves_room_for_others(acme: As) -> None:
    bench = acme.bench
    before = len(bench.engine.probes)
    bench.engine.probe_gate = asyncio.Event()
    asking = asyncio.create_task(acme.ask("POST", "/v1/route", json={"input": QUERIES}))
    while len(bench.engine.probes) < before + LANES:
        await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(bench.engine.probes) == before + LANES
    assert bench.state.gate.of("acme").sequences == LANES
    bench.engine.probe_gate.set()
    decisions = (await asking).json()["data"]
    assert [decision["index"] for decision in decisions] == list(range(len(QUERIES)))
    assert all(decision["chosen"][0]["name"] == "default/spell" for decision in decisions)
    assert len(bench.engine.probes) == before + len(QUERIES)
    assert bench.state.gate.of("acme").sequences == 0


async def test_routing_takes_the_callers_tokens(acme: As, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = acme.bench
    monkeypatch.setattr(bench.state.gate, "_clock", lambda: 0.0)
    bench.state.tenants.set_limits("acme", {"tokens_per_minute": 1000})
    before = len(bench.engine.probes)
    response = await acme.ask("POST", "/v1/route", json={"input": [*QUERIES[:2], "long " * 100]})
    assert response.status_code == 200
    took = [tokens for _, tokens in probes(bench, before)]
    assert took[-1] == 64  # what the router looks at
    assert int(response.headers["x-ratelimit-remaining-tokens"]) == 1000 - sum(took)
    before = len(bench.engine.probes)
    response = await acme.ask("POST", "/v1/route", json={"input": [f"{n} {QUERY}" for n in range(64)]})
    assert (response.status_code, response.json()["error"]["type"]) == (429, "tokens")
    assert len(bench.engine.probes) == before


async def test_reasons_and_refusals_are_in_the_callers_names(make: Callable[..., Any]) -> None:
    """`rev` and `roman` are acme's own; the public `roman` is the local tenant's."""
    bench = await make(base_examples=TALK, router_weights_bytes=0)
    await ready(bench)
    await teach(bench, "roman", SUM, 3, visibility="public")
    acme = As(bench, "acme")
    for name, seed, fields in (("rev", 4, {"examples": json.dumps(SPELL)}), ("mute", 5, {}), ("roman", 6, {})):
        assert (await acme.upload(name, seed, **fields)).status_code == 201
    (decision,) = (await acme.ask("POST", "/v1/route", json={"input": NOBODYS})).json()["data"]
    assert f"of {decision['scores'][0]['name']}, is below" in decision["reason"]
    assert "not considered: mute, roman" in decision["reason"]
    asked = {"candidates": ["default/roman", "roman"], "policy": "examples", "threshold": 5}
    (decision,) = (await acme.ask("POST", "/v1/route", json={"input": NOBODYS, "router": asked})).json()["data"]
    assert "of default/roman, is below" in decision["reason"]
    assert "not considered: roman" in decision["reason"]
    for name in ("nobody", "default/nobody", "other/nobody"):
        response = await acme.ask("POST", "/v1/route", json={"input": "a", "router": {"candidates": [name]}})
        assert response.status_code == 400
        assert f"there is no adapter {name!r} that you may use" in response.json()["error"]["message"]


async def test_only_the_callers_adapters_are_waited_for(acme: As) -> None:
    bench, other = acme.bench, As(acme.bench, "other")
    for tenant in (acme, other):
        await tenant.ask("POST", "/v1/route", json={"input": QUERY})  # its row is kept from here on
    bench.engine.probe_gate = asyncio.Event()
    before = len(bench.engine.probes)
    upload = asyncio.create_task(other.upload("late", 7, examples=json.dumps(SUM)))
    while len(bench.engine.probes) == before:
        await asyncio.sleep(0.001)
    for tenant, waits in ((acme, False), (other, True)):
        (decision,) = (await tenant.ask("POST", "/v1/route", json={"input": QUERY})).json()["data"]
        assert ("1 adapters wait to be embedded" in decision["reason"]) is waits
    bench.engine.probe_gate.set()
    await upload
