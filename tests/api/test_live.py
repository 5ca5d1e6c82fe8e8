"""A real socket: clients that leave, lie, stall or flood, and the server's end."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from api.harness import BASE, END, Bench, adapter_files, parts
from support.waiting import wait_for

from loramux.server.engine.protocol import EngineRequest

BODY = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}


def endless(request: EngineRequest) -> Iterator[Any]:
    """One token every few milliseconds, until somebody stops it."""
    while True:
        yield [97]
        yield 0.005


def raw(bench: Bench, head: str, body: bytes = b"", *, read: bool = True) -> bytes:
    """Sends bytes as they are and reads until the server closes or pauses."""
    with socket.create_connection(("127.0.0.1", int(bench.url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        if not read:
            return b""
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
            if b"\r\n\r\n" in data and b"connection: close" not in data.lower():
                break
        return data


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(live: Callable[..., Bench], path: str, stream: bool) -> None:
    bench = live()
    bench.put("skill")
    bench.engine.script = endless
    body = {"model": "skill", "stream": stream, "max_tokens": 200}
    body |= {"messages": BODY["messages"]} if "chat" in path else {"prompt": ["a", "b", "c"]}
    expected = 1 if "chat" in path else 3
    connection = http.client.HTTPConnection(bench.url.removeprefix("http://"), timeout=10)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().read(10)
    wait_for(lambda: len(bench.engine.running) == expected)
    connection.close()
    wait_for(lambda: not bench.engine.running)
    assert len(bench.engine.aborted) == expected
    wait_for(lambda: bench.leases() == {})
    counted = f'loramux_requests_total{{adapter="skill",status="abort"}} {expected}.0'
    wait_for(lambda: counted in httpx.get(f"{bench.url}/metrics").text)


def test_a_client_that_leaves_before_the_first_token(live: Callable[..., Bench]) -> None:
    bench = live()
    forever = threading.Event()

    async def never() -> None:
        while not forever.is_set():
            await asyncio.sleep(0.01)

    bench.engine.script = lambda request: [never(), [97], [END]]
    connection = http.client.HTTPConnection(bench.url.removeprefix("http://"), timeout=10)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**BODY, "stream": True}), {"content-type": "application/json"}
    )
    wait_for(lambda: bool(bench.engine.running))
    connection.close()
    wait_for(lambda: not bench.engine.running)
    assert len(bench.engine.aborted) == 1


def test_many_clients_that_vanish_leave_nothing_behind(live: Callable[..., Bench]) -> None:
    bench = live()
    bench.put("skill")
    bench.engine.script = endless

    async def storm() -> None:
        async with httpx.AsyncClient(base_url=bench.url, limits=httpx.Limits(max_connections=None)) as client:

            async def one(number: int) -> None:
                body = {**BODY, "model": "skill" if number % 2 else BASE, "stream": True, "max_tokens": 200}
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    seen = 0
                    async for _ in response.aiter_bytes():
                        seen += 1
                        if seen > number % 5:
                            return

            await asyncio.gather(*(one(number) for number in range(60)))

    asyncio.run(storm())
    wait_for(lambda: not bench.engine.running)
    wait_for(lambda: bench.leases() == {})
    assert httpx.get(f"{bench.url}/ready").status_code == 200


def test_events_come_as_they_are_made(live: Callable[..., Bench]) -> None:
    bench = live()
    go = threading.Event()

    async def gate() -> None:
        while not go.is_set():
            await asyncio.sleep(0.005)

    bench.engine.script = lambda request: [list(b"a"), gate(), list(b"b"), [END]]
    with httpx.stream(
        "POST", f"{bench.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=10
    ) as response:
        assert response.headers["cache-control"] == "no-cache"
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["content"] == "a"
        go.set()
        assert list(lines)[-1] == "data: [DONE]"


def test_declared_length_is_checked_before_the_body(live: Callable[..., Bench]) -> None:
    bench = live(max_request_bytes=4096)
    head = "POST /v1/completions HTTP/1.1\nhost: x\ncontent-type: application/json\ncontent-length: 99999999999\n"
    answer = raw(bench, head + "expect: 100-continue\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer
    assert b"connection: close" in answer.lower()


def test_a_body_longer_than_declared(live: Callable[..., Bench]) -> None:
    bench = live()
    body = json.dumps({"model": BASE, "prompt": "a"}).encode()
    head = f"POST /v1/completions HTTP/1.1\nhost: x\ncontent-type: application/json\ncontent-length: {len(body)}\n"
    answer = raw(bench, head, body + b"GARBAGE that is no request\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert httpx.get(f"{bench.url}/health").status_code == 200


def test_a_body_shorter_than_declared(live: Callable[..., Bench]) -> None:
    bench = live()
    head = "POST /v1/completions HTTP/1.1\nhost: x\ncontent-type: application/json\ncontent-length: 5000\n"
    raw(bench, head, b'{"model"', read=False)
    assert httpx.get(f"{bench.url}/health").status_code == 200
    assert not bench.engine.requests


def test_a_client_that_stalls_in_its_body(live: Callable[..., Bench]) -> None:
    bench = live(body_timeout_seconds=0.2)
    for path, kind in (("/v1/completions", "application/json"), ("/v1/adapters", "multipart/form-data; boundary=x")):
        head = f"POST {path} HTTP/1.1\nhost: x\ncontent-type: {kind}\ncontent-length: 5000\n"
        answer = raw(bench, head, b"--x\r\n")
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b'"request_timeout"' in answer
    assert not any((bench.store.blob_dir.parent / "uploads").iterdir())


def test_a_chunked_body_is_counted(live: Callable[..., Bench]) -> None:
    bench = live(max_request_bytes=4096)

    def chunks():
        for _ in range(64):
            yield b" " * 1024

    response = httpx.post(
        f"{bench.url}/v1/completions", content=chunks(), headers={"content-type": "application/json"}, timeout=10
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_huge_header_is_refused(live: Callable[..., Bench]) -> None:
    bench = live()
    head = "GET /health HTTP/1.1\nhost: x\nx-big: " + "a" * (1 << 20) + "\n"
    try:
        answer = raw(bench, head)
    except OSError:
        answer = b""
    assert not answer.startswith(b"HTTP/1.1 200")
    assert httpx.get(f"{bench.url}/health").status_code == 200


def test_an_upload_that_breaks_off_leaves_nothing(live: Callable[..., Bench]) -> None:
    bench = live()
    head = (
        "POST /v1/adapters HTTP/1.1\nhost: x\ncontent-type: multipart/form-data; boundary=x\ncontent-length: 9000000\n"
    )
    body = b'--x\r\ncontent-disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
    raw(bench, head, body + b"\0" * 3_000_000, read=False)
    uploads = bench.store.blob_dir.parent / "uploads"
    wait_for(lambda: not any(uploads.iterdir()))
    assert httpx.get(f"{bench.url}/v1/adapters").json()["data"] == []


def test_an_upload_that_is_too_large_gets_its_answer(live: Callable[..., Bench]) -> None:
    bench = live(adapter_max_bytes=1 << 20)
    files = {**adapter_files(), "adapter_model.safetensors": b"x" * (8 << 20)}
    response = httpx.post(f"{bench.url}/v1/adapters", data={"name": "skill"}, files=parts(files), timeout=20)
    assert response.status_code == 413
    assert response.json()["error"]["code"]


def test_uploads_while_others_generate(live: Callable[..., Bench]) -> None:
    bench = live()
    with httpx.Client(base_url=bench.url, timeout=20) as client:
        for seed in range(5):
            response = client.post("/v1/adapters", data={"name": "skill"}, files=parts(adapter_files(seed)))
            assert response.status_code == 201
            answer = client.post("/v1/chat/completions", json={**BODY, "model": "skill"}).json()
            assert answer["loramux"]["adapters"][0]["version"] == seed + 1


def test_the_connection_survives_an_error(live: Callable[..., Bench]) -> None:
    bench = live()
    connection = http.client.HTTPConnection(bench.url.removeprefix("http://"), timeout=10)
    for body, status in (({"model": BASE}, 400), ({**BODY, "model": "nope"}, 404), (BODY, 200)):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == status
        response.read()
    connection.close()
