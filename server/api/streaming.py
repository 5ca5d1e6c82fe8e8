"""Server-sent events, and what happens when the client leaves before the end."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.server.api.errors import APIError, from_engine, internal_error
from loramux.server.api.schemas.common import ResponseModel
from loramux.server.engine.protocol import EngineError

SEND_SECONDS = 60

logger = logging.getLogger(__name__)
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(model: ResponseModel) -> bytes:
    """One event: `data: {json}` and an empty line."""
    return b"data: " + model.json_text().encode() + b"\n\n"


def named_event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """One event with a name: `event: kind`, `data: {json}` and an empty line."""
    return f"event: {kind}\ndata: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


def error_event(error: APIError) -> bytes:
    """The event that ends a stream that failed; clients raise it. `[DONE]` never follows."""
    return b"data: " + bytes(error.response().body) + b"\n\n"


async def _until_disconnect(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The work's result; if the client leaves first, the work is cancelled, awaited, and ClientDisconnect is raised."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for running in (task, gone):
            running.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` before a response is started; raises ClientDisconnect, the work cancelled, if the client leaves."""
    return await _first_of(work, request.receive)


class EventStream(Response):
    """A response made of events, which owns what the events need.

    `events` yields finished events. When they end, fail, or the client leaves, the generator is closed first and then
    `resources`; both have happened when the response returns. A failure becomes an error event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], resources: AsyncExitStack, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._resources = resources
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events as they come."""
        async with self._resources:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _first_of(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        try:
            async for item in self._events:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": item, "more_body": True})
        except TimeoutError:
            logger.info("a client stopped reading its stream for %d s; the stream is given up", SEND_SECONDS)
            return
        except EngineError as error:
            await send({"type": "http.response.body", "body": error_event(from_engine(error)), "more_body": True})
        except Exception:
            logger.exception("a stream failed")
            await send({"type": "http.response.body", "body": error_event(internal_error()), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
