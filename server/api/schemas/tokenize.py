"""`/tokenize` and `/detokenize`, as vLLM has them."""

from typing import Annotated

from pydantic import Field

from loramux.server.api.schemas.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from loramux.server.api.schemas.common import Flag, RequestModel, ResponseModel, Text, example_of
from loramux.server.api.schemas.prompts import TemplateFields

ModelName = Annotated[Text, Field(min_length=1, max_length=512)]


class TokenizeRequest(TemplateFields):
    """A `prompt`, or `messages` with what their template takes. Without `model` it is the base.

    `add_special_tokens` is true for a prompt and false for messages unless it is given: templates write their own.
    """

    model_config = example_of({"prompt": "Reverse this: planet"})

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    return_token_strs: Flag


class Tokens(ResponseModel):
    """The ids. `token_strs` are the vocabulary's own writing of them, where they were asked for."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    """Ids of any model here: all share the base's vocabulary."""

    model_config = example_of({"tokens": [5, 6, 7]})

    model: ModelName | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(fail_fast=True)


class Detokenized(ResponseModel):
    """The text, special tokens included."""

    prompt: str
