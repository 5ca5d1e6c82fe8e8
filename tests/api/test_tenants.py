"""Tenants: whose adapters are whose, what each may use, and that nobody learns of what is not theirs."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.harness import BASE, Bench, adapter_files, in_process, make_bench, parts, sse
from api.test_auth import ADMIN, KEY, METRICS, OPEN
from fastapi.routing import iter_route_contexts

from loramux.adapters_store.tenants import Role
from loramux.server.api.refused import REFUSED
from loramux.server.engine.protocol import AdapterResidency, EngineStats

pytestmark = pytest.mark.anyio

PROMPT = [{"role": "user", "content": "hi"}]


class As:
    """One tenant's client."""

    def __init__(self, bench: Bench, tenant: str, role: Role = "user") -> None:
        self.bench = bench
        self.tenant = tenant
        self.secret, self.key = bench.state.tenants.create_key(tenant, role=role)

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""
        headers = {"authorization": f"Bearer {self.secret}", **options.pop("headers", {})}
        return await self.bench.client.request(method, path, headers=headers, **options)

    async def chat(self, model: str = BASE, **body: Any) -> httpx.Response:
        """One chat request."""
        return await self.ask("POST", "/v1/chat/completions", json={"model": model, "messages": PROMPT, **body})

    async def upload(self, name: str, seed: int = 0, **fields: str) -> httpx.Response:
        """One upload."""
        return await self.ask("POST", "/v1/adapters", data={"name": name, **fields}, files=parts(adapter_files(seed)))

    async def patch(self, name: str, **body: Any) -> httpx.Response:
        """One change."""
        return await self.ask("PATCH", f"/v1/adapters/{name}", json=body)

    async def names(self) -> list[str]:
        """What the two lists show, which is the same."""
        adapters = (await self.ask("GET", "/v1/adapters")).json()["data"]
        models = (await self.ask("GET", "/v1/models")).json()["data"]
        names = [adapter["name"] for adapter in adapters]
        assert [model["id"] for model in models] == [BASE, *names]
        return names


@pytest.fixture
async def trio(bench: Bench) -> tuple[Bench, As, As]:
    """A server with two tenants besides its own."""
    return bench, As(bench, "acme"), As(bench, "other")


def plain(response: httpx.Response) -> tuple[int, str, Mapping[str, str]]:
    """All of an answer but what no two have in common."""
    varying = {"x-request-id", "date"}
    return response.status_code, response.text, {k: v for k, v in response.headers.items() if k not in varying}


# What is not yours is not there.

NAMELESS = {"/v1/adapters", "/v1/models", "/v1/router", "/v1/router/train", "/openapi.json"}
"""Routes whose requests name no adapter, or, as an upload does, name one's own."""


