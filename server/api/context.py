"""What the outermost middleware knows of a request, for the routes inside it."""

from typing import Any

from fastapi import Request
from starlette.types import Scope

_KEY = "loramux"


def attach(scope: Scope, *, id: str, arrived: float) -> None:
    """Remembers the request's id and when it arrived (`time.monotonic`, seconds)."""
    scope[_KEY] = {"id": id, "arrived": arrived}


def _of(request: Request) -> dict[str, Any]:
    context: dict[str, Any] = request.scope[_KEY]
    return context


def request_id(request: Request) -> str:
    """The id that the response carries as `x-request-id`."""
    return str(_of(request)["id"])


def arrival(request: Request) -> float:
    """When the request's head had arrived, in seconds of `time.monotonic`."""
    return float(_of(request)["arrived"])
