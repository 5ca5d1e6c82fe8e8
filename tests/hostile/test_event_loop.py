"""Long work is done outside the event loop's thread, in calls that let it run; `test_stalls` measures the outcome."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from api.harness import BASE, Bench, saying, sse

from loramux.server.api import answer, app, bodies, logprobs, rendering, serve, wire
from loramux.server.api.logprobs import ScoredTokens, TokenScore, chat_logprobs
from loramux.server.api.schemas.logprobs import ChatLogprobs
from loramux.server.api.schemas.tokenize import Tokens
from loramux.server.api.token_bytes import TokenBytes
from loramux.server.engine.protocol import EngineOutput, EngineRequest

pytestmark = pytest.mark.anyio

LONG = "word " * 8000


class Threads:
    """Who called what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.seen: dict[str, set[str]] = {}

    def watch(self, owner: Any, name: str) -> None:
        """Notes the thread of every call."""
        plain = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.seen.setdefault(name, set()).add(threading.current_thread().name)
            return plain(*args, **kwargs)

        self._patch.setattr(owner, name, noted)

    def check(self, *names: str) -> None:
        """All were called, and only by threads for such work."""
        for name in names:
            assert self.seen.get(name), f"{name} was not called"
            assert all(thread.startswith(("work", "store")) for thread in self.seen[name]), (name, self.seen[name])


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


async def test_large_bodies_are_read_and_checked_elsewhere(bench: Bench, threads: Threads) -> None:
    threads.watch(bodies, "read_body")
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/responses", {"input": LONG}), ("/v1/embeddings", {"input": LONG}), ("/tokenize", {"prompt": LONG}),
        ("/v1/route", {"input": LONG}), ("/detokenize", {"tokens": [5] * 20_000}),
    ):  # fmt: skip
        threads.seen.clear()
        model = {} if path == "/v1/route" else {"model": BASE}
        answer = await bench.client.post(path, json={**model, **body})
        assert answer.status_code in (200, 400, 503), answer.text
        threads.check("read_body")


async def test_prompts_are_rendered_and_encoded_elsewhere(bench: Bench, threads: Threads) -> None:
    threads.watch(rendering.Renderer, "encode")
    threads.watch(rendering.Renderer, "render")
    await bench.chat(messages=[{"role": "user", "content": LONG}])
    await bench.complete(prompt=LONG)
    threads.check("encode", "render")


async def test_tokens_and_lists_are_written_elsewhere(bench: Bench, threads: Threads) -> None:
    threads.watch(wire, "joined")
    threads.watch(rendering.Renderer, "token_strings")
    threads.watch(rendering.Renderer, "decode")
    asked = await bench.client.post("/tokenize", json={"prompt": LONG, "return_token_strs": True})
    assert asked.json()["tokens"] == list(LONG.encode())
    assert len(asked.json()["token_strs"]) == len(LONG)
    back = await bench.client.post("/detokenize", json={"tokens": list(LONG.encode())})
    assert back.json()["prompt"] == LONG
    threads.check("joined", "token_strings", "decode")


def scored(count: int, top: int) -> Callable[[EngineRequest], list[Any]]:
    """An engine that says `count` tokens at once, each with the `top` likeliest."""
    import numpy as np

    row = [-0.5, *(number for place in range(top) for number in (97.0 + place, -1.0 - place))]
    raw = np.array([row] * count).tobytes()

    def script(request: EngineRequest) -> list[Any]:
        return [EngineOutput("", tuple([97] * count), "length", logprobs=raw)]

    return script


