"""What surrounds every request: an id, a log line, a bound on the body, and an answer to what nobody foresaw.

Pure ASGI, so that streams pass through untouched and disconnects reach whoever waits for them.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.api.connections import PROBES, too_large_head
from loramux.server.api.context import attach
from loramux.server.api.errors import APIError, internal_error
from loramux.server.api.metrics import Metrics
from loramux.server.observability.record import RequestRecord, serving
from loramux.server.observability.telemetry import Telemetry

logger = logging.getLogger(__name__)
access = logging.getLogger("loramux.access")

MAX_HEADERS = 128
MAX_LOGGED_PATH = 200
UNMATCHED = "unmatched"
CLIENT_LEFT = 499
LINGER_BYTES = 16 << 20
LINGER_SECONDS = 2.0
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    return next((value for key, value in scope["headers"] if key == name), None)


class RequestMiddleware:
    """Gives each request an id (the client's `x-request-id` if it is a plain one), bounds its head, counts it, logs it,
    traces it, and catches defects.

    `root_path` is the prefix under which a proxy serves this server; it is taken off paths that still have it. The
    log line says what `RequestRecord` knows, with method, path and status: never a query, a body or a header.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        telemetry: Telemetry | None = None,
        max_header_bytes: int,
        root_path: str = "",
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._telemetry = telemetry
        self._max_header_bytes = max_header_bytes
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application; an exception that reaches this point is logged with its trace and is a bare 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path and scope["path"].startswith(self._root_path + "/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._root_path)}
        start = time.monotonic()
        given = header(scope, b"x-request-id")
        id = given.decode() if given is not None and _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        record = attach(scope, id=id, arrived=start)
        traced = self._telemetry is not None and scope["path"] not in PROBES
        span = self._telemetry.start(scope["headers"], start) if self._telemetry is not None and traced else None
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            with serving(record):
                if (refusal := self._head_refusal(scope)) is not None:
                    await refusal.response()(scope, receive, send_with_id)
                else:
                    await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception:
            logger.exception("request failed", extra={"fields": {"request_id": id}})
            if status:  # too late for an answer: the connection is cut
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            status = status or CLIENT_LEFT
            self._metrics.answered(scope["method"], route, status)
            trace_id = None
            if span is not None:
                trace_id = span.trace_id
                span.end(record, method=scope["method"], route=route, status=status)
            self._log(scope, record, status, time.monotonic() - start, trace_id)

    def _head_refusal(self, scope: Scope) -> APIError | None:
        """The 431 for a head that arrived whole and is larger, or has more fields, than is allowed."""
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS:
            return APIError(431, f"The request has more than {MAX_HEADERS} headers.", code="headers_too_large")
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        return too_large_head(self._max_header_bytes) if size > self._max_header_bytes else None

    def _log(self, scope: Scope, record: RequestRecord, status: int, seconds: float, trace_id: str | None) -> None:
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if not access.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "method": scope["method"],
            "path": scope["path"][:MAX_LOGGED_PATH],
            "status": status,
            "seconds": seconds,
            "request_id": record.id,
            "tenant": record.tenant,
            "trace_id": trace_id,
        }
        if record.finish_reasons:
            fields |= {
                "model": record.model,
                "served": ",".join(record.served),
                "finish_reason": ",".join(dict.fromkeys(record.finish_reasons)),
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "generated_tokens": record.generated_tokens,
                "queue_seconds": record.queue_seconds,
                "prefill_seconds": record.prefill_seconds,
                "decode_seconds": record.decode_seconds,
            }
        access.log(level, "request", extra={"fields": fields})


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