def requests_with(name: str) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """Every request that names an adapter, by its route."""
    chat: list[dict[str, Any]] = [
        {"model": name}, {"model": name, "stream": True}, {"model": f"{name}@1"},
        {"model": BASE, "adapters": [{"name": name}]}, {"model": BASE, "adapters": [{"name": "mine"}, {"name": name}]},
        {"model": "auto", "router": {"candidates": [name]}},
        {"model": "auto", "router": {"candidates": ["mine", name], "explain": True}},
    ]  # fmt: skip
    quoted = name.replace("/", "%2F")
    changes: list[dict[str, Any]] = [
        {}, {"description": "x"}, {"examples": ["x"]}, {"pinned": True}, {"pinned": False}, {"visibility": "public"},
        {"shared_with": ["other"]},
    ]  # fmt: skip
    plain: list[dict[str, Any]] = [{"model": name}, {"model": f"{name}@1"}]
    scores = json.dumps({"query": "q", "scores": {name: 1}})
    return {
        "/v1/chat/completions": [("POST", "/v1/chat/completions", {"json": {"messages": PROMPT, **b}}) for b in chat],
        "/v1/completions": [("POST", "/v1/completions", {"json": {"prompt": "x", **b}}) for b in chat],
        "/v1/models/{id:path}": [("GET", f"/v1/models/{n}", {}) for n in (name, quoted, f"{name}@1", f"{quoted}%401")],
        "/v1/adapters/{name:path}": [
            *(("GET", f"/v1/adapters/{n}", {}) for n in (name, quoted, f"{name}@1", f"{quoted}%401")),
            *(("PATCH", f"/v1/adapters/{quoted}", {"json": change}) for change in changes),
            ("DELETE", f"/v1/adapters/{quoted}", {}), ("DELETE", f"/v1/adapters/{name}", {}),
        ],
        "/v1/responses": [("POST", "/v1/responses", {"json": {"input": "x", "store": False, **b}}) for b in chat[:4]],
        "/v1/embeddings": [("POST", "/v1/embeddings", {"json": {"input": "x", **b}}) for b in plain],
        "/tokenize": [("POST", "/tokenize", {"json": {"prompt": "x", **b}}) for b in plain],
        "/detokenize": [("POST", "/detokenize", {"json": {"tokens": [1], **b}}) for b in plain],
        "/v1/load_lora_adapter": [("POST", "/v1/load_lora_adapter", {"json": {"lora_name": name, "lora_path": "x"}})],
        "/v1/unload_lora_adapter": [("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": name}})],
        "/v1/route": [("POST", "/v1/route", {"json": {"input": "x", "router": {"candidates": [name]}}})],
        "/v1/feedback": [("POST", "/v1/feedback", {"json": {"input": "x", "adapter": name, "score": 1.0}})],
        "/v1/router/scores": [("POST", "/v1/router/scores", {"content": scores})],
    }  # fmt: skip


async def test_the_walk_below_covers_every_route(bench: Bench) -> None:
    paths = {context.path for context in iter_route_contexts(bench.app.routes)}
    of_keys = {path for path in ADMIN if path.startswith("/v1/admin/")}
    assert paths - OPEN - METRICS - of_keys - NAMELESS - set(REFUSED) == requests_with("x").keys()


@pytest.mark.parametrize(
    ("route", "role"),
    [(r, "user") for r in requests_with("x")] + [(r, "admin") for r in requests_with("x") if r != "/v1/router/scores"],
)
async def test_a_foreign_adapter_is_as_absent_as_one_that_never_was(bench: Bench, route: str, role: Role) -> None:
    acme, other = As(bench, "acme"), As(bench, "other", role)
    for seed, name in enumerate(("secret", "shared")):
        assert (await acme.upload(name, seed)).status_code == 201
    assert (await acme.patch("shared", shared_with=["third"])).status_code == 200
    assert (await other.upload("mine", 9)).status_code == 201
    before = bench.store.every().data
    for foreign, absent in (
        ("acme/secret", "acme/absent"), ("acme/shared", "acme/absent"), ("acme/secret", "none/absent"),
        ("secret", "absent"),
    ):  # fmt: skip
        ours, theirs = requests_with(foreign)[route], requests_with(absent)[route]
        for (method, path, options), (_, other_path, other_options) in zip(ours, theirs, strict=True):
            there = await other.ask(method, path, **options)
            not_there = await other.ask(method, other_path, **other_options)
            status, text, headers = plain(not_there)
            assert status in (400, 403, 404) or route == "/v1/router/scores", (method, path, text)
            for word in {absent, absent.replace("/", "%2F")}:
                text = text.replace(word, foreign)
            assert plain(there)[:2] == (status, text), (method, path)
            if len(foreign) == len(absent):
                assert plain(there)[2] == headers
            if route in KEY and "candidates" not in json.dumps(options):
                assert there.status_code == 404
    assert bench.store.every().data == before
    assert not bench.engine.requests
    assert bench.leases() == {}
    assert await other.names() == ["mine"]


