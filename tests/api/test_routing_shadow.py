"""Routing without acting, and what the metrics say of routing."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, Bench, in_process, make_bench, sse
from api.test_metrics import scrape
from api.test_routing import NOBODYS, QUERY, SPELL, SUM, TALK, ready, teach

from loramux.server.api.auto.shadow import MAX_WAITING

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": QUERY}]


async def prepared(bench: Bench) -> None:
    await ready(bench)
    await teach(bench, "spell", SPELL, 1)
    await teach(bench, "sum", SUM, 2)


async def waits(request: Any) -> None:
    """Part of an answer that takes a while, so that the shadow is first."""
    await asyncio.sleep(0.2)


async def test_agreement_is_reported_and_counted(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_shadow=True)) as bench:
        await prepared(bench)
        bench.engine.script = lambda request: [list(b"a"), waits(request), [257]]
        for model, agrees in (("spell", True), ("spell@1", True), ("sum", False), (BASE, False)):
            body = (await bench.chat(model=model, messages=USER)).json()
            shadow = body["loramux"]["router"]["shadow"]
            assert body["loramux"]["adapters"] == [a for a in body["loramux"]["adapters"] if a["name"] in model]
            assert (shadow["status"], shadow["agrees"]) == ("decided", agrees), model
            assert shadow["chosen"] == [{"name": "spell", "weight": 1.0}]
        response = await bench.chat(messages=[{"role": "user", "content": NOBODYS}])
        assert response.json()["loramux"]["router"]["shadow"]["agrees"] is True
        assert "x-loramux-router-rung" not in response.headers
        found = await scrape(bench)
        assert found.of("loramux_router_shadow_total", result="agree") == 3
        assert found.of("loramux_router_shadow_total", result="disagree") == 2
        assert found.of("loramux_router_decisions_total", adapter="spell") is None


@pytest.mark.parametrize("chat", [True, False])
async def test_a_stream_reports_at_its_end(tmp_path: Path, chat: bool) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_shadow=True)) as bench:
        await prepared(bench)
        bench.engine.script = lambda request: [list(b"a"), waits(request), list(b"b"), [257]]
        ask = bench.chat(model="spell", messages=USER, stream=True) if chat else bench.complete(
            model="spell", prompt=QUERY, stream=True
        )  # fmt: skip
        events = [e for e in sse((await ask).text) if e != "[DONE]"]
        assert events[0]["loramux"]["router"]["shadow"]["status"] in ("pending", "decided")
        (end,) = [e for e in events if e["choices"] and e["choices"][0]["finish_reason"]]
        assert end["loramux"]["router"]["shadow"]["agrees"] is True


async def test_the_shadow_never_holds_an_answer_up(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_shadow=True)) as bench:
        await prepared(bench)
        bench.engine.probe_gate = asyncio.Event()
        bodies = [(await bench.chat(model="spell", messages=USER)).json() for _ in range(MAX_WAITING + 5)]
        states = [body["loramux"]["router"]["shadow"]["status"] for body in bodies]
        assert states[0] == "pending"
        assert states[-1] == "dropped"
        found = await scrape(bench)
        assert found.of("loramux_router_shadow_total", result="dropped") == states.count("dropped")
        assert (await bench.client.get("/ready")).status_code == 200


async def test_options_are_for_the_shadow_too(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_shadow=True)) as bench:
        await prepared(bench)
        bench.engine.script = lambda request: [list(b"a"), waits(request), [257]]
        body = (await bench.chat(model="sum", messages=USER, router={"candidates": ["sum"], "threshold": -10})).json()
        assert body["loramux"]["router"]["shadow"]["agrees"] is True
        response = await bench.chat(model="sum", messages=USER, router={"top_k": 0})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "router.top_k")
        body = (await bench.chat(model="sum", messages=USER, router={"candidates": ["nobody"]})).json()
        assert body["loramux"]["router"]["shadow"]["status"] == "failed"
        body = (await bench.chat(model="auto", messages=USER)).json()
        assert "shadow" not in body["loramux"]["router"]
        assert (await bench.complete(model="spell", prompt=["a", "b"])).status_code == 200


async def test_decisions_are_counted(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, metrics_max_adapters=2)) as bench:
        await prepared(bench)
        for text in (QUERY, QUERY, NOBODYS, "33 + 14 = ?"):
            await bench.chat(model="auto", messages=[{"role": "user", "content": text}])
        found = await scrape(bench)
        assert found.of("loramux_router_decisions_total", adapter="spell") == 2
        assert found.of("loramux_router_decisions_total", adapter=BASE) == 1
        assert found.of("loramux_router_decisions_total", adapter="other") == 1
        assert found.of("loramux_router_abstentions_total") == 1
        assert found.of("loramux_router_rung_total", rung="examples") == 4
        assert found.of("loramux_router_seconds_count") == 4
        await bench.client.delete("/v1/adapters/spell")
        assert (await scrape(bench)).of("loramux_router_decisions_total", adapter="spell") is None
