"""Request ids, log lines, bounds on heads and bodies, cross-origin requests, and defects."""

import logging
import time
from typing import Any

import httpx
import pytest
from api.harness import BASE, END, Bench
from pydantic import TypeAdapter

from loramux.adapters_store.names import LOCAL_TENANT
from loramux.server.api.context import set_tenant
from loramux.server.api.middleware import MAX_HEADERS, RequestMiddleware
from loramux.server.engine.protocol import EngineDeadError, EngineOutput, QueueFullError
from loramux.server.observability.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio


async def test_request_ids(bench: Bench) -> None:
    given = await bench.client.get("/health", headers={"x-request-id": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 65, "", "é".encode().decode("latin-1"), 'a"b', "%0a"):
        made = (await bench.client.get("/health", headers={b"x-request-id": bad.encode("latin-1")})).headers[
            "x-request-id"
        ]
        assert len(made) == 32
    assert len((await bench.client.get("/nothing")).headers["x-request-id"]) == 32


async def test_equal_request_ids_do_not_meet_in_the_engine(bench: Bench) -> None:
    headers = {"x-request-id": "same"}
    body = {"model": BASE, "prompt": "a"}
    for _ in range(2):
        await bench.client.post("/v1/completions", json=body, headers=headers)
    first, second = bench.engine.requests
    assert first.request_id != second.request_id


def requests_in(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the request lines so far."""
    return [record.fields for record in caplog.records if record.name == "loramux.access"]


async def test_a_request_is_one_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.put("skill")
    scheduled = time.monotonic()
    first = EngineOutput("", (97,), scheduled_at=scheduled)
    bench.engine.script = lambda request: [first, [97, 98], [END]]
    response = await bench.complete(model="skill", prompt=["ab", "abc"], stream=True)
    (fields,) = requests_in(caplog)
    assert fields["request_id"] == response.headers["x-request-id"]
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/v1/completions", 200)
    assert (fields["tenant"], fields["served"], fields["finish_reason"]) == (LOCAL_TENANT, "skill", "stop")
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (5, 8)
    assert all(fields[name] >= 0 for name in ("seconds", "prefill_seconds", "decode_seconds"))
    await bench.client.get("/v1/models")
    assert "finish_reason" not in requests_in(caplog)[1]


async def test_failures_are_lines_too(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.engine.script = lambda request: [QueueFullError("full")]
    await bench.chat()
    bench.engine.script = lambda request: [[97], EngineDeadError("died")]
    await bench.chat(stream=True)
    await bench.chat(model="nope")
    seen = [(fields["status"], fields.get("finish_reason")) for fields in requests_in(caplog)]
    assert seen == [(503, "rejected"), (200, "error"), (404, None)]


async def test_the_tenant_is_whoever_the_application_names(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        set_tenant(scope, "acme")
        await bench.app(scope, receive, send)

    middleware = RequestMiddleware(app, metrics=bench.state.metrics, max_header_bytes=1 << 15)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://x") as client:
        await client.get("/version")
    assert [fields["tenant"] for fields in requests_in(caplog)] == [LOCAL_TENANT, "acme"]  # the inner one has its own


async def test_log_lines_tell_no_secrets_and_cannot_be_forged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await bench.chat(messages=[{"role": "user", "content": "the-prompt"}])
    await bench.client.get("/v1/x%0aFAKE%1b[2J 200?key=the-query", headers={"authorization": "Bearer the-key"})
    await bench.chat(model="the-model\nFAKE")
    await bench.client.get("/health", headers={"user-agent": "agent\tFAKE", "x-request-id": "id\tFAKE"})
    for formatter in (TextFormatter("api"), JsonFormatter("api")):
        lines = [formatter.format(r) for r in caplog.records if r.name.startswith("loramux")]
        assert len(lines) == 4
        for line in lines:
            assert line.isprintable()
            assert not any(secret in line for secret in ("the-prompt", "the-query", "the-key", "the-model", "agent"))
    texts = [TextFormatter("api").format(r) for r in caplog.records if r.name == "loramux.access"]
    assert r"/v1/x\\nFAKE\\x1b[2J" in texts[1]  # escaped once as a line, once as a quoted value


async def test_a_defect_in_an_answer_does_not_log_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def script(request: Any) -> list[Any]:
        return [TypeAdapter(int).validate_python("the-answer")]

    bench.engine.script = script
    assert (await bench.chat()).status_code == 500
    lines = [TextFormatter("api").format(record) for record in caplog.records if record.name.startswith("loramux")]
    assert any("ValidationError" in line for line in lines)
    assert not any("the-answer" in line for line in lines if "test_middleware.py" not in line)


async def test_probes_are_not_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/health", "/ready", "/metrics"):
        await bench.client.get(path)
    assert not [record for record in caplog.records if record.name == "loramux.access"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_is_a_bare_500(bench: Bench, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    bench.engine.script = lambda request: [RuntimeError("/secret/path leaked")]
    response = await bench.chat(stream=stream)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server failed to answer this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "x-request-id" in response.headers
    (record,) = [record for record in caplog.records if record.exc_info]
    line = TextFormatter("api").format(record)
    assert "/secret/path leaked" in line  # in the log, with the id
    assert response.headers["x-request-id"] in line


async def test_json_bodies_are_bounded(make) -> None:
    bench = await make(max_request_bytes=2048)
    content = [{"role": "user", "content": "x" * 4096}]
    response = await bench.chat(messages=content)
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
    assert "2048" in error["message"]
    assert not bench.engine.requests

    async def chunks():
        for _ in range(10):
            yield b" " * 1024

    response = await bench.client.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert (await bench.chat()).status_code == 200


async def test_heads_are_bounded(make) -> None:
    bench = await make(max_header_bytes=4096)
    for headers, query, words in (
        ({"x-big": "a" * 4096}, "", "4096"),
        ({}, "?q=" + "a" * 4096, "4096"),
        ([(f"x-{n}", "a") for n in range(MAX_HEADERS + 1)], "", f"more than {MAX_HEADERS}"),
    ):
        response = await bench.client.get(f"/health{query}", headers=headers)
        assert response.status_code == 431
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("headers_too_large", "invalid_request_error")
        assert words in error["message"]
    assert (await bench.client.get("/health", headers={"x-big": "a" * 3000})).status_code == 200


ORIGIN = {"origin": "https://app.example"}


async def test_browsers_of_other_origins_are_refused_by_default(bench: Bench) -> None:
    assert "access-control-allow-origin" not in (await bench.client.get("/v1/models", headers=ORIGIN)).headers
    preflight = {**ORIGIN, "access-control-request-method": "POST"}
    assert (await bench.client.options("/v1/chat/completions", headers=preflight)).status_code == 405


async def test_origins_that_are_named_may_call(make) -> None:
    bench = await make(cors_origin="https://app.example,https://b.example", api_key=["k"])
    preflight = {
        **ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization",
    }  # fmt: skip
    allowed = await bench.client.options("/v1/chat/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    answer = await bench.client.get("/v1/models", headers=ORIGIN)
    assert answer.status_code == 401  # the browser shows the error to its page, as it must
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    large = await bench.client.get("/v1/models", headers={**ORIGIN, **{f"x-{i}": "a" for i in range(MAX_HEADERS + 1)}})
    assert large.status_code == 431
    assert large.headers["access-control-allow-origin"] == "https://app.example"
    stranger = await bench.client.options("/v1/chat/completions", headers={**preflight, "origin": "https://c.example"})
    assert stranger.status_code == 400
    assert "access-control-allow-origin" not in stranger.headers
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_proxy_may_keep_its_prefix_or_take_it_off(make, prefix: str) -> None:
    bench = await make(root_path="/llm", api_key=["k"], max_request_bytes=1024)
    assert (await bench.client.get(f"{prefix}/health")).status_code == 200
    assert (await bench.client.get(f"{prefix}/v1/models")).status_code == 401
    bench.client.headers["authorization"] = "Bearer k"
    assert (await bench.client.get(f"{prefix}/v1/models")).status_code == 200
    long = {"model": BASE, "prompt": "a" * 2048}
    assert (await bench.client.post(f"{prefix}/v1/completions", json=long)).status_code == 413
    document = (await bench.client.get(f"{prefix}/openapi.json")).json()
    assert document["servers"] == [{"url": "/llm"}]
