"""How an answer ends: stop strings, stop ids, and what is billed."""

import asyncio

import pytest
from api.harness import END, Bench, saying, sse

pytestmark = pytest.mark.anyio


async def test_stop_string_is_neither_shown_nor_overshot(bench: Bench) -> None:
    bench.engine.script = saying("one\ntwo three", per_step=6, end=False)
    body = (await bench.chat(stop=["\n"], return_token_ids=True)).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "one"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n")
    assert choice["token_ids"] == list(b"one\n")
    assert body["usage"]["completion_tokens"] == 4
    assert bench.engine.aborted == [bench.engine.requests[0].request_id]


async def test_stop_string_across_tokens_never_reaches_the_stream(bench: Bench) -> None:
    bench.engine.script = saying("abSTxSTOPzz")
    events = sse((await bench.chat(stop="STOP", stream=True)).text)
    texts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(texts) == "abSTx"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert bench.engine.aborted


async def test_stop_string_included(bench: Bench) -> None:
    bench.engine.script = saying("a.b")
    body = (await bench.complete(stop=".", include_stop_str_in_output=True)).json()
    assert body["choices"][0]["text"] == "a."


async def test_held_back_text_comes_with_the_end(bench: Bench) -> None:
    bench.engine.script = saying("abST")
    assert (await bench.complete(stop="STOP")).json()["choices"][0]["text"] == "abST"


async def test_stop_string_in_utf8(bench: Bench) -> None:
    bench.engine.script = saying("naïve€uro")
    assert (await bench.complete(stop="€")).json()["choices"][0]["text"] == "naïve"


async def test_min_tokens_disarms_stop_strings(bench: Bench) -> None:
    bench.engine.script = saying("a.b.c")
    assert (await bench.complete(stop=".", min_tokens=2)).json()["choices"][0]["text"] == "a.b"


async def test_stop_token_ids(bench: Bench) -> None:
    bench.engine.script = saying("abc")
    body = (await bench.complete(stop_token_ids=[98], return_token_ids=True)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", 98)
    assert choice["token_ids"] == [97, 98]
    assert body["usage"]["completion_tokens"] == 2
    assert (await bench.complete(stop_token_ids=[264])).json()["error"]["param"] == "stop_token_ids"


async def test_ignore_eos(bench: Bench) -> None:
    bench.engine.script = lambda request: [[97], [END], [98], [END], [99]]
    body = (await bench.complete(ignore_eos=True, max_tokens=5)).json()
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["x"] * 17, "x" * 1000, [1], 5, {"a": 1}])
async def test_bad_stops(bench: Bench, stop: object) -> None:
    response = await bench.chat(stop=stop)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("stop")


async def test_an_answer_in_one_step(bench: Bench) -> None:
    bench.engine.script = saying("hello", per_step=100)
    assert (await bench.chat()).json()["choices"][0]["message"]["content"] == "hello"
    await asyncio.sleep(0)
    assert not bench.engine.running
