"""`/v1/responses`: whole, streamed, refused, failed; by hand and with the official client."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from api.harness import ASSISTANT, BASE, BEGIN, END, SYSTEM, USER, Bench, saying

from loramux.server.engine.protocol import EngineDeadError, QueueFullError

ORDER = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    *["response.output_text.delta"] * 5, "response.output_text.done", "response.content_part.done",
    "response.output_item.done", "response.completed",
]  # fmt: skip


async def ask(bench: Bench, **body: Any) -> httpx.Response:
    return await bench.client.post("/v1/responses", json={"model": BASE, "input": "hi", **body})


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; the name of each is its type."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        item = json.loads(data.removeprefix("data: "))
        assert name == f"event: {item['type']}"
        found.append(item)
    return found


@pytest.mark.anyio
async def test_whole(bench: Bench) -> None:
    bench.engine.cached_tokens = 2
    response = await ask(bench, metadata={"a": "b"}, temperature=0.5, top_p=0.25, user="u", store=False)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", BASE)
    (item,) = body["output"]
    assert item["id"].startswith("msg_")
    assert item == {
        "id": item["id"], "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert body["usage"] == {
        "input_tokens": 6, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12,
    }  # fmt: skip
    assert (body["store"], body["previous_response_id"], body["background"]) == (False, None, False)
    assert (body["metadata"], body["temperature"], body["top_p"]) == ({"a": "b"}, 0.5, 0.25)
    assert (body["error"], body["incomplete_details"], body["user"]) == (None, None, "u")
    assert body["text"] == {"format": {"type": "text"}}
    assert body["loramux"] == {"adapters": []}
    assert list(bench.engine.requests[0].prompt_token_ids) == [BEGIN, USER, *b"hi", END, ASSISTANT]


@pytest.mark.anyio
async def test_cut_short(bench: Bench) -> None:
    bench.engine.script = saying("hello", end=False)
    body = (await ask(bench, max_output_tokens=2)).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == "he"
    last = events((await ask(bench, max_output_tokens=2, stream=True)).text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


@pytest.mark.anyio
async def test_stream(bench: Bench) -> None:
    response = await ask(bench, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [event["type"] for event in found] == ORDER
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert found[0]["response"]["usage"] is None
    item = found[2]["item"]["id"]
    assert {event["item_id"] for event in found if "item_id" in event} == {item}
    assert "".join(event["delta"] for event in found if "delta" in event) == "hello"
    last = found[-1]["response"]
    assert last["output"] == [found[-2]["item"]]
    assert last["output"][0]["content"][0]["text"] == "hello"
    assert last["id"] == found[0]["response"]["id"]
    assert last["usage"]["output_tokens"] == 6


@pytest.mark.anyio
async def test_a_conversation(bench: Bench) -> None:
    first = (await ask(bench)).json()
    turns = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        *first["output"],
        {"role": "user", "content": "b"},
    ]
    assert (await ask(bench, input=turns, instructions="i")).status_code == 200
    assert list(bench.engine.requests[-1].prompt_token_ids) == [
        BEGIN, SYSTEM, *b"i", END, SYSTEM, *b"d", END, USER, *b"a", END, ASSISTANT, *b"hello", END, USER, *b"b", END,
        ASSISTANT,
    ]  # fmt: skip


@pytest.mark.anyio
async def test_sampling_and_adapters(bench: Bench) -> None:
    version = bench.put("skill")
    response = await ask(bench, model="skill", temperature=0, top_k=3, seed=4, cache_salt="s", max_output_tokens=9)
    assert response.headers["x-loramux-adapters"] == "skill@1;w=1"
    assert response.json()["loramux"]["adapters"] == [{"name": "skill", "version": 1, "weight": 1.0}]
    (request,) = bench.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0, 3, 4, 9)
    assert (request.salt, request.adapters[0].digest) == ("s", version.digest)
    assert not bench.leases()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"), ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"background": True}, "background"), ({"conversation": "c"}, "conversation"), ({"prompt": {}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["reasoning.encrypted_content"]}, "include"), ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"), ({"top_logprobs": 1}, "top_logprobs"),
        ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:9"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         "input[0].content[0].type"),
        ({"temperature": 3}, "temperature"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"), ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"colour": 1}, "colour"), ({"model": "nobody"}, "model"),
    ],
)  # fmt: skip
async def test_refusals(bench: Bench, body: dict[str, Any], param: str) -> None:
    response = await ask(bench, **body)
    assert response.status_code == (404 if param == "model" else 400)
    assert str(response.json()["error"]["param"]).startswith(param)
    assert not bench.engine.requests


@pytest.mark.anyio
async def test_too_long(bench: Bench) -> None:
    for body, param in (({"input": "x" * 300}, "input"), ({"max_output_tokens": 300}, "max_output_tokens")):
        error = (await ask(bench, **body)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.anyio
async def test_nulls_and_neutral_values(bench: Bench) -> None:
    fields = (
        "instructions max_output_tokens temperature top_p stream stream_options text metadata user service_tier "
        "include safety_identifier prompt_cache_key parallel_tool_calls truncation tools tool_choice reasoning store "
        "prompt previous_response_id conversation background top_logprobs max_tool_calls"
    ).split()
    response = await ask(bench, **dict.fromkeys(fields))
    assert response.status_code == 200, response.text
    response = await ask(
        bench, store=False, background=False, truncation="disabled", tools=[], tool_choice="auto", include=[],
        text={"format": {"type": "text"}}, parallel_tool_calls=False, service_tier="auto",
    )  # fmt: skip
    assert response.status_code == 200, response.text
    assert response.json()["parallel_tool_calls"] is False


@pytest.mark.anyio
async def test_failures(bench: Bench) -> None:
    bench.engine.script = lambda request: [QueueFullError("full")]
    for stream in (False, True):
        response = await ask(bench, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    bench.engine.script = lambda request: [[97, 98], EngineDeadError("secret /path")]
    assert (await ask(bench)).status_code == 503
    response = await ask(bench, stream=True)
    found = events(response.text)
    assert found[-1]["type"] == "response.failed"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    failed = found[-1]["response"]
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "server_error"
    assert failed["output"][0]["status"] == "incomplete"
    assert "secret" not in response.text
    assert not bench.engine.running


@pytest.fixture
def client(live: Callable[..., Bench]) -> openai.OpenAI:
    """A client that does not retry."""
    return openai.OpenAI(base_url=f"{live().url}/v1", api_key="any", max_retries=0, timeout=20)


def test_the_official_client(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=BASE, input="hi", instructions="be kind", metadata={"a": "b"})
    assert (answer.output_text, answer.status) == ("hello", "completed")
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 0
    again = client.responses.create(model=BASE, input=[*answer.output, {"role": "user", "content": "more"}])
    assert again.output_text == "hello"
    kinds = [event.type for event in client.responses.create(model=BASE, input="hi", stream=True)]
    assert kinds == ORDER
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input="hi", store=True)
    assert (caught.value.param, caught.value.code) == ("store", "unsupported_parameter")
    assert "input" in caught.value.message


def test_the_official_stream_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=BASE, input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == "hello"
    assert final.output_text == "hello"
