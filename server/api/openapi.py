"""`/openapi.json` as it is: every failure has OpenAI's envelope, streams are event streams, and there is no 422."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from loramux.server.api.schemas.chat import ChatChunk
from loramux.server.api.schemas.completions import Completion

STREAMS = {
    "/v1/chat/completions": ChatChunk.__name__,
    "/v1/completions": Completion.__name__,
    "/v1/responses": None,
}
"""Which endpoints stream, and the schema of an event's data where all events have one."""
TEXTS = frozenset({"/metrics"})
JSON = "application/json"
REFERENCE = "#/components/schemas/"


class ErrorBody(BaseModel):
    """What went wrong. `param` is the field at fault, `code` is stable and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every failure."""

    error: ErrorBody


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """A replacement for `app.openapi`: FastAPI's own document, made once, with what it does not know put right."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = generate()
            _complete(found)
            app.openapi_schema = found
        return app.openapi_schema

    return document


def _complete(document: dict[str, Any]) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    envelope = ErrorEnvelope.model_json_schema(ref_template=REFERENCE + "{model}")
    schemas.update(envelope.pop("$defs"))
    schemas[ErrorEnvelope.__name__] = envelope
    shape = {"schema": {"$ref": REFERENCE + ErrorEnvelope.__name__}}
    failure = {"description": "Refused or failed.", "content": {JSON: shape}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            answers |= {"4XX": failure, "5XX": failure}
            if path in TEXTS:
                answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
            if path in STREAMS:
                event = STREAMS[path]
                shown = f"Events; the data of each is a {event}, an error, or [DONE]." if event else "Typed events."
                # no type: readers of the document take either the text or one event for what it describes
                answers["200"]["content"]["text/event-stream"] = {"schema": {"description": shown}}