async def test_lists_end_where_the_tenant_does(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    bench.put("locals", 0)
    for seed, name in enumerate(("b", "a")):
        await acme.upload(name, seed)
    await other.upload("a", 7)
    assert await acme.names() == ["a", "b"]
    assert await other.names() == ["a"]
    assert (await other.ask("GET", "/v1/adapters", params={"after": "acme/a"})).json()["data"] == []
    mine = (await other.ask("GET", "/v1/adapters/a")).json()
    theirs = (await acme.ask("GET", "/v1/adapters/a")).json()
    assert (mine["owner"], theirs["owner"]) == ("other", "acme")
    assert mine["digest"] != theirs["digest"]
    await other.chat("a")
    assert bench.engine.requests[-1].adapters[0].digest == mine["digest"]
    assert (await other.ask("DELETE", "/v1/adapters/a")).status_code == 200
    assert await acme.names() == ["a", "b"]
    assert (await acme.chat("a")).status_code == 200


# Sharing.


async def test_public_and_shared_adapters(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    third = As(bench, "third")
    await acme.upload("open", 1, visibility="public")
    await acme.upload("given", 2, visibility="shared", shared_with='["other", "other", "nobody-yet"]')
    await acme.upload("own", 3)
    await other.upload("open", 4)
    assert await acme.names() == ["given", "open", "own"]
    assert await other.names() == ["open", "acme/given", "acme/open"]
    assert await third.names() == ["acme/open"]
    digest = bench.store.resolve("open", tenant="acme").digest
    for model in ("acme/open", "acme/open@1"):
        response = await other.chat(model)
        assert response.json()["model"] == model
        assert response.json()["loramux"]["adapters"] == [{"name": "acme/open", "version": 1, "weight": 1.0}]
        assert response.headers["x-loramux-adapters"] == "acme/open@1;w=1"
        assert bench.engine.requests[-1].adapters[0].digest == digest
    assert (await other.chat("open")).headers["x-loramux-adapters"] == "open@1;w=1"
    assert bench.engine.requests[-1].adapters[0].digest != digest
    assert (await acme.chat("acme/own")).headers["x-loramux-adapters"] == "own@1;w=1"
    assert (await third.chat("open")).status_code == 404  # a bare name is one's own
    fused = await other.chat(adapters=[{"name": "acme/given", "weight": 0.5}, {"name": "open"}, {"name": "acme/open"}])
    assert fused.headers["x-loramux-adapters"] == "acme/given@1;w=0.5, open@1;w=1, acme/open@1;w=1"
    twice = await other.chat(adapters=[{"name": "open"}, {"name": "other/open@1"}])
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "adapters[1].name")
    shown = (await other.ask("GET", "/v1/adapters/acme/given")).json()
    assert (shown["id"], shown["name"], shown["owner"]) == ("acme/given@1", "acme/given", "acme")
    assert (shown["visibility"], shown["shared_with"]) == ("shared", None)  # with whom else is not theirs to know
    assert (await acme.ask("GET", "/v1/adapters/given")).json()["shared_with"] == ["nobody-yet", "other"]
    card = (await other.ask("GET", "/v1/models/acme%2Fgiven")).json()
    assert (card["id"], card["owned_by"], card["root"]) == ("acme/given", "acme", "acme/given@1")


async def test_only_the_owner_changes_an_adapter(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    await acme.upload("open", 1, visibility="public")
    before = bench.store.resolve("open", tenant="acme")
    for change in ({"description": "x"}, {"pinned": True}, {"visibility": "private"}, {"shared_with": ["other"]}):
        assert (await other.patch("acme/open", **change)).status_code == 404
    assert (await other.ask("DELETE", "/v1/adapters/acme/open")).status_code == 404
    assert (await other.upload("acme/open", 2)).status_code == 400
    assert bench.store.resolve("open", tenant="acme") == before
    assert not bench.engine.pins
    assert (await acme.patch("acme/open", description="mine")).json()["description"] == "mine"


async def test_sharing_ends_at_once_and_running_requests_finish(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    await acme.upload("given", 1, shared_with='["other"]')
    go = asyncio.Event()
    bench.engine.script = lambda request: [list(b"a"), go.wait(), list(b"b"), [257]]
    running = asyncio.create_task(other.chat("acme/given"))
    while not bench.engine.running:
        await asyncio.sleep(0.001)
    assert (await acme.patch("given", visibility="private")).json()["shared_with"] == []
    assert (await other.chat("acme/given")).status_code == 404
    go.set()
    assert (await running).status_code == 200
    assert (await acme.patch("given", shared_with=["other"])).json()["visibility"] == "shared"
    assert (await other.chat("acme/given")).status_code == 200
    await acme.upload("given", 2)  # a new version leaves it shared
    assert (await other.chat("acme/given")).headers["x-loramux-adapters"] == "acme/given@2;w=1"
    await acme.ask("DELETE", "/v1/adapters/given")
    await acme.upload("given", 3)  # who takes the name again starts private
    assert (await other.chat("acme/given")).status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [({"visibility": "secret"}, "visibility"), ({"visibility": "shared"}, "shared_with"),
     ({"shared_with": []}, "shared_with"), ({"visibility": "public", "shared_with": ["a"]}, "shared_with"),
     ({"shared_with": ["A b"]}, "shared_with"), ({"shared_with": ["../x"]}, "shared_with"),
     ({"shared_with": ["x"] * 2000}, "shared_with"),
     ({"shared_with": [f"t{i}" for i in range(300)]}, "shared_with"), ({"shared_with": [1]}, "shared_with[0]")],
)  # fmt: skip
async def test_sharing_that_makes_no_sense(trio: tuple[Bench, As, As], change: dict[str, Any], param: str) -> None:
    bench, acme, _ = trio
    await acme.upload("a", 1)
    response = await acme.patch("a", **change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert bench.store.resolve("a", tenant="acme").visibility == "private"


async def test_pages_run_over_from_own_to_others(trio: tuple[Bench, As, As]) -> None:
    _, acme, other = trio
    for seed, name in enumerate("abc"):
        await acme.upload(name, seed, visibility="public")
    for seed, name in enumerate("xy"):
        await other.upload(name, seed + 5)
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await other.ask("GET", "/v1/adapters", params={"limit": "2", **after})).json()
        seen += [item["name"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == ["x", "y", "acme/a", "acme/b", "acme/c"]
    for wrong in ("a/b/c", "/a", "A", "../x"):
        assert (await other.ask("GET", "/v1/adapters", params={"after": wrong})).status_code == 400


async def test_the_bases_name_is_nobodys(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path)) as bench:
        tenant, name = BASE.split("/")
        assert (await As(bench, tenant).upload(name)).status_code == 409


# `auto`.


@pytest.fixture
async def routed(tmp_path: Path) -> AsyncIterator[tuple[Bench, As, As]]:
    """Two tenants on a server whose router knows what the base is to answer."""
    async with in_process(make_bench(tmp_path, base_examples=[f"chat about subject {i}" for i in range(20)])) as bench:
        yield bench, As(bench, "acme"), As(bench, "other")


async def learned(tenant: As, name: str, seed: int, words: str, **fields: str) -> None:
    examples = json.dumps(
        [f"{words} {thing}" for thing in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    )
    for _ in range(200):
        response = await tenant.upload(name, seed, examples=examples, **fields)
        if response.headers.get("x-loramux-router") == "ready":
            return
        await asyncio.sleep(0.02)
    raise AssertionError(response.text)


async def test_auto_never_picks_what_is_not_yours(routed: tuple[Bench, As, As]) -> None:
    _, acme, other = routed
    await learned(acme, "spell", 1, "spell backwards the word")
    ask = [{"role": "user", "content": "spell backwards the word nine"}]
    options = {"explain": True, "threshold": -10}
    own = (await acme.chat("auto", messages=ask, router=options)).json()["loramux"]
    assert own["adapters"][0]["name"] == "spell"
    assert own["router"]["chosen"][0]["name"] == "spell"
    foreign = await other.chat("auto", messages=ask, router=options)
    assert foreign.json()["loramux"]["adapters"] == []
    assert "spell" not in json.dumps(foreign.json()["loramux"]) + str(foreign.headers)
    await acme.patch("spell", visibility="public")
    now = (await other.chat("auto", messages=ask, router=options)).json()["loramux"]
    assert now["adapters"][0]["name"] == "acme/spell"
    assert [score["name"] for score in now["router"]["scores"]] == ["acme/spell"]
    named = await other.chat("auto", messages=ask, router={"candidates": ["acme/spell"], "threshold": -10})
    assert named.headers["x-loramux-adapters"] == "acme/spell@1;w=1"
    await acme.patch("spell", visibility="private")
    again = (await other.chat("auto", messages=ask, router=options)).json()["loramux"]
    assert again["adapters"] == []


# Caches, digests, tiers.


async def test_salts_keep_tenants_apart(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio

    async def salt(tenant: As, **body: Any) -> str:
        await tenant.chat(**body)
        return bench.engine.requests[-1].salt

    again = As(bench, "acme")
    assert await salt(acme) == await salt(acme) == await salt(again)  # one tenant's prompts share blocks
    salts = [await salt(t, **b) for t in (acme, other) for b in ({}, {"cache_salt": "x"}, {"cache_salt": "y"})]
    assert len(set(salts)) == 6
    assert all(len(salt) == 32 for salt in salts)
    # nobody can write a salt that leads to another's blocks: not theirs, not its secret's
    forged = [
        await salt(other, cache_salt=given)
        for given in (salts[0], "acme", bench.state.tenants.tenant("acme").salt.hex())
    ]
    assert not set(forged) & set(salts)
    await acme.ask("POST", "/v1/completions", json={"model": BASE, "prompt": ["a", "b"]})
    assert {request.salt for request in bench.engine.requests[-2:]} == {salts[0]}


async def test_without_keys_a_salt_is_the_clients(bench: Bench) -> None:
    await bench.chat(cache_salt="mine")
    await bench.chat()
    assert [request.salt for request in bench.engine.requests] == ["mine", ""]


async def test_equal_content_tells_nothing(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    await acme.upload("a", 1)
    await acme.chat("a")
    digest = bench.store.resolve("a", tenant="acme").digest
    bench.engine.stats = EngineStats(adapters=(AdapterResidency(digest, True, True, True, 1, 10),))
    same, new = await other.upload("b", 1), await other.upload("c", 2)
    assert same.status_code == new.status_code == 201
    assert same.json()["digest"] == digest
    assert same.json()["tier"] == new.json()["tier"] == "disk"  # though the device has it
    assert (await acme.ask("GET", "/v1/adapters/a")).json()["tier"] == "device"
    usage = bench.store.usage("other"), bench.store.usage("acme")
    assert usage[0].bytes == 2 * usage[1].bytes  # each pays for what it keeps
    await other.chat("b")
    assert (await other.ask("GET", "/v1/adapters/b")).json()["tier"] == "device"
    for name in ("b", "c"):
        assert (await other.ask("DELETE", f"/v1/adapters/{name}")).status_code == 200
    assert (await acme.chat("a")).status_code == 200
    assert bench.state.names.of(digest) == "acme/a"


async def test_a_full_store_does_not_tell_either(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    first = (await acme.upload("a", 1)).json()
    bench.store.limits = type(bench.store.limits)(min_free_bytes=0, max_total_bytes=first["bytes"])
    for seed in (1, 2):
        response = await other.upload("b", seed)
        assert (response.status_code, response.json()["error"]["code"]) == (507, "store_full")


async def test_pins_are_each_tenants_own(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    await acme.upload("a", 1, visibility="public")
    await other.upload("a", 1)
    assert (await acme.patch("a", pinned=True)).json()["pinned"] is True
    assert (await other.ask("GET", "/v1/adapters/a")).json()["pinned"] is False
    assert (await other.patch("a", pinned=False)).json()["pinned"] is False
    assert [pinned for _, pinned in bench.engine.pins] == [True]
    bench.state.tenants.set_limits("other", {"pinned": 1})
    await other.upload("b", 2)
    both = await asyncio.gather(other.patch("a", pinned=True), other.patch("b", pinned=True))
    assert sorted(response.status_code for response in both) == [200, 429]
    refused = next(response for response in both if response.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"].isdigit()


# Keys while requests run, metrics, logs.


async def test_a_key_revoked_in_the_middle_of_a_stream(trio: tuple[Bench, As, As]) -> None:
    bench, acme, _ = trio
    go = asyncio.Event()
    bench.engine.script = lambda request: [list(b"a"), go.wait(), list(b"b"), [257]]
    running = asyncio.create_task(acme.chat(stream=True))
    while not bench.engine.running:
        await asyncio.sleep(0.001)
    bench.state.tenants.revoke_key(acme.key.id)
    refused = await acme.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    go.set()
    events = sse((await running).text)
    assert events[-1] == "[DONE]"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "ab"


async def test_metrics_tell_adapters_apart_and_strangers_nothing(trio: tuple[Bench, As, As]) -> None:
    bench, acme, other = trio
    for seed, tenant in enumerate((acme, other)):
        await tenant.upload("skill", seed)
        await tenant.chat("skill")
    assert (await bench.client.get("/metrics")).status_code == 401
    assert (await other.ask("GET", "/metrics")).status_code == 403
    scrape = await As(bench, "ops", "metrics").ask("GET", "/metrics")
    assert scrape.status_code == 200
    for label in ("acme/skill", "other/skill"):
        assert f'loramux_requests_total{{adapter="{label}",status="stop"}} 1.0' in scrape.text
    await acme.ask("DELETE", "/v1/adapters/skill")
    scrape = await As(bench, "ops", "metrics").ask("GET", "/metrics")
    assert "acme/skill" not in scrape.text
    assert "other/skill" in scrape.text


async def test_log_lines_name_the_tenant(trio: tuple[Bench, As, As], caplog: pytest.LogCaptureFixture) -> None:
    _, acme, _ = trio
    caplog.set_level(logging.INFO, "loramux.access")
    await acme.chat()
    assert caplog.records[-1].__dict__["fields"]["tenant"] == "acme"


async def test_feedback_reaches_only_ones_own_requests(routed: tuple[Bench, As, As]) -> None:
    bench, acme, other = routed
    id = (await acme.chat()).json()["id"].removeprefix("chatcmpl-")
    service = bench.state.router
    assert service is not None
    assert service.recall(f"acme/{id}") is not None
    assert service.recall(id) is None
    for caller in (acme, other):
        found = bench.state.keys.caller(caller.secret.encode())
        assert found is not None
        assert (service.recall(found.remembered(id)) is not None) == (caller is acme)
        assert found.remembered(f"acme/{id}") == f"{found.tenant}/acme/{id}"
    local = bench.state.keys.anybody()
    assert service.recall(local.remembered(f"acme/{id}")) is None
    assert service.recall(local.remembered(id)) is None


async def test_tenants_named_by_hostile_texts(make: Callable[..., Any]) -> None:
    bench = await make()
    acme = As(bench, "acme")
    await acme.upload("a", 1)
    for name in ("a' OR '1'='1", "a'; DROP TABLE adapters; --", "acme/a' --", "%", "acme/%", "//", "acme//a", "/a",
                 "a/", "acme/../acme/a", "acme/a@1@1", "acme/a@0", "acme/a@99999999999", "a\x00",
                 "\N{CYRILLIC SMALL LETTER A}cme/a"):  # fmt: skip
        response = await acme.chat(name)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found"), name
    assert await acme.names() == ["a"]
