"""What surrounds every request: an id, a log line, a bound on the body, and an answer to what nobody foresaw.

Pure ASGI, so that streams pass through untouched and disconnects reach whoever waits for them.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.api.context import attach
from loramux.server.api.errors import internal_error

logger = logging.getLogger(__name__)
access = logging.getLogger("loramux.access")

PROBES = frozenset({"/health", "/ready", "/metrics"})
LINGER_BYTES = 16 << 20
LINGER_SECONDS = 2.0
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    return next((value for key, value in scope["headers"] if key == name), None)


class RequestMiddleware:
    """Gives each request an id (the client's `x-request-id` if it is a plain one), logs it, and catches defects.

    The log line holds method, path, status, time and id: never a query, a body or a header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application; an exception that reaches this point is logged with its trace and is a bare 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        given = header(scope, b"x-request-id")
        id = given.decode() if given is not None and _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        attach(scope, id=id, arrived=start)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception:
            logger.exception("request %s failed", id)
            if status:  # too late for an answer: the connection is cut
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            if access.isEnabledFor(level):
                path = scope["path"][:200].encode("unicode_escape").decode()
                seconds = time.monotonic() - start
                access.log(level, '"%s %s" %d %.3fs %s', scope["method"], path, status or 499, seconds, id)


class BodyMiddleware:
    """Bounds how large a body may be and how long a client may pause while it sends one.

    `limit_of(path)` is the bound in bytes. The declared length is checked before anything is read, the bytes are
    counted as they come (a chunked body declares nothing). Before a response to a body that was not read, a bounded
    part of the rest is read, so that the client gets to see the response; if that was not all, the connection closes.
    """

    def __init__(self, app: ASGIApp, *, limit_of: Callable[[str], int], pause_seconds: float) -> None:
        self._app = app
        self._limit_of = limit_of
        self._pause = pause_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises HTTPException 413 and 408 out of `receive`, where the body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, self._limit_of(scope["path"]), self._pause)

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and not body.complete:
                await body.linger()
                if not body.complete:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, body.receive, send_closing)


class _Body:
    """One request's body on its way in."""

    def __init__(self, scope: Scope, receive: Receive, limit: int, pause: float) -> None:
        self._receive = receive
        self._limit = limit
        self._pause = pause
        length = header(scope, b"content-length")
        chunked = header(scope, b"transfer-encoding") is not None
        self._declared = int(length) if length is not None and length.isdigit() and len(length) < 20 else 0
        self._seen = 0
        self._awaits_permission = header(scope, b"expect") is not None
        self.complete = not chunked and self._declared == 0

    async def _next(self) -> Message:
        async with asyncio.timeout(self._pause):
            message = await self._receive()
        self._awaits_permission = False
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.complete = True
        return message

    async def receive(self) -> Message:
        """The next message; disconnects are waited for without a bound once the body is complete."""
        if self.complete:
            return await self._receive()
        if self._declared > self._limit:
            raise self._too_large()
        try:
            message = await self._next()
        except TimeoutError:
            raise HTTPException(408, f"No data arrived for {self._pause:g} seconds.") from None
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise self._too_large()
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than the limit of {self._limit} bytes.")

    async def linger(self) -> None:
        """Reads and drops a bounded rest, unless the client is still waiting for permission to send it."""
        if self._awaits_permission:
            return
        dropped = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete and dropped < LINGER_BYTES:
                    dropped += len((await self._next()).get("body", b""))
        except TimeoutError:
            pass
