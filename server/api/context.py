"""What the outermost middleware knows of a request, for the routes and middleware inside it."""

from fastapi import Request
from starlette.types import Scope

from loramux.server.observability.record import RequestRecord

_KEY = "loramux"


def attach(scope: Scope, *, id: str, arrived: float) -> RequestRecord:
    """Starts the request's record: its id, and when it arrived (`time.monotonic`, seconds)."""
    record = RequestRecord(id, arrived)
    scope[_KEY] = record
    return record


def record_of(scope: Scope) -> RequestRecord:
    """The record that `attach` started."""
    record: RequestRecord = scope[_KEY]
    return record


def set_tenant(scope: Scope, tenant: str) -> None:
    """Says who sent the request, for its log line and its span."""
    record_of(scope).tenant = tenant


def request_id(request: Request) -> str:
    """The id that the response carries as `x-request-id`."""
    return record_of(request.scope).id


def arrival(request: Request) -> float:
    """When the request's head had arrived, in seconds of `time.monotonic`."""
    return record_of(request.scope).arrived