async def test_long_answers_are_written_elsewhere(bench: Bench, threads: Threads) -> None:
    threads.watch(answer.Answer, "_write_whole")
    bench.engine.script = scored(200, 20)
    whole = (await bench.chat(logprobs=True, top_logprobs=20, max_tokens=200)).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 200
    assert all(len(item["top_logprobs"]) == 20 for item in content)
    text = (await bench.complete(logprobs=5, max_tokens=200)).json()
    assert len(text["choices"][0]["logprobs"]["tokens"]) == 200
    threads.check("_write_whole")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_event_has_few_scores(bench: Bench, path: str) -> None:
    """What comes at once in one event of the engine's leaves in many: their scores together are the same."""
    bench.engine.script = scored(200, 5)
    ask = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 5}
    if "chat" not in path:
        ask = {"prompt": "ab", "logprobs": 5}
    body = {"model": BASE, "max_tokens": 200, **ask}
    whole = (await bench.client.post(path, json=body)).json()["choices"][0]
    streamed = await bench.client.post(path, json={**body, "stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    choices = [event["choices"][0] for event in sse(streamed.text)[:-1]]
    scores = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    name = "content" if "chat" in path else "tokens"
    assert max(len(item[name]) for item in scores) <= logprobs.PART_SCORES
    for key, value in whole["logprobs"].items():
        if isinstance(value, list):
            assert [one for item in scores for one in item[key]] == value
    texts = [choice["delta"].get("content", "") if "chat" in path else choice["text"] for choice in choices]
    assert "".join(texts) == (whole["message"]["content"] if "chat" in path else whole["text"])
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]


async def test_the_document_is_made_elsewhere(bench: Bench, threads: Threads) -> None:
    threads.watch(bench.app, "openapi")
    assert (await bench.client.get("/openapi.json")).status_code == 200
    threads.check("openapi")


async def test_large_answers_are_sent_in_parts() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    for data in (b"", b"{}", b"x" * wire.PART_BYTES, b"y" * (3 * wire.PART_BYTES + 1)):
        sent.clear()
        await wire.JSONAnswer(data)({}, receive, send)
        start, *parts = sent
        assert dict(start["headers"])[b"content-length"] == str(len(data)).encode()
        assert b"".join(part["body"] for part in parts) == data
        assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
        assert all(len(part["body"]) <= wire.PART_BYTES for part in parts)


async def test_few_threads_compute_and_hand_over_soon(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread that computes keeps the loop waiting for a turn, after each of its sends."""
    running = await asyncio.gather(*(asyncio.to_thread(threading.current_thread) for _ in range(100)))
    assert len(set(running)) <= app.WORK_THREADS <= 4
    assert serve.SWITCH_SECONDS <= 0.001


def many(words: TokenBytes, count: int) -> ChatLogprobs:
    top = np.array([(97 + i, -1.0 - i) for i in range(20)]).tobytes()
    return chat_logprobs([TokenScore(97, -0.5, top) for _ in range(count)], words)


async def test_pieces_are_the_whole(bench: Bench) -> None:
    words = bench.state.renderer.token_bytes
    small, large = many(words, 3), many(words, 300)
    for model in (
        small, Tokens(count=3, max_model_len=None, tokens=list(range(9000)), token_strs=['"é\n'] * 9000),
        Tokens(count=0, max_model_len=5, tokens=[], token_strs=None),
    ):  # fmt: skip
        pieces = list(wire.json_pieces(model))
        assert json.loads("".join(pieces)) == json.loads(model.model_dump_json(exclude_unset=True))
        assert max(map(len, pieces)) < 100_000
    pieces = list(wire.json_pieces(large))
    one = json.loads(small.model_dump_json())["content"][0]
    assert json.loads("".join(pieces)) == {"content": [one] * 300, "refusal": None}
    assert max(map(len, pieces)) < 100_000


async def test_scored_tokens_are_made_one_by_one(bench: Bench) -> None:
    """A long answer's tokens do not exist all at once: the collector's pauses grow with what is alive."""
    content = many(bench.state.renderer.token_bytes, 2000).content
    assert isinstance(content, Sequence)
    assert isinstance(content, ScoredTokens)
    gc.collect()
    before, most = len(gc.get_objects()), 0
    for number, _ in enumerate(wire.json_pieces(content)):
        if number % 500 == 0:
            gc.collect()
            most = max(most, len(gc.get_objects()) - before)
    assert most < 500


async def test_a_small_answer_needs_no_thread(bench: Bench, threads: Threads) -> None:
    threads.watch(bodies, "read_body")
    threads.watch(answer.Answer, "_write_whole")
    bench.engine.script = saying("hello")
    assert (await bench.chat()).status_code == 200
    assert threads.seen == {}
