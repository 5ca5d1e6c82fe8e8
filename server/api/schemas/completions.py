"""`POST /v1/completions`."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import PlainValidator, WithJsonSchema

from loramux.server.api.schemas.common import GenerationRequest, ResponseModel, ServedBy, Usage, neutral, valid_unicode

MAX_PROMPTS = 128
Prompt: TypeAlias = str | list[int]

_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


def _are_tokens(value: Any) -> bool:
    """A non-empty list of integers (true and false are none)."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def parse_prompts(value: Any) -> list[Prompt]:
    """The four forms of `prompt` as a list of prompts. Checked by hand: a million ids through a union is slow."""
    if isinstance(value, str):
        return [valid_unicode(value)]
    if _are_tokens(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"has {len(value)} prompts; at most {MAX_PROMPTS} are allowed in one request")
        if all(isinstance(item, str) for item in value):
            return [valid_unicode(item) for item in value]
        if all(_are_tokens(item) for item in value):
            return list(value)
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists; none empty")


class CompletionRequest(GenerationRequest):
    """The body. Without `max_tokens` an answer ends after 16 tokens."""

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]

    echo: Annotated[Any, neutral(False)] = None
    suffix: Annotated[Any, neutral("")] = None
    logprobs: Annotated[Any, neutral()] = None
    add_special_tokens: Annotated[Any, neutral(True)] = None


class CompletionChoice(ResponseModel):
    """One prompt's continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(ResponseModel):
    """The whole answer, or one event of a stream: both have this shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    loramux: ServedBy | None = None
