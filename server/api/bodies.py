"""Large JSON bodies, read and checked in a thread, so that none of them stops the event loop.

A thread alone is not enough: `json`'s C scanner and pydantic's lists of errors hold the interpreter from their first
byte to their last. A body of so many values that this would take tens of milliseconds is read by `json`'s own scanner
in Python, which lets other threads run in between, and has a bound on its objects and lists, whose number is what the
garbage collector's pauses grow with.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from json import decoder, scanner
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from loramux.server.api.errors import bad_request

INLINE_BYTES = 16 << 10
"""Bodies up to this are read on the event loop: a thread would take longer than the work."""
QUICK_VALUES = 300_000
QUICK_NESTED = 50_000
QUICK_KEYS = 50_000
QUICK_DIGITS = 400
MAX_CONTAINERS = 100_000
_JSON_TYPE = re.compile(r"application/(?:[^;\s]+\+)?json\s*(?:;.*)?", re.IGNORECASE)
_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))


class _PatientDecoder(json.JSONDecoder):
    """Reads what `json.loads` reads, some ten times slower, without holding the interpreter.

    Raises ValueError beyond `MAX_CONTAINERS` objects and lists.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = MAX_CONTAINERS
        self.parse_object = lambda *args: self._counted(decoder.JSONObject, args)  # type: ignore[attr-defined]
        self.parse_array = lambda *args: self._counted(decoder.JSONArray, args)  # type: ignore[attr-defined]
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _counted(self, read: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._left -= 1
        if self._left < 0:
            raise bad_request(
                f"The body has more than {MAX_CONTAINERS} objects and lists; send several requests.",
                code="limit_exceeded",
            )  # fmt: skip
        return read(*args)


def is_quick(data: bytes) -> bool:
    """Whether `json.loads` reads this in a few milliseconds; judged by characters, so also by those inside texts."""
    return (
        data.count(b",") <= QUICK_VALUES
        and data.count(b"[") + data.count(b"{") <= QUICK_NESTED
        and data.count(b":") <= QUICK_KEYS
        and b"0" * QUICK_DIGITS not in data.translate(_DIGITS)
    )


def read_json(data: bytes) -> Any:
    """The value. Blocks. Raises ValueError and RecursionError as `json.loads` does, a 400 for too many objects."""
    encoding = json.detect_encoding(data)
    if encoding == "utf-8" and is_quick(data):
        return json.loads(data)
    return _PatientDecoder().decode(data.decode(encoding, "surrogatepass"))


def read_body(model: type[BaseModel], data: bytes) -> BaseModel:
    """The body as `model`. Blocks. Raises what FastAPI raises for a body that is none."""
    try:
        value = read_json(data)
    except json.JSONDecodeError as error:
        wrong = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([wrong]) from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "There was an error parsing the body") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        items = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(items, body=value) from None


class _ReadRequest(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, data: bytes, value: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._data, self._value = data, value

    async def body(self) -> bytes:
        """The bytes."""
        return self._data

    async def json(self) -> Any:
        """The model, which FastAPI's own check lets through as it is."""
        return self._value


class BodyRoute(APIRoute):
    """A route whose JSON body, if it is a large one, becomes its model in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute.get_route_handler`."""
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return handle
        kind = model

        async def read_first(request: Request) -> Response:
            data = await request.body()
            if len(data) > INLINE_BYTES and _JSON_TYPE.fullmatch(request.headers.get("content-type", "")):
                value = await asyncio.to_thread(read_body, kind, data)
                request = _ReadRequest(request, data, value)
            return await handle(request)

        return read_first
