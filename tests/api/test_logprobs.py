"""Log-probabilities on the wire: exact bytes, cut where the text is cut; several choices, each counted right."""

import threading
from typing import Any

import numpy as np
import pytest
from api.harness import END, Bench, sse

from loramux.server.api.detokenize import Detokenizer
from loramux.server.api.generation import choice_seed
from loramux.server.engine.protocol import EngineOutput, EngineRequest

pytestmark = pytest.mark.anyio


def scoring(data: bytes, *, end: bool = True) -> Any:
    """An engine that says these bytes, one by one, the i-th with log-probability -i, as often as likely as `a`."""

    def script(request: EngineRequest) -> Any:
        tokens = [*data, END] if end else [*data]
        tops = request.sampling.logprobs or 0
        about = request.sampling.prompt_logprobs
        for i, token in enumerate(tokens):
            row = np.array([-float(i), *[97.0, -0.5] * tops]).tobytes()
            prompt = None
            if not i and about is not None:
                prompt = np.array([[-float(j), *[98.0, -0.25] * about]
                                   for j in range(1, len(request.prompt_token_ids))]).tobytes()  # fmt: skip
            last = i == len(tokens) - 1
            reason = None if not last else "stop" if end else "length"
            yield EngineOutput(
                "", (token,), reason, stop_token_id=END if last and end else None,
                logprobs=None if request.sampling.logprobs is None else row, prompt_logprobs=prompt,
            )  # fmt: skip

    return script


async def test_parts_of_characters_are_exact(bench: Bench) -> None:
    bench.engine.script = scoring("a\u00e9".encode())
    choice = (await bench.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]
    assert choice["message"]["content"] == "a\u00e9"
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[97], [0xC3], [0xA9], list(b"<|stop|>")]
    assert [entry["logprob"] for entry in content] == [0, -1, -2, -3]
    assert content[0]["top_logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]
    shown = (await bench.complete(logprobs=0)).json()["choices"][0]["logprobs"]
    assert shown["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|stop|>"]
    assert shown["text_offset"] == [0, 1, 1, 2]
    assert shown["top_logprobs"][1] == {"bytes:\\xc3": -1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_both(bench: Bench, stream: bool) -> None:
    bench.engine.script = scoring(b"abcXYd")
    response = await bench.complete(logprobs=0, stop="XY", stream=stream)
    parts = [e["choices"][0] for e in sse(response.text)[:-1]] if stream else response.json()["choices"]
    assert "".join(part["text"] for part in parts) == "abc"
    found = [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]]
    assert found == ["a", "b", "c"]
    assert parts[-1]["finish_reason"] == "stop"


async def test_nothing_is_shown_that_was_not_asked_for(bench: Bench) -> None:
    assert (await bench.chat()).json()["choices"][0]["logprobs"] is None
    assert bench.engine.requests[-1].sampling.logprobs is None
    bench.engine.script = scoring(b"ab")
    assert (await bench.complete(best_of=2)).json()["choices"][0]["logprobs"] is None
    assert bench.engine.requests[-1].sampling.logprobs == 0


async def test_echo(bench: Bench) -> None:
    bench.engine.script = scoring(b"c", end=False)
    choice = (await bench.complete(prompt="ab", echo=True, logprobs=1, max_tokens=1)).json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"], "token_logprobs": [None, -1, 0],
        "top_logprobs": [None, {"b": -0.25}, {"c": 0, "a": -0.5}], "text_offset": [0, 1, 2],
    }  # fmt: skip
    assert (await bench.complete(prompt="ab", echo=True)).json()["choices"][0]["text"] == "abc"
    bench.engine.script = lambda request: [EngineOutput("", (), "length")]
    choice = (await bench.complete(prompt="ab", echo=True, max_tokens=0)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    sampling = bench.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.prompt_logprobs) == (0, 0)


async def test_a_long_prompt_is_read_off_the_event_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    feed = Detokenizer.feed

    def watched(self: Detokenizer, token: int) -> str:
        threads.append(threading.current_thread())
        return feed(self, token)

    monkeypatch.setattr(Detokenizer, "feed", watched)
    bench.engine.script = lambda request: [EngineOutput("", (), "length")]
    await bench.complete(prompt="ab" * 50, echo=True, max_tokens=0)
    assert len(threads) == 100
    assert threading.main_thread() not in threads


async def test_choices(bench: Bench) -> None:
    bench.engine.cached_tokens = 1
    body = (await bench.chat(n=3, seed=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 18
    prompt = len(bench.engine.requests[0].prompt_token_ids)
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert [request.sampling.seed for request in bench.engine.requests] == [choice_seed(5, i) for i in range(3)]
    assert len({choice_seed(5, i) for i in range(128)}) == 128
    assert choice_seed(5, 0) == 5


async def test_siblings_wait_for_the_first(bench: Bench) -> None:
    seen: list[int] = []

    def script(request: EngineRequest) -> Any:
        yield 0.02
        seen.append(len(bench.engine.requests))
        yield [104]
        yield [END]

    bench.engine.script = script
    await bench.complete(n=2)
    assert seen == [1, 2]


async def test_a_stream_of_choices(bench: Bench) -> None:
    events = sse((await bench.chat(n=2, stream=True)).text)
    roles = [e["choices"][0]["index"] for e in events[:-1] if "role" in e["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]
    texts = {0: "", 1: ""}
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == {0: "hello", 1: "hello"}


async def test_settings_reach_the_engine(bench: Bench) -> None:
    await bench.chat(
        presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.2, logit_bias={"5": -100, "7": 2.5}
    )
    sampling = bench.engine.requests[-1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -1, 1.2)
    assert sampling.logit_bias == ((5, -100), (7, 2.5))
