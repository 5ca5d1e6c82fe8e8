"""`POST /v1/embeddings`."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from loramux.server.api.schemas.common import (
    AdapterWeight,
    Flag,
    RequestModel,
    ResponseModel,
    ServedBy,
    Text,
    example_of,
    neutral,
)
from loramux.server.api.schemas.completions import Prompt, parse_prompts, prompts_schema

MAX_INPUTS = 2048


def _parse_inputs(value: Any) -> list[Prompt]:
    return parse_prompts(value, limit=MAX_INPUTS)


class EmbeddingRequest(RequestModel):
    """The body. `dimensions` can only be the model's own number: its states were not trained to be cut."""

    model_config = example_of({"model": "loramux-demo", "input": ["one text", "another"]})

    model: Text = Field(min_length=1, max_length=512)
    input: Annotated[list[Prompt], PlainValidator(_parse_inputs), WithJsonSchema(prompts_schema(MAX_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=1 << 20)
    adapters: list[AdapterWeight] | None = Field(None, max_length=64)
    add_special_tokens: Flag
    user: str | None = None
    truncate_prompt_tokens: Annotated[Any, neutral()] = None


class EmbeddingUsage(ResponseModel):
    """Tokens of all inputs; there is no output."""

    prompt_tokens: int
    total_tokens: int


class Embedding(ResponseModel):
    """One input's vector of length 1, or the base64 of its little-endian float32 bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(ResponseModel):
    """One vector per input, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    loramux: ServedBy
