"""`/openapi.json` says what the server does; `make test-schemathesis` holds the server to it."""

from typing import Any

import pytest
from api.harness import BASE, Bench

pytestmark = pytest.mark.anyio


async def document(bench: Bench) -> Any:
    return (await bench.client.get("/openapi.json")).json()


async def test_every_operation_fails_in_the_envelope(bench: Bench) -> None:
    found = await document(bench)
    envelope = {"$ref": "#/components/schemas/ErrorEnvelope"}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "422" not in answers, (method, path)
            for kind in ("4XX", "5XX"):
                assert answers[kind]["content"]["application/json"]["schema"] == envelope
    body = found["components"]["schemas"]["ErrorBody"]
    assert body["required"] == ["message", "type", "param", "code"]
    assert not {"HTTPValidationError", "ValidationError"} & found["components"]["schemas"].keys()


async def test_streams_and_texts(bench: Bench) -> None:
    paths = (await document(bench))["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        assert paths[path]["post"]["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    for path, method in (("/metrics", "get"), ("/v1/load_lora_adapter", "post")):
        assert paths[path][method]["responses"]["200"]["content"].keys() == {"text/plain"}


async def test_examples_are_answered(bench: Bench) -> None:
    """Under a name that this server has."""
    found = await document(bench)
    shown = 0
    for path, operations in found["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        schema = found["components"]["schemas"].get(reference.removeprefix("#/components/schemas/"), {})
        for example in schema.get("examples", ()):
            named = {**example, "model": BASE} if "model" in example else example
            answer = await bench.client.post(path, json=named)
            router_is_off = path == "/v1/route" and answer.status_code == 404
            assert answer.status_code == 200 or router_is_off, (path, answer.text)
            shown += 1
    assert shown >= 7


async def test_references_lead_somewhere(bench: Bench) -> None:
    found = await document(bench)
    seen = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            seen.update({value["$ref"]} if isinstance(value.get("$ref"), str) else ())
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(found)
    assert seen
    for reference in seen:
        assert reference.removeprefix("#/components/schemas/") in found["components"]["schemas"]


async def test_the_document_is_made_once(bench: Bench) -> None:
    assert await document(bench) == await document(bench)
    assert bench.app.openapi() is bench.app.openapi()
