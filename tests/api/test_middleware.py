"""Request ids, log lines, bounds on bodies, and defects."""

import logging

import pytest
from api.harness import BASE, Bench

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


async def test_log_line_tells_no_secrets(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await bench.chat(messages=[{"role": "user", "content": "the-prompt"}])
    await bench.client.get("/v1/x%0aFAKE 200?key=the-query", headers={"authorization": "Bearer the-key"})
    lines = [record.getMessage() for record in caplog.records if record.name == "loramux.access"]
    assert lines[0].startswith('"POST /v1/chat/completions" 200 ')
    assert lines[1].startswith('"GET /v1/x\\nFAKE 200" 404 ')
    for secret in ("the-prompt", "the-query", "the-key"):
        assert not [r for r in caplog.records if r.name.startswith("loramux") and secret in r.getMessage()]


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
    assert "/secret/path leaked" in caplog.text  # in the log, with the id
    assert response.headers["x-request-id"] in caplog.text


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
