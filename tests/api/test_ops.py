"""Probes, and what clients get while the engine cannot serve."""

import pytest
from api.harness import BASE, Bench, sse

from loramux import __version__
from loramux.server.engine.protocol import (
    AdapterLoadError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    EngineOutput,
    QueueFullError,
    QueueTimeoutError,
)

pytestmark = pytest.mark.anyio


async def test_probes(bench: Bench) -> None:
    assert (await bench.client.get("/health")).json() == {"status": "ok"}
    assert (await bench.client.get("/ready")).json() == {"status": "ready", "model": BASE}
    assert (await bench.client.get("/version")).json() == {"version": __version__}


async def test_openapi_document(bench: Bench) -> None:
    document = (await bench.client.get("/openapi.json")).json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert {"model", "messages"} <= set(chat["required"])
    assert chat["additionalProperties"] is False
    upload = document["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert upload["schema"]["required"] == ["name", "files"]
    assert document["paths"]["/v1/completions"]["post"]


@pytest.mark.parametrize("state", ["starting", "draining", "dead"])
async def test_while_the_engine_does_not_serve(bench: Bench, state: str) -> None:
    bench.engine.state = state
    assert (await bench.client.get("/health")).status_code == 200
    for response in (await bench.client.get("/ready"), await bench.chat(), await bench.complete(stream=True)):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-should-retry"] == "true"
        assert response.json()["error"]["code"] == f"engine_{state}"
    assert (await bench.chat(model="nope")).status_code == 404
    assert (await bench.client.get("/v1/models")).status_code == 200
    assert (await bench.client.get("/metrics")).status_code == 200
    assert (await bench.upload("skill")).status_code == 201


FAILURES = [
    (QueueFullError("full", retry_after=3), 503, "queue_full", "true"),
    (QueueTimeoutError("no token after 5 s"), 503, "queue_timeout", "true"),
    (DeadlineError("not done after 5 s"), 504, "deadline_exceeded", "false"),
    (EngineDeadError("pid 123 died"), 503, "engine_dead", "true"),
    (AdapterLoadError("larger than the whole budget"), 503, "adapter_not_loadable", "false"),
    (EngineError("a passing thing"), 503, "engine_error", "true"),
    (EngineError("logits are not finite", retryable=False), 500, "engine_error", "false"),
    (EngineOutput("", finish_reason="error", error="x"), 503, "engine_dead", "true"),
    (EngineOutput("", finish_reason="abort"), 503, "engine_dead", "true"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code", "retry"), FAILURES)
async def test_failure_before_the_first_token(
    bench: Bench, stream: bool, failure: Exception, status: int, code: str, retry: str
) -> None:
    bench.engine.script = lambda request: [failure]
    response = await bench.chat(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-should-retry"] == retry
    assert "pid" not in response.text
    assert not bench.engine.running


async def test_retry_after_of_a_full_queue(bench: Bench) -> None:
    bench.engine.script = lambda request: [QueueFullError("full", retry_after=3)]
    assert (await bench.chat()).headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry"), [*FAILURES, (RuntimeError("/x"), 0, "internal_error", "")]
)
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
async def test_failure_in_mid_stream(
    bench: Bench, endpoint: str, failure: Exception, status: int, code: str, retry: str
) -> None:
    bench.engine.script = lambda request: [list(b"ab"), failure]
    response = await getattr(bench, endpoint)(stream=True)
    assert response.status_code == 200
    *events, last = sse(response.text)
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert all(event["choices"][0]["finish_reason"] is None for event in events)
    assert bench.leases() == {}


async def test_an_engine_that_stops_in_silence(bench: Bench) -> None:
    bench.engine.script = lambda request: [list(b"ab")]
    assert (await bench.chat()).status_code == 503
    assert "error" in sse((await bench.chat(stream=True)).text)[-1]


async def test_engine_starts_and_stops_with_the_application(make) -> None:
    bench = await make()
    assert bench.engine.state == "ready"
    await bench.state.stop(drain_seconds=2.0)
    await bench.state.stop(drain_seconds=9.0)
    assert bench.engine.stopped_with == 2.0
