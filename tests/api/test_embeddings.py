"""`/v1/embeddings`: inputs, forms, bounds, and what reaches the engine."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from api.harness import BASE, STATES, VOCAB, Bench

from loramux.server.api.embeddings import unit
from loramux.server.api.lanes import LANES
from loramux.server.engine.protocol import AdapterLoadError, EngineDeadError, PoolingParams, QueueFullError


async def embed(bench: Bench, **body: Any) -> Any:
    return await bench.client.post("/v1/embeddings", json={"model": BASE, "input": "abc", **body})


def expected(data: bytes) -> np.ndarray:
    """The scripted engine's states: a histogram of the tokens, of length 1."""
    return unit(np.bincount(np.frombuffer(data, np.uint8) % STATES, minlength=STATES).astype(np.float32))


@pytest.mark.anyio
async def test_one_text(bench: Bench) -> None:
    body = (await embed(bench)).json()
    assert body["object"] == "list"
    assert body["model"] == BASE
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert body["loramux"] == {"adapters": []}
    (item,) = body["data"]
    assert (item["object"], item["index"]) == ("embedding", 0)
    np.testing.assert_allclose(item["embedding"], expected(b"abc"), rtol=1e-6)
    assert np.linalg.norm(item["embedding"]) == pytest.approx(1)
    (request,) = bench.engine.probes
    assert (request.pooling, request.prompt_token_ids, request.adapters) == (PoolingParams(), (97, 98, 99), ())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("given", "texts"),
    [("ab", [b"ab"]), (["ab", "c"], [b"ab", b"c"]), ([97, 98], [b"ab"]), ([[97], [98, 99]], [b"a", b"bc"])],
)
async def test_forms_of_input(bench: Bench, given: Any, texts: list[bytes]) -> None:
    items = (await embed(bench, input=given, encoding_format="base64")).json()["data"]
    assert [item["index"] for item in items] == list(range(len(texts)))
    for item, text in zip(items, texts, strict=True):
        found = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
        np.testing.assert_array_equal(found, expected(text))


@pytest.mark.anyio
async def test_many_inputs_leave_room_for_others(bench: Bench) -> None:
    bench.engine.probe_gate = asyncio.Event()
    texts = [f"{i}" for i in range(50)]
    task = asyncio.create_task(embed(bench, input=texts))
    while len(bench.engine.probes) < LANES:
        await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(bench.engine.probes) == LANES
    bench.engine.probe_gate.set()
    items = (await task).json()["data"]
    assert [item["index"] for item in items] == list(range(50))
    np.testing.assert_allclose(items[17]["embedding"], expected(b"17"), rtol=1e-6)


@pytest.mark.anyio
async def test_an_adapter_serves(bench: Bench) -> None:
    version = bench.put("skill")
    response = await embed(bench, model="skill@1", input=["a", "b"])
    assert response.json()["model"] == "skill@1"
    assert response.headers["x-loramux-adapters"] == "skill@1;w=1"
    assert {request.adapters[0].digest for request in bench.engine.probes} == {version.digest}
    assert not bench.leases()
    mixed = await embed(bench, adapters=[{"name": "skill", "weight": 0.5}])
    assert mixed.status_code == 200
    assert bench.engine.probes[-1].adapters[0].weight == 0.5


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"), ({"model": "auto"}, 400, "model"), ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"), ({"input": [""]}, 400, "input"), ({"input": 5}, 400, "input"),
        ({"input": ["a", 5]}, 400, "input"), ({"input": [VOCAB]}, 400, "input"), ({"input": [True]}, 400, "input"),
        ({"input": "x" * 300}, 400, "input"), ({"input": ["a"] * 2049}, 400, "input"),
        ({"encoding_format": "hex"}, 400, "encoding_format"), ({"dimensions": 5}, 400, "dimensions"),
        ({"dimensions": 0}, 400, "dimensions"), ({"truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens"),
        ({"colour": 1}, 400, "colour"), ({"adapters": [{"name": "nobody"}]}, 404, "model"),
    ],
)  # fmt: skip
async def test_mistakes(bench: Bench, body: dict[str, Any], status: int, param: str) -> None:
    response = await embed(bench, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert not bench.engine.probes


@pytest.mark.anyio
async def test_the_models_own_dimensions(bench: Bench) -> None:
    assert (await embed(bench, dimensions=STATES)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "code"),
    [(QueueFullError("full"), "queue_full"), (EngineDeadError("x"), "engine_dead"),
     (AdapterLoadError("too large"), "adapter_not_loadable")],
)  # fmt: skip
async def test_failures(bench: Bench, failure: Exception, code: str) -> None:
    bench.engine.probe_error = failure
    response = await embed(bench, input=["a"] * 20)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    bench.engine.probe_error = None
    assert (await embed(bench)).status_code == 200


@pytest.mark.anyio
async def test_a_tenants_share(make: Any) -> None:
    bench = await make(tenant_max_requests=3, api_key=["k"])
    bench.client.headers["authorization"] = "Bearer k"
    bench.engine.probe_gate = asyncio.Event()
    task = asyncio.create_task(embed(bench, input=["a"] * 9))
    while len(bench.engine.probes) < 3:
        await asyncio.sleep(0.001)
    assert (await embed(bench)).status_code == 429
    bench.engine.probe_gate.set()
    assert (await task).status_code == 200
    assert len(bench.engine.probes) == 9


def test_zero_stays_zero() -> None:
    assert not unit(np.zeros(3, np.float32)).any()


def test_the_official_client(live: Callable[..., Bench]) -> None:
    client = openai.OpenAI(base_url=f"{live().url}/v1", api_key="any", max_retries=0, timeout=20)
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model=BASE, input=["abc", "d"], **options)
        np.testing.assert_allclose(answer.data[0].embedding, expected(b"abc"), rtol=1e-6)
        assert answer.usage.prompt_tokens == 4
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="a")
