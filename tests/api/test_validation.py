"""Bad bodies: 400 in the envelope, naming the field, whatever is wrong with them."""

import json
from typing import Any

import httpx
import pytest
from api.harness import BASE, Bench

pytestmark = pytest.mark.anyio

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The envelope, whose shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2), ("functions", [{}]), ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]), ("audio", {"voice": "a"}),
        ("prediction", {"type": "content"}), ("prompt_logprobs", 1),
        ("reasoning_effort", "low"),
        ("web_search_options", {}), ("use_beam_search", True), ("length_penalty", 2), ("bad_words", ["a"]),
        ("allowed_token_ids", [1]), ("truncate_prompt_tokens", 5),
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_named(bench: Bench, field: str, value: Any) -> None:
    error = error_of(await bench.chat(**{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "not supported" in error["message"]
    assert not bench.engine.requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"), ("logprobs", 6), ("logprobs", True), ("logprobs", -1), ("best_of", 21), ("n", 9), ("n", 129),
        ("best_of", 9), ("max_tokens", 0), ("echo", "yes"),
    ],
)  # fmt: skip
async def test_completions_refuse_by_name_too(bench: Bench, field: str, value: Any) -> None:
    assert error_of(await bench.complete(**{field: value}))["param"] == field
    assert not bench.engine.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 8, "prompt": ["a"] * 17}, "n"), ({"suffix": "x", "echo": True}, "suffix"),
    ],
)  # fmt: skip
async def test_choices_that_do_not_go_together(bench: Bench, body: dict[str, Any], param: str) -> None:
    assert error_of(await bench.complete(**body))["param"] == param
    assert not bench.engine.requests


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.1, "temperature"), ("temperature", -0.1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", True, "temperature"), ("top_p", 1.5, "top_p"), ("top_k", -2, "top_k"), ("top_k", 1.5, "top_k"),
        ("min_p", 2, "min_p"), ("seed", 1 << 63, "seed"), ("seed", "1", "seed"), ("max_tokens", 0, "max_tokens"),
        ("max_tokens", True, "max_tokens"), ("max_completion_tokens", -1, "max_completion_tokens"),
        ("n", 0, "n"), ("n", 9, "n"), ("n", True, "n"), ("top_logprobs", 1, "top_logprobs"),
        ("top_logprobs", 21, "top_logprobs"), ("logprobs", 1, "logprobs"),
        ("presence_penalty", 2.1, "presence_penalty"), ("frequency_penalty", -2.1, "frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"), ("repetition_penalty", 101, "repetition_penalty"),
        ("logit_bias", {"a": 1}, "logit_bias"), ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"05": 1}, "logit_bias"), ("logit_bias", {"9999": 1}, "logit_bias"),
        ("logit_bias", {"9" * 5000: 1}, "logit_bias"), ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"), ("logit_bias", [1], "logit_bias"),
        ("min_tokens", -1, "min_tokens"), ("stream", "yes", "stream"), ("model", "", "model"), ("model", 5, "model"),
        ("messages", [], "messages"), ("messages", "hi", "messages"), ("messages", [5], "messages[0]"),
        ("messages", [{"content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "wizard", "content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "tool", "content": "hi"}], "messages[0]"),
        ("messages", [{"role": "function", "name": "f", "content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "a", "colour": 1}], "messages[0].colour"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ("messages", [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"), ("stop_token_ids", ["a"], "stop_token_ids[0]"),
        ("cache_salt", "", "cache_salt"), ("metadata", "x", "metadata"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("stream_options", {"extra": True}, "stream_options.extra"),
        ("temperatur", 1, "temperatur"), ("adapters", [{}], "adapters[0].name"),
        ("adapters", [{"name": "a", "weight": "1"}], "adapters[0].weight"),
        ("adapters", [{"name": "a", "weight": 1e9}], "adapters[0].weight"),
    ],
)  # fmt: skip
async def test_the_wrong_field_is_named(bench: Bench, field: str, value: Any, param: str) -> None:
    assert error_of(await bench.chat(**{field: value}))["param"] == param
    assert not bench.engine.requests


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
async def test_content_that_is_not_text(bench: Bench, kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:9/never-fetched"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]
    error = error_of(await bench.chat(messages=messages))
    assert error["param"] == "messages[0].content[1].type"
    assert kind in error["message"]


async def test_a_misspelt_field_is_not_ignored(bench: Bench) -> None:
    error = error_of(await bench.chat(max_token=5))
    assert error["code"] == "unknown_parameter"
    assert "max_token" in error["message"]


@pytest.mark.parametrize("field", ["model", "messages"])
async def test_missing_fields(bench: Bench, field: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != field}
    error = error_of(await bench.client.post("/v1/chat/completions", json=body))
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
async def test_numbers_that_are_none(bench: Bench, number: str, field: str) -> None:
    text = json.dumps({**CHAT, field: "@"}).replace('"@"', number)
    response = await bench.client.post(
        "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
    )
    assert error_of(response)["param"] == field


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"model": "m", "seed": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800", "messages": []}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_bodies_that_are_no_request(bench: Bench, path: str, content: bytes) -> None:
    response = await bench.client.post(path, content=content, headers={"content-type": "application/json"})
    error_of(response)


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfff"])
async def test_text_that_is_not_unicode(bench: Bench, text: str) -> None:
    headers = {"content-type": "application/json"}
    chat = f'{{"model": "{BASE}", "messages": [{{"role": "user", "content": "{text}"}}]}}'
    error_of(await bench.client.post("/v1/chat/completions", content=chat, headers=headers))
    for prompt in (f'"{text}"', f'["{text}"]'):
        body = f'{{"model": "{BASE}", "prompt": {prompt}}}'
        response = await bench.client.post("/v1/completions", content=body, headers=headers)
        assert error_of(response)["param"] == "prompt"


@pytest.mark.parametrize(
    "field",
    ['"user": "\\ud800"', '"prompt_cache_key": "\\ud800"', '"safety_identifier": "\\ud800"',
     '"metadata": {"a": "\\ud800"}', '"metadata": {"\\ud800": "a"}', '"instructions": "\\ud800"'],
)  # fmt: skip
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_fields_of_responses_that_are_not_unicode(bench: Bench, field: str, stream: str) -> None:
    body = f'{{"model": "{BASE}", "input": "hi", "stream": {stream}, {field}}}'
    headers = {"content-type": "application/json"}
    error_of(await bench.client.post("/v1/responses", content=body, headers=headers))
    assert not bench.engine.requests


async def test_a_body_of_another_type(bench: Bench) -> None:
    error = error_of(await bench.client.post("/v1/chat/completions", data={"model": BASE}))
    assert "application/json" in error["message"]
    error_of(await bench.client.post("/v1/chat/completions"))


async def test_values_are_not_echoed(bench: Bench) -> None:
    secret = "s3cret-value"
    response = await bench.chat(temperature=secret, messages=[{"role": secret, "content": "x"}])
    assert secret not in response.text


async def test_unknown_urls_and_methods(bench: Bench) -> None:
    error = error_of(await bench.client.get("/v1/nothing"), 404)
    assert error["code"] == "not_found"
    assert "/v1/nothing" in error["message"]
    response = await bench.client.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
