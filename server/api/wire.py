"""Answers as JSON, a bounded piece per call: pydantic's and json's own writers hold the interpreter until they end."""

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.server.api.schemas.common import ResponseModel
from loramux.server.api.streaming import SEND_SECONDS

logger = logging.getLogger(__name__)

PIECE_VALUES = 2048
PART_BYTES = 1 << 20
INLINE_VALUES = 512
"""Answers up to this many values are written on the event loop: a thread would take longer than the work."""


def _is_nested(value: Any) -> bool:
    return isinstance(value, BaseModel | dict | Sequence) and not isinstance(value, str)


def count_values(value: Any, limit: int) -> int:
    """How many values there are inside each other; counting ends beyond `limit`, and at a sequence that is no list."""
    if isinstance(value, BaseModel):
        inner: Sequence[Any] = [getattr(value, name) for name in value.model_fields_set]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = value
    else:
        return limit + 1 if _is_nested(value) else 1
    count = 1 + len(inner)
    if count > limit:
        return count
    for item in inner:
        if count > limit:
            break
        if _is_nested(item):
            count += count_values(item, limit - count)
    return count


def json_pieces(value: Any) -> Iterator[str]:
    """`value.model_dump_json(exclude_unset=True)`, up to the spelling of numbers, in pieces of `PIECE_VALUES` values.

    `value` consists of models, dictionaries with text keys, sequences and scalars. The items of a sequence that makes
    them when they are looked at live no longer than their piece.
    """
    is_short = count_values(value, PIECE_VALUES) <= PIECE_VALUES
    if isinstance(value, BaseModel):
        if is_short:
            yield value.model_dump_json(exclude_unset=True)
            return
        set_fields = [name for name in type(value).model_fields if name in value.model_fields_set]
        yield from _object((name, getattr(value, name)) for name in set_fields)
    elif isinstance(value, dict):
        yield from _object(iter(value.items()))
    elif _is_nested(value):
        yield "["
        for start in range(0, len(value), PIECE_VALUES):
            part = value[start : start + PIECE_VALUES]
            yield "," if start else ""
            if any(map(_is_nested, part)):
                for number, item in enumerate(part):
                    yield "," if number else ""
                    yield from json_pieces(item)
            else:
                yield _plain(part)[1:-1]
        yield "]"
    else:
        yield _plain(value)


def _object(items: Iterator[tuple[str, Any]]) -> Iterator[str]:
    yield "{"
    for number, (name, item) in enumerate(items):
        yield f"{',' if number else ''}{_plain(name)}:"
        yield from json_pieces(item)
    yield "}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def written(answer: ResponseModel) -> bytes:
    """The wire form of an answer of any size; a large one is written in a thread."""
    if count_values(answer, INLINE_VALUES) <= INLINE_VALUES:
        return answer.json_text().encode()
    return await asyncio.to_thread(joined, answer)


def joined(answer: ResponseModel) -> bytes:
    """`json_pieces` together. Blocks."""
    return "".join(json_pieces(answer)).encode()


class JSONAnswer(Response):
    """A body of JSON that is sent in parts, as fast as the client reads it: one send of many megabytes takes long.

    A client that reads nothing for `SEND_SECONDS` is given up.
    """

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body) or 1, PART_BYTES):
            part, more = bytes(body[start : start + PART_BYTES]), start + PART_BYTES < len(body)
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": part, "more_body": more})
            except TimeoutError:
                logger.info("a client stopped reading its answer for %d s; it is given up", SEND_SECONDS)
                return
            await asyncio.sleep(0)
