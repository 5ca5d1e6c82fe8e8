"""`POST /v1/completions`."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator, WithJsonSchema

from loramux.server.api.schemas.common import (
    INT64_MAX,
    Flag,
    GenerationRequest,
    ResponseModel,
    ServedBy,
    Usage,
    example_of,
    neutral,
    valid_unicode,
)
from loramux.server.api.schemas.logprobs import TextLogprobs
from loramux.server.api.schemas.structured import StructuredFields

MAX_PROMPTS = 128
MAX_LOGPROBS = 5
MAX_BEST_OF = 20
Prompt: TypeAlias = str | list[int]

_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def prompts_schema(limit: int) -> dict[str, Any]:
    """The JSON schema of what `parse_prompts` takes."""
    return {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": limit},
            _TOKENS_SCHEMA,
            {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": limit},
        ]
    }


def _are_tokens(value: Any) -> bool:
    """A non-empty list of integers (true and false are none)."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def parse_prompts(value: Any, *, limit: int = MAX_PROMPTS) -> list[Prompt]:
    """The four forms of `prompt` as a list of prompts. Checked by hand: a million ids through a union is slow."""
    if isinstance(value, str):
        return [valid_unicode(value)]
    if _are_tokens(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > limit:
            raise ValueError(f"has {len(value)} entries; at most {limit} are allowed in one request")
        if all(isinstance(item, str) for item in value):
            return [valid_unicode(item) for item in value]
        if all(_are_tokens(item) for item in value):
            return list(value)
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists; none empty")


class CompletionRequest(GenerationRequest, StructuredFields):
    """The body. Without `max_tokens` an answer ends after 16 tokens; with `echo` it may be 0: only the prompt comes.

    `best_of` answers are generated and the `n` with the highest mean log-probability are shown.
    """

    model_config = example_of({"model": "loramux-demo", "prompt": "Reverse this: planet", "max_tokens": 8})

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts), WithJsonSchema(prompts_schema(MAX_PROMPTS))]

    echo: Flag
    suffix: Annotated[Any, neutral("")] = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    max_tokens: int | None = Field(None, ge=0, le=INT64_MAX)
    add_special_tokens: Flag

    @property
    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest.wanted_logprobs`."""
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """See `GenerationRequest.wanted_prompt_logprobs`."""
        return self.logprobs if self.echo else None


class CompletionChoice(ResponseModel):
    """One prompt's continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
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
