"""What a connection may do before the application sees anything of it: how many there are, how slowly a head may come.

Uvicorn's h11 protocol with three bounds, and a loop that bounds TLS handshakes, which come before any protocol. h11 is
required: it refuses a head that grows beyond a bound while it arrives, where uvicorn's other parser would buffer
hundreds of megabytes of it.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState as UvicornState

from loramux.server.api.errors import APIError, unavailable

PROBES = frozenset({"/health", "/ready", "/metrics"})
PROBE_CONNECTIONS = 32
UNREAD_SECONDS = 60.0
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large",
            503: "Service Unavailable"}  # fmt: skip


def too_large_head(limit: int) -> APIError:
    """The 431 for a request line and headers beyond the limit."""
    return APIError(
        431, f"The request's line and headers are larger than the limit of {limit} bytes.", code="headers_too_large"
    )


def too_many_connections() -> APIError:
    """The 503 for a connection beyond the cap."""
    return unavailable("The server has too many connections; try again in a moment.", code="too_many_connections")


class ProbesOnly:
    """The application for connections beyond the cap: probes are answered, so that a flood does not look like a death
    to whoever restarts servers; everything else is a 503. The connection closes either way."""

    def __init__(self, app: ASGIApp, on_refusal: Callable[[int], object]) -> None:
        self._app = app
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""

        async def send_closing(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["type"] == "http" and scope["path"] in PROBES:
            await self._app(scope, receive, send_closing)
        else:
            error = too_many_connections()
            self._on_refusal(error.status)
            await error.response()(scope, receive, send_closing)


class BoundedProtocol(H11Protocol):
    """One connection. Subclasses say the bounds; see `bounded`.

    At most `max_connections` are served; beyond them `PROBE_CONNECTIONS` more get answers to probes and 503, and any
    further one is told 503 and closed at once. A head that is not complete `head_seconds` after its first byte (on a
    new connection: after it was opened) ends the connection with 408, however steadily its bytes come. A client that
    takes nothing of what is sent to it for `unread_seconds` is cut off (by the system, where it offers that): closing
    a connection waits for its last bytes to be read, for ever if need be.
    """

    max_connections: int
    head_seconds: float
    unread_seconds: float
    on_refusal: Callable[[int], object]

    def __init__(
        self,
        config: Config,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection and starts to wait for its first head."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.unread_seconds * 1000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        open_now = len(self.connections)
        if open_now > self.max_connections + PROBE_CONNECTIONS:
            self._refuse(too_many_connections())
            return
        if open_now > self.max_connections:
            self.app = ProbesOnly(self.app, self.on_refusal)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The timer must not outlive the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Called with new bytes, and when a response is complete and bytes may be left over."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_timer()
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's refusal is handled: its own status where it names one, in the API's envelope."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(too_large_head(self.config.h11_max_incomplete_event_size or 0))
        else:
            self._refuse(APIError(400, msg, code="invalid_http"))

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(
                APIError(408, f"The request's head took longer than {self.head_seconds:g} s.", code="request_timeout")
            )
        else:  # it never asked for anything: nothing to answer
            self.transport.close()

    def _refuse(self, error: APIError) -> None:
        """Answers and closes, past h11, whose state no longer allows an answer; not into a response that has begun."""
        self._stop_timer()
        self.on_refusal(error.status)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(error.envelope()).encode()
            fields = {
                "content-type": "application/json", "content-length": str(len(body)), "connection": "close",
                **error.headers,
            }  # fmt: skip
            head = f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()


class HandshakeLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers give up on a TLS handshake after so many seconds (asyncio's own: after 60).

    Uvicorn has no option for it, and tells nothing of a connection before its handshake is done.
    """

    def __init__(self, handshake_seconds: float) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds

    async def create_server(self, *args: Any, **options: Any) -> Any:
        """See `asyncio.loop.create_server`."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", self._handshake_seconds)
        return await super().create_server(*args, **options)


def bounded(
    *,
    max_connections: int,
    head_seconds: float,
    on_refusal: Callable[[int], object],
    unread_seconds: float = UNREAD_SECONDS,
) -> type[BoundedProtocol]:
    """The protocol with its bounds, as the class that uvicorn wants. `on_refusal` is told each refusal's status."""
    bounds = {
        "max_connections": max_connections, "head_seconds": head_seconds, "unread_seconds": unread_seconds,
        "on_refusal": staticmethod(on_refusal),
    }  # fmt: skip
    return type("BoundedH11Protocol", (BoundedProtocol,), bounds)
