"""Clients that ask and then read nothing: their connections do not stay, whatever is still to be sent to them."""

import json
import socket
from collections.abc import Callable
from functools import partial

import pytest
from api.harness import BASE, Bench, saying
from support.waiting import wait_for

from loramux.server.api import connections, serve

UNREAD_SECONDS = 0.5
LONG = "word " * 100_000
SMALL_BUFFER = 4096

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a facility of Linux")


def ask(bench: Bench, path: str, body: dict[str, object]) -> socket.socket:
    """A request whose answer is never read."""
    host, port = bench.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    client.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


@pytest.mark.parametrize("kind", ["a long answer", "a stream"])
def test_a_client_that_reads_nothing_is_cut_off(
    live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(serve, "bounded", partial(connections.bounded, unread_seconds=UNREAD_SECONDS))
    opened: list[connections.BoundedProtocol] = []
    plain = connections.BoundedProtocol.connection_made

    def noted(self: connections.BoundedProtocol, transport: object) -> None:
        plain(self, transport)  # type: ignore[arg-type]
        opened.append(self)

    monkeypatch.setattr(connections.BoundedProtocol, "connection_made", noted)
    bench = live()
    bench.engine.script = saying("x" * 200, end=False)
    if kind == "a stream":
        body = {"model": BASE, "prompt": ["a"] * 100, "stream": True, "max_tokens": 200, "return_token_ids": True}
        client = ask(bench, "/v1/completions", body)
    else:
        client = ask(bench, "/tokenize", {"prompt": LONG, "return_token_strs": True})
    with client:
        wait_for(lambda: bool(opened) and not opened[0].connections)
        wait_for(lambda: not bench.engine.running)
    wait_for(lambda: bench.leases() == {})
