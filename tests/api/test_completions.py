"""`/v1/completions`: prompts in four forms, several choices, defaults."""

import asyncio

import pytest
from api.harness import BASE, END, VOCAB, Bench, saying, sse

from loramux.server.api.schemas.completions import MAX_PROMPTS
from loramux.server.engine.protocol import QueueFullError

pytestmark = pytest.mark.anyio


async def test_whole_answer(bench: Bench) -> None:
    body = (await bench.complete()).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == BASE
    assert body["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["loramux"] == {"adapters": []}


async def test_max_tokens_defaults_to_16(bench: Bench) -> None:
    bench.engine.script = saying("x" * 40, end=False)
    body = (await bench.complete()).json()
    assert body["choices"][0]["text"] == "x" * 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16
    await bench.complete(prompt="y" * 250)
    assert bench.engine.requests[-1].sampling.max_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompt_forms(bench: Bench, prompt: object, expected: list[list[int]]) -> None:
    body = (await bench.complete(prompt=prompt, return_token_ids=True)).json()
    assert [list(request.prompt_token_ids) for request in bench.engine.requests] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == expected
    assert all(choice["token_ids"] == [*b"hello", END] for choice in body["choices"])
    assert body.get("prompt_token_ids") == (expected[0] if len(expected) == 1 else None)
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 6 * len(expected)
    assert len({request.request_id for request in bench.engine.requests}) == len(expected)


@pytest.mark.parametrize("prompt", ["x" * 300, ["a", "x" * 300], [5] * 300, "x" * 20_000])
async def test_a_prompt_that_does_not_fit(bench: Bench, prompt: object) -> None:
    error = (await bench.complete(prompt=prompt)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "256" in error["message"]
    assert not bench.engine.requests


@pytest.mark.parametrize(
    "prompt",
    [None, 5, "", [], [""], [[]], [1, "a"], [[1], "a"], [True], [1.5], {"a": 1}, [[1, [2]]],
     [-1], [VOCAB], [10**30], [["a"]], ["a"] * (MAX_PROMPTS + 1)],
)  # fmt: skip
async def test_bad_prompts(bench: Bench, prompt: object) -> None:
    response = await bench.complete(prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert not bench.engine.requests


async def test_stream_of_several_prompts(bench: Bench) -> None:
    bench.engine.script = lambda request: saying(bytes(request.prompt_token_ids) * 3)(request)
    response = await bench.complete(
        prompt=["a", "b", "c"], stream=True, stream_options={"include_usage": True}, return_token_ids=True
    )
    *events, last, done = sse(response.text)
    assert done == "[DONE]"
    texts, reasons, prompts = {}, {}, {}
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            assert choice["index"] not in reasons
            reasons[choice["index"]] = choice["finish_reason"]
        if "prompt_token_ids" in choice:
            assert choice["index"] not in prompts
            prompts[choice["index"]] = choice["prompt_token_ids"]
    assert texts == {0: "aaa", 1: "bbb", 2: "ccc"}
    assert set(reasons.values()) == {"stop"}
    assert prompts == {0: [97], 1: [98], 2: [99]}
    assert last["usage"]["completion_tokens"] == 12
    assert [("loramux" in event) for event in events].count(True) == 1


async def test_stream_starts_with_text(bench: Bench) -> None:
    events = sse((await bench.complete(stream=True)).text)
    assert events[0]["choices"][0]["text"] == "h"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_one_failure_ends_all_choices(bench: Bench) -> None:
    waiting = asyncio.Event()

    def script(request):
        return [QueueFullError("full", retry_after=7)] if request.prompt_token_ids == (98,) else [waiting.wait()]

    bench.engine.script = script
    response = await bench.complete(prompt=["a", "b", "c"])
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert not bench.engine.running


async def test_special_tokens_are_hidden_unless_wanted(bench: Bench) -> None:
    bench.engine.script = lambda request: [[104], [258], [105], [END]]
    assert (await bench.complete()).json()["choices"][0]["text"] == "hi"
    shown = (await bench.complete(skip_special_tokens=False)).json()["choices"][0]["text"]
    assert shown == "h<|user|>i"
