"""What the endpoints' answers have in common: one piece or events, usage, and the order in which things end."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from starlette.responses import Response

from loramux.server.api.generation import Delta, Generation
from loramux.server.api.resolve import Selection
from loramux.server.api.schemas.common import GenerationRequest, ResponseModel
from loramux.server.api.streaming import DONE, EventStream, unless_disconnected


class Answer(ABC):
    """The shape of one answer. Subclasses say how a whole answer and a delta look on the wire."""

    def __init__(self, id: str, selection: Selection, body: GenerationRequest, generation: Generation) -> None:
        self.generation = generation
        self.selection = selection
        self._want_ids = bool(body.return_token_ids)
        self._common: dict[str, Any] = {
            "id": id, "created": int(time.time()), "model": selection.model, "system_fingerprint": None,
        }  # fmt: skip
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = self._usage_at_end and bool(options and options.continuous_usage_stats)

    @abstractmethod
    def whole(self) -> ResponseModel:
        """The answer in one piece, once the generation has ended."""

    @abstractmethod
    def opening(self) -> list[bytes]:
        """The events before the first delta."""

    @abstractmethod
    def delta(self, delta: Delta) -> list[bytes]:
        """The events of one delta; none for one that shows nothing."""

    @abstractmethod
    def closing(self) -> list[bytes]:
        """The events after the last delta."""

    def _at_end(self) -> dict[str, Any]:
        """What a stream's last event says besides: the shadow's decision, which the first could not know."""
        return {} if self.selection.shadow is None else {"loramux": self.selection.served_by}

    def _ending(self, usage_event: Callable[[], bytes]) -> list[bytes]:
        """What chat and text completions end a stream with: the whole usage, if it was asked for, and `[DONE]`."""
        return [usage_event(), DONE] if self._usage_at_end else [DONE]

    def _usage(self) -> dict[str, Any]:
        """The `usage` field of an event before the last: absent, null or the usage so far, as the client chose."""
        if self._usage_always:
            return {"usage": self.generation.usage}
        return {"usage": None} if self._usage_at_end else {}

    async def _events(self, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        for item in [*self.opening(), *self.delta(first)]:
            yield item
        async for delta in deltas:
            for item in self.delta(delta):
                yield item
        for item in self.closing():
            yield item

    async def respond(self, request: Request, resources: AsyncExitStack, *, stream: bool) -> Response:
        """Runs the generation and answers.

        A stream is started only after the engine's first output, so that a full queue or a dead engine is a status and
        not an event. A client that leaves ends the generation. A stream takes `resources` along.
        """
        deltas = self.generation.deltas()
        resources.push_async_callback(deltas.aclose)
        if stream:
            first = await unless_disconnected(request, _first(deltas))
            return EventStream(self._events(first, deltas), resources.pop_all(), self.selection.headers)
        await unless_disconnected(request, _exhaust(deltas))
        return Response(self.whole().json_text(), media_type="application/json", headers=self.selection.headers)


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    """The first delta; a generation has at least one, or raises."""
    return await anext(deltas)


async def _exhaust(deltas: AsyncGenerator[Delta, None]) -> None:
    """Runs to the end; the generation's choices keep what matters."""
    async for _ in deltas:
        pass
