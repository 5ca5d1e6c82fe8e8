"""Which weights answer: names, versions, fusion, and leases for the length of a request."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from api.harness import BASE, Bench, sse

pytestmark = pytest.mark.anyio


async def test_adapter_by_name_and_version(bench: Bench) -> None:
    old = bench.put("skill", 1)
    new = bench.put("skill", 2)
    for model, version in (("skill", new), ("skill@1", old), ("skill@2", new)):
        response = await bench.chat(model=model)
        body = response.json()
        assert body["model"] == model
        assert body["loramux"] == {"adapters": [{"name": "skill", "version": version.version, "weight": 1.0}]}
        assert response.headers["x-loramux-adapters"] == f"skill@{version.version};w=1"
        (ref,) = bench.engine.requests[-1].adapters
        assert (ref.digest, ref.weight) == (version.digest, 1.0)


async def test_stream_says_what_serves_it(bench: Bench) -> None:
    bench.put("skill")
    response = await bench.chat(model="skill", stream=True)
    assert response.headers["x-loramux-adapters"] == "skill@1;w=1"
    events = sse(response.text)
    assert events[0]["loramux"]["adapters"][0]["name"] == "skill"
    assert {event["model"] for event in events[:-1]} == {"skill"}


@pytest.mark.parametrize(
    "model", ["nope", "skill@9", "skill@0", "skill@", "skill@x", "@1", "../skill", "Skill", "x" * 300, BASE + "x"]
)
async def test_unknown_names(bench: Bench, model: str) -> None:
    bench.put("skill")
    response = await bench.chat(model=model)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert not bench.engine.requests


async def test_auto_needs_a_router(make: Callable[..., Any]) -> None:
    bench = await make(router="off")
    bench.put("skill")
    assert (await bench.chat(model="skill")).status_code == 200
    response = await bench.chat(model="auto")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_policy"


async def test_fusion(bench: Bench) -> None:
    a, b = bench.put("a", 1), bench.put("b", 2)
    response = await bench.chat(adapters=[{"name": "a", "weight": 0.7}, {"name": "b@1"}])
    assert response.json()["loramux"]["adapters"] == [
        {"name": "a", "version": 1, "weight": 0.7},
        {"name": "b", "version": 1, "weight": 1.0},
    ]
    assert response.headers["x-loramux-adapters"] == "a@1;w=0.7, b@1;w=1"
    refs = {ref.digest: ref.weight for ref in bench.engine.requests[0].adapters}
    assert refs == {a.digest: 0.7, b.digest: 1.0}


async def test_equal_content_under_two_names_is_one_member(bench: Bench) -> None:
    a = bench.put("a", 1)
    assert bench.put("b", 1).digest == a.digest
    await bench.chat(adapters=[{"name": "a", "weight": 0.25}, {"name": "b", "weight": 0.5}])
    (ref,) = bench.engine.requests[0].adapters
    assert (ref.digest, ref.weight) == (a.digest, 0.75)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, 400, "adapters[1].name"),
        ({"adapters": [{"name": "a"}, {"name": "a@1"}]}, 400, "adapters[1].name"),
        ({"adapters": [{"name": "auto"}]}, 400, "adapters[0].name"),
        ({"adapters": [{"name": BASE}]}, 400, "adapters[0].name"),
        ({"adapters": [{"name": "a"}], "model": "a"}, 400, "adapters"),
        ({"adapters": [{"name": f"a{i}"} for i in range(9)]}, 400, "adapters"),
        ({"adapters": [{"name": "a"}, {"name": "gone"}]}, 404, "model"),
    ],
)
async def test_fusions_that_make_no_sense(bench: Bench, body: dict[str, Any], status: int, param: str) -> None:
    bench.put("a")
    response = await bench.chat(**body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert bench.leases() == {}


async def test_an_empty_list_is_the_base(bench: Bench) -> None:
    assert (await bench.chat(adapters=[])).json()["loramux"] == {"adapters": []}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_keeps_its_version(bench: Bench, stream: bool) -> None:
    old = bench.put("skill", 1)
    go = asyncio.Event()
    bench.engine.script = lambda request: [list(b"a"), go.wait(), list(b"b"), [257]]
    running = asyncio.create_task(bench.chat(model="skill", stream=stream))
    while not bench.engine.running:
        await asyncio.sleep(0.001)
    assert bench.store._leases == {old.digest: 1}
    assert (await bench.client.delete("/v1/adapters/skill")).status_code == 200
    blobs = list(bench.store.blob_dir.iterdir())
    assert len(blobs) == 1  # leased
    assert (await bench.chat(model="skill")).status_code == 404
    bench.put("skill", 2)
    go.set()
    response = await running
    assert response.status_code == 200
    assert response.headers["x-loramux-adapters"] == "skill@1;w=1"
    assert bench.leases() == {}
    assert bench.engine.forgotten == [old.digest, old.digest]  # at once, and when its last request ended
    assert blobs[0] not in list(bench.store.blob_dir.iterdir())


async def test_leases_end_with_errors(bench: Bench) -> None:
    bench.put("skill")
    bench.engine.script = lambda request: [RuntimeError("boom")]
    assert (await bench.chat(model="skill")).status_code == 500
    assert (await bench.chat(model="skill", messages=[{"role": "user", "content": "x" * 300}])).status_code == 400
    assert bench.leases() == {}
