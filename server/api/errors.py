"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`, for every failure there is."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loramux.adapters_store.errors import AdapterError
from loramux.server.engine.protocol import (
    AdapterLoadError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    QueueTimeoutError,
    RequestRefusedError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RESTART_RETRY_SECONDS = 5
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class APIError(Exception):
    """A failure with its HTTP status and the four fields of the envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.envelope(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A 400 that names the field."""
    return APIError(400, message, param=param, code=code)


def model_not_found(model: str) -> APIError:
    """The 404 for a name that is neither the base, nor an adapter, nor one of its versions."""
    return APIError(
        404, f"The model {model!r} does not exist; GET /v1/models lists those that do.", param="model",
        code="model_not_found",
    )  # fmt: skip


def unavailable(message: str, *, code: str, retry_after: int = 1) -> APIError:
    """A 503 that clients should repeat after `retry_after` seconds."""
    headers = {"retry-after": str(max(1, retry_after)), "x-should-retry": "true"}
    return APIError(503, message, type=SERVER_ERROR, code=code, headers=headers)


def internal_error() -> APIError:
    """What a client learns of a defect of ours: nothing but that there is one."""
    return APIError(500, "The server failed to answer this request.", type=SERVER_ERROR, code="internal_error")


def from_engine(error: EngineError) -> APIError:
    """The engine's refusal or failure as an answer; its own words only where they are meant for clients."""
    if isinstance(error, QueueTimeoutError):
        return unavailable(
            f"The server is overloaded: {error}. Try again later.", code="queue_timeout", retry_after=error.retry_after
        )
    if isinstance(error, DeadlineError):
        return APIError(
            504, f"The answer takes longer than this server allows: {error}. Ask for fewer tokens.", type=SERVER_ERROR,
            code="deadline_exceeded", headers={"x-should-retry": "false"},
        )  # fmt: skip
    if isinstance(error, QueueFullError):
        return unavailable("The server's queue is full.", code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineDeadError):
        return unavailable(
            "The engine ended before it could answer; try again in a moment.",
            code="engine_dead",
            retry_after=RESTART_RETRY_SECONDS,
        )
    if isinstance(error, AdapterLoadError):
        return APIError(
            503, f"The adapter cannot be brought to the device: {error}", type=SERVER_ERROR,
            code="adapter_not_loadable", headers={"x-should-retry": "false"},
        )  # fmt: skip
    if isinstance(error, RequestRefusedError):
        return bad_request(f"The request cannot be computed: {error}", code="request_refused")
    if error.retryable:
        return unavailable("The engine could not finish the request.", code="engine_error")
    return APIError(
        500, f"The engine refused the request: {error}", type=SERVER_ERROR, code="engine_error",
        headers={"x-should-retry": "false"},
    )  # fmt: skip


def from_store(error: AdapterError) -> APIError:
    """The store's refusal: its status, its words, its field. A conflict is final, so clients must not repeat it."""
    headers = {"x-should-retry": "false"} if error.status == 409 else {}
    kind = INVALID_REQUEST if error.status < 500 else SERVER_ERROR
    return APIError(error.status, str(error), type=kind, param=error.field, code=error.code, headers=headers)


def _dotted(path: Sequence[str | int]) -> str | None:
    """`("messages", 0, "content")` -> `messages[0].content`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or None


def _real_path(location: Sequence[str | int], body: Any, missing: bool) -> list[str | int]:
    """The part of pydantic's location that exists in the body: names of union members are left out."""
    path: list[str | int] = []
    value = body
    for position, part in enumerate(location):
        in_object = isinstance(value, dict) and part in value
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_object or in_list:
            value = value[part]
            path.append(part)
        elif missing and position == len(location) - 1:
            path.append(part)
    return path


def from_validation(error: RequestValidationError) -> APIError:
    """The first and deepest mistake of a body, by field: 400, as OpenAI answers, instead of FastAPI's 422."""
    if not (items := error.errors()):
        return bad_request("The request is malformed.")
    item = max(items, key=lambda entry: len(entry["loc"]))
    kind, location = item["type"], tuple(item["loc"])
    if kind == "json_invalid":
        return bad_request("The body is not valid JSON.", code="invalid_json")
    if location in {("body",), ()} and kind != "unknown_field":
        return bad_request("Send a JSON object with `content-type: application/json`.", code="invalid_json")
    inside = location[0] == "body"
    path = _real_path(location[1:], error.body, kind == "missing") if inside else list(location[1:])
    if kind == "unknown_field":
        path = [*path, item["ctx"]["name"]]
    name = _dotted(path)
    if kind in ("extra_forbidden", "unknown_field"):
        return bad_request(f"Unrecognized request argument: {name}", name, "unknown_parameter")
    if kind == "missing":
        return bad_request(f"Missing required parameter: {name}", name, "missing_required_parameter")
    message = str(item["msg"]).removeprefix("Value error, ")
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return bad_request(f"{name}: {message}" if name else message, name, code)


def from_http(error: HTTPException, request: Request) -> APIError:
    """What the routing layer refuses: unknown paths, wrong methods, unreadable bodies."""
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path[:200]}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed here."
    else:
        message = str(error.detail)
    code = _HTTP_CODES.get(error.status_code)
    kind = INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR
    return APIError(error.status_code, message, type=kind, code=code, headers=error.headers)


def install(app: FastAPI) -> None:
    """Makes every exception that leaves a route an envelope. What nobody foresaw is the middleware's."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, APIError)
        return error.response()

    async def on_store_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AdapterError)
        return from_store(error).response()

    async def on_engine_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, EngineError)
        return from_engine(error).response()

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return from_http(error, request).response()

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(AdapterError, on_store_error)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
