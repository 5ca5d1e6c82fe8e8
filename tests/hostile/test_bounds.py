"""Whatever a request repeats, it is bounded: refused by name, before anything is generated."""

import json
from typing import Any

import pytest
from api.harness import BASE, Bench

from loramux.server.api import bodies

pytestmark = pytest.mark.anyio

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": BASE, "prompt": "ab"}
HUGE = 10**18
TURN = {"role": "user", "content": "hi"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 129}, "n"),
        ("/v1/chat/completions", {**CHAT, "n": HUGE}, "n"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": HUGE}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": HUGE}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "min_tokens": HUGE}, "min_tokens"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": HUGE, "logprobs": True}, "top_logprobs"),
        ("/v1/chat/completions", {**CHAT, "stop": ["a"] * 17}, "stop"),
        ("/v1/chat/completions", {**CHAT, "stop": ["a" * 513]}, "stop"),
        ("/v1/chat/completions", {**CHAT, "stop_token_ids": [5] * 129}, "stop_token_ids"),
        ("/v1/chat/completions", {**CHAT, "messages": [TURN] * 2049}, "messages"),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {str(i): "x" for i in range(200_000)}}, "logit_bias"),
        ("/v1/chat/completions", {**CHAT, "metadata": {str(i): "x" for i in range(200_000)}}, "metadata"),
        ("/v1/chat/completions", {**CHAT, "documents": [{"a": "b"}] * 1025}, "documents"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {f"k{i}": i for i in range(100_000)}},
         "chat_template_kwargs"),
        ("/v1/chat/completions", {**CHAT, "adapters": [{"name": "a"}] * 65}, "adapters"),
        ("/v1/chat/completions", {**CHAT, "model": "auto", "router": {"candidates": ["a"] * 10_001}},
         "router.candidates"),
        ("/v1/chat/completions", {**CHAT, "model": "x" * 100_000}, "model"),
        ("/v1/chat/completions", {**CHAT, "cache_salt": "x" * 257}, "cache_salt"),
        ("/v1/completions", {**TEXT, "best_of": 21}, "best_of"),
        ("/v1/completions", {**TEXT, "n": 8, "prompt": ["a"] * 128}, "n"),
        ("/v1/completions", {**TEXT, "prompt": ["a"] * 129}, "prompt"),
        ("/v1/completions", {**TEXT, "prompt": [5] * 100_000}, "prompt"),
        ("/v1/completions", {**TEXT, "prompt": "a" * 500_000}, "prompt"),
        ("/v1/completions", {**TEXT, "logprobs": 6}, "logprobs"),
        ("/v1/embeddings", {"model": BASE, "input": ["a"] * 2049}, "input"),
        ("/v1/responses", {"model": BASE, "input": "hi", "max_output_tokens": HUGE}, "max_output_tokens"),
        ("/v1/route", {"input": ["a"] * 10_000}, "input"),
    ],
)  # fmt: skip
async def test_what_is_too_much_is_refused_by_name(bench: Bench, path: str, body: dict[str, Any], param: str) -> None:
    answer = await bench.client.post(path, json=body)
    assert answer.status_code == 400, answer.text[:300]
    assert (answer.json()["error"]["param"] or "").split("[")[0] == param
    assert len(answer.text) < 1000
    assert not bench.engine.requests


WRONG_PARTS = [{"role": "user", "content": [{"type": "text"}] * 1000}] * 60


async def test_one_mistake_is_enough(bench: Bench) -> None:
    """Sixty thousand mistakes are one error: pydantic would make sixty thousand, in a call that nothing interrupts."""
    from pydantic import ValidationError

    from loramux.server.api.schemas.chat import ChatRequest
    from loramux.server.api.schemas.tokenize import DetokenizeRequest

    answer = await bench.chat(messages=WRONG_PARTS)
    assert answer.json()["error"]["param"] == "messages[0].content[0].text"
    for model, body in (
        (ChatRequest, {**CHAT, "messages": WRONG_PARTS}),
        (DetokenizeRequest, {"tokens": ["a"] * 9999}),
    ):
        with pytest.raises(ValidationError) as refusal:
            model.model_validate(body)
        assert refusal.value.error_count() < 10


@pytest.mark.parametrize(
    "value",
    [
        b"[" + b"1," * 400_000 + b"-2.5e3]", b'{"a": [' + b'{"b": "c"},' * 60_000 + b"null]}",
        b"{" + b",".join(b'"k%d": true' % i for i in range(60_000)) + b"}", b"[" + b"1" * 401 + b"]",
        json.dumps(["é\ud83d\ude00\\\"", "\\u00e9", 1e-7, -0.0, [], {}, None] * 20_000).encode(),
        json.dumps(["a", 1]).encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_read_patiently_is_what_json_reads(value: bytes) -> None:
    """Bodies that would hold the interpreter are read by the scanner in Python, to the same values."""
    assert not bodies.is_quick(value) or not value.startswith(b"[1")
    assert bodies.read_json(value) == json.loads(value)


@pytest.mark.parametrize(
    "value",
    [b"[" + b"1," * 400_000, b"[" + b"1," * 400_000 + b"x]", b"[" * 3_000_000, b"[" + b"[]," * 200_000 + b"[]]"],
)
async def test_what_cannot_be_read_is_refused(bench: Bench, value: bytes) -> None:
    answer = await bench.client.post("/v1/chat/completions", content=value, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("size", [100, 40_000])
@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({}, None, None), ({"temperature": 3}, "invalid_value", "temperature"), ({"x": 1}, "unknown_parameter", "x"),
        ({"messages": [{"role": "user"}, 5]}, "invalid_value", "messages[1]"),
        ({"messages": ...}, "missing_required_parameter", "messages"),
    ],
)  # fmt: skip
async def test_large_bodies_are_answered_as_small_ones(
    bench: Bench, size: int, change: dict[str, Any], code: str | None, param: str | None
) -> None:
    body = {**CHAT, "user": "u" * size, **change}
    answer = await bench.client.post(
        "/v1/chat/completions", json={key: value for key, value in body.items() if value is not ...}
    )
    error = answer.json().get("error", {})
    assert (error.get("code"), error.get("param")) == (code, param), answer.text[:300]


async def test_json_is_what_says_so(bench: Bench) -> None:
    data = json.dumps({**CHAT, "user": "u" * 40_000}).encode()
    for kind, status in (
        ("application/json; charset=utf-8", 200),
        ("application/vnd.x+json", 200),
        ("text/plain", 400),
    ):
        answer = await bench.client.post("/v1/chat/completions", content=data, headers={"content-type": kind})
        assert answer.status_code == status, kind


TURNS = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("input", "more"),
    [([{"type": "reasoning", "summary": []}], {}), (TURNS * 2048, {"instructions": "be brief"})],
)
async def test_a_response_needs_some_turns_and_not_too_many(bench: Bench, input: Any, more: dict[str, Any]) -> None:
    """What only becomes wrong as a conversation is the client's mistake, too."""
    answer = await bench.client.post("/v1/responses", json={"model": BASE, "input": input, **more})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "input"
