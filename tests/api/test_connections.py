"""Raw sockets against the bounds on connections and request heads."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from api.harness import BASE, END, Bench
from openai import OpenAI

from loramux.server.api.connections import PROBE_CONNECTIONS

GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
SHORT = 0.3
HANDSHAKE = 2.0  # long enough for a real one on a busy machine
LONG = 20.0  # only ends a test that has failed


class Raw:
    """A connection that sends bytes as they are."""

    def __init__(self, bench: Bench) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(bench.url.rsplit(":", 1)[1])), timeout=LONG)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one response."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += self._more()
        return int(first.split()[1]), headers, body

    def _more(self) -> bytes:
        chunk = self.socket.recv(65536)
        assert chunk, "the server closed the connection"
        return chunk

    def is_closed(self) -> bool:
        """Whether the server has closed, or closes now; waits for it."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, Any]:
    """Status and code of an envelope with all four fields."""
    error = json.loads(answer[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer[0], error["code"]


def test_a_head_that_comes_slowly_ends_the_connection(live: Callable[..., Bench]) -> None:
    bench = live(header_timeout_seconds=SHORT)
    with Raw(bench) as client:
        ended = threading.Event()

        def drip() -> None:
            try:
                client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n")
                while not ended.wait(0.02):
                    client.send(b"x-drip: 1\r\n")
            except OSError:
                pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert error_of(client.answer()) == (408, "request_timeout")
        finally:
            ended.set()
            dripping.join()
    assert httpx.get(f"{bench.url}/health").status_code == 200


def test_a_connection_that_asks_nothing_is_closed(live: Callable[..., Bench]) -> None:
    with Raw(live(header_timeout_seconds=SHORT)) as client:
        assert client.is_closed()


def test_refusals_are_counted(live: Callable[..., Bench]) -> None:
    bench = live(max_connections=1)
    for _ in range(2):
        with Raw(bench) as client:
            client.send(b"NONSENSE\r\n\r\n")
            assert client.answer()[0] == 400
            assert client.is_closed()
    with Raw(bench) as first, Raw(bench) as second:
        first.send(GET)
        assert first.answer()[0] == 200
        second.send(GET)
        assert second.answer()[0] == 503
    text = bench.state.metrics.render("")[0].decode()
    assert 'loramux_http_refusals_total{status="400"} 2.0' in text
    assert 'loramux_http_refusals_total{status="503"} 1.0' in text


def test_many_slow_heads_do_not_keep_others_out(live: Callable[..., Bench]) -> None:
    bench = live(header_timeout_seconds=SHORT, max_connections=20)
    with ExitStack() as stack:
        slow = [stack.enter_context(Raw(bench)) for _ in range(20)]
        for client in slow:
            client.send(b"GET / HTTP/1.1\r\n")
        assert error_of(slow[0].answer()) == (408, "request_timeout")
        assert all(client.answer()[0] == 408 for client in slow[1:])
        assert httpx.get(f"{bench.url}/v1/models").status_code == 200


def test_a_slow_body_or_answer_is_not_a_slow_head(live: Callable[..., Bench]) -> None:
    bench = live(header_timeout_seconds=SHORT)
    body = json.dumps({"model": BASE, "prompt": "ab"}).encode()
    bench.engine.script = lambda request: [[97], 2 * SHORT, [END]]
    with Raw(bench) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        client.send(b"content-length: %d\r\n\r\n" % len(body))
        for byte in (body[:5], body[5:]):
            time.sleep(SHORT)
            client.send(byte)
        assert client.answer()[0] == 200
        time.sleep(2 * SHORT)  # idle between two requests: the keep-alive timer's business
        client.send(GET)
        assert client.answer()[0] == 200


def test_the_second_head_of_a_connection_is_bounded_too(live: Callable[..., Bench]) -> None:
    with Raw(live(header_timeout_seconds=SHORT)) as client:
        client.send(GET)
        assert client.answer()[0] == 200
        client.send(GET[:-2])
        assert error_of(client.answer()) == (408, "request_timeout")
        assert client.is_closed()


def test_a_head_behind_another_request_is_bounded(live: Callable[..., Bench]) -> None:
    with Raw(live(header_timeout_seconds=SHORT)) as client:
        client.send(GET + GET[:20])
        assert client.answer()[0] == 200
        assert error_of(client.answer()) == (408, "request_timeout")


def test_an_idle_connection_is_closed(live: Callable[..., Bench]) -> None:
    with Raw(live(keep_alive_seconds=SHORT)) as client:
        client.send(GET)
        assert client.answer()[0] == 200
        assert client.is_closed()


@pytest.mark.parametrize("whole", [False, True])
def test_a_large_head_is_refused_as_such(live: Callable[..., Bench], whole: bool) -> None:
    bench = live(max_header_bytes=4096)
    with Raw(bench) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * 8192 + (b"\r\n\r\n" if whole else b""))
        answer = client.answer()
        assert error_of(answer) == (431, "headers_too_large")
        assert b"4096" in answer[2]


def test_a_head_that_never_ends_is_cut_off(live: Callable[..., Bench]) -> None:
    bench = live()
    with Raw(bench) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: ")
        sent = 0
        try:
            while sent < 200 << 20:
                client.send(b"a" * 65536)
                sent += 65536
        except OSError:
            pass
        assert sent < 50 << 20
    assert httpx.get(f"{bench.url}/health").status_code == 200


@pytest.mark.parametrize(
    "data", [b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
             b"GET /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
             b"GET /v1/models HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_gets_an_envelope(live: Callable[..., Bench], data: bytes) -> None:
    with Raw(live()) as client:
        client.send(data)
        assert error_of(client.answer()) == (400, "invalid_http")
        assert client.is_closed()


def test_a_broken_chunk_ends_only_its_own_connection(live: Callable[..., Bench]) -> None:
    bench = live()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with Raw(bench) as client:
        client.send(head + b"transfer-encoding: chunked\r\n\r\n" + b'5\r\n{"mod\r\nZZZ\r\n')
        assert error_of(client.answer()) == (400, "invalid_http")
        assert client.is_closed()
    assert httpx.get(f"{bench.url}/health").status_code == 200
    assert not bench.engine.requests


def open_until(stack: ExitStack, bench: Bench, count: int) -> list[Raw]:
    """So many connections, known to be open because each has had an answer."""
    made = []
    for _ in range(count):
        client = stack.enter_context(Raw(bench))
        client.send(GET)
        assert client.answer()[0] == 200
        made.append(client)
    return made


def test_connections_are_capped(live: Callable[..., Bench]) -> None:
    bench = live(max_connections=3)
    with ExitStack() as stack:
        clients = open_until(stack, bench, 3)
        with Raw(bench) as over:
            over.send(GET)
            answer = over.answer()
            assert error_of(answer) == (503, "too_many_connections")
            assert int(answer[1]["retry-after"]) >= 1
            assert answer[1]["x-should-retry"] == "true"
            assert over.is_closed()
        for path in ("/health", "/ready", "/metrics"):  # or whoever restarts servers would take this one for dead
            with Raw(bench) as probe:
                probe.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                assert probe.answer()[0] == 200
                assert probe.is_closed()
        clients[0].send(GET)
        assert clients[0].answer()[0] == 200
        clients.pop().socket.close()
        for _ in range(500):
            with Raw(bench) as client:
                client.send(GET)
                if client.answer()[0] == 200:
                    return
            time.sleep(0.01)
        raise AssertionError("the place of a closed connection is not given to another")


def test_beyond_the_spare_ones_nothing_is_read(live: Callable[..., Bench]) -> None:
    bench = live(max_connections=1)
    with ExitStack() as stack:
        open_until(stack, bench, 1)
        spare = [stack.enter_context(Raw(bench)) for _ in range(PROBE_CONNECTIONS)]
        with Raw(bench) as over:
            assert error_of(over.answer()) == (503, "too_many_connections")
            assert over.is_closed()
        spare[0].send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert spare[0].answer()[0] == 200


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A certificate for 127.0.0.1, its key, and the authority that signed it."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    for index, blob in enumerate(made.cert_chain_pems):
        blob.write_to_path(paths[0], append=index > 0)
    made.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    return paths


def test_https(live: Callable[..., Bench], certificate: tuple[Path, Path, Path]) -> None:
    cert, key, authority = certificate
    bench = live(ssl_certfile=cert, ssl_keyfile=key)
    assert bench.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(authority))
    with httpx.Client(verify=context) as http:
        client = OpenAI(base_url=f"{bench.url}/v1", api_key="none", http_client=http, max_retries=0)
        stream = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{bench.url}/health")
    with Raw(bench) as client:
        client.send(GET)
        assert client.is_closed()


def test_tls_waits_no_longer_for_a_handshake_or_a_head(
    live: Callable[..., Bench], certificate: tuple[Path, Path, Path]
) -> None:
    cert, key, authority = certificate
    bench = live(ssl_certfile=cert, ssl_keyfile=key, header_timeout_seconds=HANDSHAKE)
    with Raw(bench) as client:
        assert client.is_closed()
    context = ssl.create_default_context(cafile=str(authority))
    with Raw(bench) as client, context.wrap_socket(client.socket, server_hostname="127.0.0.1") as wrapped:
        wrapped.sendall(GET[:-2])
        assert wrapped.recv(65536).startswith(b"HTTP/1.1 408")
