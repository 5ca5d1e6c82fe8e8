"""What the endpoints' answers have in common: one piece or events, usage, and the order in which things end."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from loramux.server.api.generation import Delta, Generation
from loramux.server.api.logprobs import PART_SCORES
from loramux.server.api.resolve import Selection
from loramux.server.api.schemas.common import GenerationRequest, ResponseModel, Usage
from loramux.server.api.streaming import DONE, EventStream, unless_disconnected
from loramux.server.api.wire import JSONAnswer, joined

INLINE_TOKENS = 2048
"""Whole answers of more tokens, or with more than `PART_SCORES` scores, are written in a thread."""


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
    def read(self, delta: Delta) -> None:
        """Takes in a delta of an answer that is given in one piece; the generation itself keeps text and tokens."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.generation.usage

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
            return {"usage": self.usage}
        return {"usage": None} if self._usage_at_end else {}

    async def _events(self, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        for item in self.opening():
            yield item
        async for delta in _with_first(first, deltas):
            for part in _parts(delta):
                for item in self.delta(part):
                    yield item
                if part is not delta:
                    await asyncio.sleep(0)
        for item in self.closing():
            yield item

    async def _read_all(self, deltas: AsyncGenerator[Delta, None]) -> None:
        """Runs to the end."""
        async for delta in deltas:
            self.read(delta)

    def _write_whole(self) -> bytes:
        return joined(self.whole())

    async def _whole_text(self) -> bytes:
        """The answer in one piece, as JSON; a long one is made in a thread."""
        choices = self.generation.choices
        tokens = sum(len(choice.prompt) + len(choice.token_ids) for choice in choices)
        if tokens <= INLINE_TOKENS and sum(len(choice.scores) for choice in choices) <= PART_SCORES:
            return self.whole().json_text().encode()
        return await asyncio.to_thread(self._write_whole)

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
        await unless_disconnected(request, self._read_all(deltas))
        return JSONAnswer(await self._whole_text(), headers=self.selection.headers)


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    """The first delta; a generation has at least one, or raises."""
    return await anext(deltas)


async def _with_first(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """All deltas again, of which the first was taken."""
    yield first
    async for delta in rest:
        yield delta


def _parts(delta: Delta) -> Iterator[Delta]:
    """The delta in parts of at most `PART_SCORES` scores: text and ids come with the first, the end with the last."""
    scores = delta.scores
    if len(scores) <= PART_SCORES:
        yield delta
        return
    yield replace(delta, scores=scores[:PART_SCORES], finish_reason=None, stop_reason=None)
    for start in range(PART_SCORES, len(scores), PART_SCORES):
        part = Delta(delta.index, "", [], scores=scores[start : start + PART_SCORES])
        if start + PART_SCORES >= len(scores):
            part = replace(part, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
        yield part
