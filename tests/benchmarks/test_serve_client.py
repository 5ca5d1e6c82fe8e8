"""The client: HTTP and events in any pieces, and every way in which a stream can go wrong."""

import asyncio
import json
import socket
import struct
from typing import Any

import pytest

from loramux.server.bench import http_client, openai_stream

EVENTS = [b'{"text": "caf\xc3\xa9 \xf0\x9f\x98\x80"}', b"two\nlines", b"[DONE]"]
STREAM = b': hi\n\ndata: {"text": "caf\xc3\xa9 \xf0\x9f\x98\x80"}\n\nid: 3\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'


def pieces(data: bytes, at: int) -> list[bytes]:
    return [data[:at], data[at:]]


def parse_http(parts: list[bytes]) -> tuple[Any, bytes]:
    response = http_client.HttpResponse()
    return response, b"".join(response.feed(part) for part in parts)


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTRANSFER-ENCODING: chunked\r\n\r\n"
    b"5\r\nhello\r\n1;name=value\r\n \r\nB\r\nwor\r\nld 123\r\n0\r\nTrailer: x\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 17\r\n\r\nhello wor\r\nld 123"


@pytest.mark.parametrize(("raw", "status"), [(CHUNKED, 200), (SIZED, 404)])
def test_a_response_may_arrive_in_any_pieces(raw: bytes, status: int) -> None:
    body = b"hello wor\r\nld 123"
    for parts in [[raw], [bytes([b]) for b in raw], *(pieces(raw, at) for at in range(len(raw)))]:
        response, got = parse_http(parts)
        assert (response.status, got, response.done) == (status, body, True)
        response.close()
    for end in range(len(raw)):  # cut off anywhere, it is not done
        response, _ = parse_http([raw[:end]])
        assert not response.done
        with pytest.raises(http_client.ServingError, match="cut off"):
            response.close()


def test_a_body_may_end_with_the_connection() -> None:
    response, got = parse_http([b"HTTP/1.0 200 OK\r\n\r\nab", b"cd"])
    assert (got, response.done) == (b"abcd", False)
    response.close()
    assert response.done


def test_an_empty_body_is_done_at_once() -> None:
    for head in (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"):
        assert parse_http([head])[0].done


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nendless: " + b"a" * 70000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 70000,
    ],
)
def test_what_is_not_http_is_refused(raw: bytes) -> None:
    with pytest.raises(http_client.ServingError, match="not HTTP"):
        parse_http([raw])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_may_arrive_in_any_pieces(end: bytes) -> None:
    raw = STREAM.replace(b"\n", end)
    for parts in [[raw], [bytes([b]) for b in raw], *(pieces(raw, at) for at in range(len(raw)))]:
        parser = openai_stream.EventParser()
        assert [event for part in parts for event in parser.feed(part)] == EVENTS


def test_an_event_is_whole_only_with_its_empty_line() -> None:
    parser = openai_stream.EventParser()
    assert parser.feed(b"data: [DONE]\n") == []
    assert parser.feed(b"\n") == [b"[DONE]"]
    with pytest.raises(openai_stream.ServingError, match="bad stream"):
        parser.feed(b"data: " + b"a" * (openai_stream.EVENT_LIMIT + 1))


def ask(fake: Any, handler: Any, **options: Any) -> Any:
    """The outcome of one call to a server that does what `handler` says."""
    with fake(handler) as server:
        call = openai_stream.Call(0.0, "a", "/v1/completions", json.dumps({"max_tokens": 3, "prompt": [1, 2]}).encode())
        outcome = openai_stream.Outcome(call, due=0.0)
        target = http_client.find_target(server.url, api_key="secret")
        asyncio.run(openai_stream.ask(target, outcome, **{"timeout": 30.0, **options}))
        assert outcome.ended is not None
        assert [a.line for a in server.asked] == ["POST /v1/completions HTTP/1.1"]
        assert server.asked[0].headers["authorization"] == "Bearer secret"
        return outcome


def sending(*parts: bytes, head: bytes | None = None, then: Any = None) -> Any:
    """A handler that writes these parts, each as a packet of its own where the system lets it."""

    async def handler(asked: Any, writer: asyncio.StreamWriter) -> None:
        for part in parts if head is None else (head, *parts):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.002)
        if then is not None:
            await then(writer)

    return handler


def test_a_correct_stream(fake: Any, wire: Any) -> None:
    outcome = ask(fake, wire.answer)
    assert (outcome.error, outcome.completed, outcome.finish_reason) == (None, True, "length")
    assert (outcome.prompt_tokens, outcome.usage_tokens, outcome.tokens, len(outcome.times)) == (2, 3, 3, 3)
    assert outcome.sent <= outcome.times[0] <= outcome.times[-1] <= outcome.done == outcome.ended
    assert outcome.ttft == outcome.times[0] - outcome.sent


def test_packets_that_cut_characters_json_and_chunks(fake: Any, wire: Any) -> None:
    events = wire.text_event("é😀") + wire.text_event("日本", "stop") + b"data: [DONE]\n\n"
    body = b"".join(wire.chunk(events[i : i + 7]) for i in range(0, len(events), 7)) + b"0\r\n\r\n"
    raw = wire.HEAD + body
    outcome = ask(fake, sending(*(raw[i : i + 5] for i in range(0, len(raw), 5))))
    assert (outcome.error, outcome.tokens, outcome.finish_reason) == (None, 2, "stop")


def test_chat_chunks_and_token_ids(fake: Any, wire: Any) -> None:
    def event(delta: dict[str, Any], **rest: Any) -> bytes:
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None, **rest}]}
        return wire.chunk(b"data:" + json.dumps(chunk).encode() + b"\r\n\r\n")

    parts = [
        event({"role": "assistant", "content": ""}),
        event({"content": "a"}, token_ids=[5, 6]),
        event({"content": ""}, token_ids=[7]),
        event({"reasoning_content": "hm"}),
        event({}, finish_reason="stop"),
        wire.chunk(b"data: [DONE]\r\n\r\n") + b"0\r\n\r\n",
    ]
    outcome = ask(fake, sending(*parts, head=wire.HEAD))
    assert (outcome.error, len(outcome.times), outcome.token_ids, outcome.tokens) == (None, 3, 3, 3)


def test_an_answer_without_text_has_its_end_as_first_token(fake: Any, wire: Any) -> None:
    body = wire.chunk(wire.text_event("", "stop")) + wire.chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    outcome = ask(fake, sending(body, head=wire.HEAD))
    assert (outcome.completed, outcome.times, outcome.ttft) == (True, [], outcome.seconds)


def test_without_done_a_stream_is_cut_off_unless_it_may(fake: Any, wire: Any) -> None:
    parts = [wire.chunk(wire.text_event("a")), wire.chunk(wire.text_event("b", "stop")), b"0\r\n\r\n"]
    assert ask(fake, sending(*parts, head=wire.HEAD)).error == "cut off: no [DONE]"
    outcome = ask(fake, sending(*parts, head=wire.HEAD), need_done=False)
    assert (outcome.error, outcome.tokens) == (None, 2)


def test_without_finish_reason_a_stream_is_cut_off(fake: Any, wire: Any) -> None:
    parts = [wire.chunk(wire.text_event("a")), wire.chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    for need_done in (True, False):
        outcome = ask(fake, sending(*parts, head=wire.HEAD), need_done=need_done)
        assert outcome.error == "cut off: no finish_reason"


def test_a_connection_that_closes_early(fake: Any, wire: Any) -> None:
    parts = [wire.chunk(wire.text_event("a")), wire.chunk(wire.text_event("b", "stop"))]
    for need_done in (True, False):
        outcome = ask(fake, sending(*parts, head=wire.HEAD), need_done=need_done)
        assert outcome.error == "cut off: connection closed"
    assert ask(fake, sending()).error == "cut off: connection closed"


def test_what_happens_after_done_does_not_matter(fake: Any, wire: Any) -> None:
    parts = [wire.chunk(wire.text_event("a", "stop")), wire.chunk(b"data: [DONE]\n\n")]
    outcome = ask(fake, sending(*parts, head=wire.HEAD))
    assert (outcome.error, outcome.ended) == (None, outcome.done)


async def reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with RST."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def test_a_reset_is_a_failure(fake: Any, wire: Any) -> None:
    outcome = ask(fake, sending(wire.chunk(wire.text_event("a")), head=wire.HEAD, then=reset))
    assert outcome.error == "connection: ConnectionResetError"
    assert not outcome.completed


@pytest.mark.parametrize(
    ("event", "kind", "detail"),
    [
        (b'{"error": {"message": "engine died", "code": 500}}', "error event", "engine died"),
        (b'{"error": "overloaded", "error_type": "x"}', "error event", "overloaded"),
        (b'{"object": "error", "message": "no room"}', "error event", "no room"),
        (b"{truncated", "bad event", "{truncated"),
        (b"[1, 2]", "bad event", "[1, 2]"),
        (b'{"choices": [7]}', "bad event", "choices"),
        (b'{"text": "\xff"}', "bad event", "text"),
    ],
)
def test_errors_inside_a_stream(fake: Any, wire: Any, event: bytes, kind: str, detail: str) -> None:
    parts = [wire.chunk(wire.text_event("a")), wire.chunk(b"data: " + event + b"\n\n"), b"0\r\n\r\n"]
    outcome = ask(fake, sending(*parts, head=wire.HEAD))
    assert (outcome.error, outcome.completed) == (kind, False)
    assert detail in outcome.detail


@pytest.mark.parametrize(
    ("status", "body", "detail"),
    [
        (404, b'{"error": {"message": "no model a"}}', "no model a"),
        (422, b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (429, b"slow down", "slow down"),
        (503, b"", ""),
        (307, b"", ""),
    ],
)
def test_statuses(fake: Any, status: int, body: bytes, detail: str) -> None:
    raw = f"HTTP/1.1 {status} Words\r\nLocation: /x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    outcome = ask(fake, sending(raw))
    assert (outcome.error, outcome.detail) == (f"HTTP {status}", detail)


def test_an_answer_in_one_piece_is_not_a_stream(fake: Any) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    assert ask(fake, sending(raw)).error == "not a stream"


def test_a_silent_server_times_out(fake: Any, wire: Any) -> None:
    async def silent(asked: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.HEAD)
        await asyncio.sleep(60)

    assert ask(fake, silent, timeout=0.2).error == "timeout"


def test_a_server_that_is_gone(fake: Any, wire: Any) -> None:
    with fake(wire.answer) as server:
        target = http_client.find_target(server.url)
    outcome = openai_stream.Outcome(openai_stream.Call(0.0, "a", "/v1/completions", b"{}"), due=0.0)
    asyncio.run(openai_stream.ask(target, outcome, timeout=30.0))
    assert outcome.error == "connection: ConnectionRefusedError"
    with pytest.raises(ValueError, match="nothing listens"):
        http_client.find_target(server.url)
