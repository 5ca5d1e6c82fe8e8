"""`POST /v1/responses`: the part of OpenAI's Responses API that needs nothing stored."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from loramux.server.api.schemas.chat import MAX_MESSAGES, ChatRequest, Message, TextPart
from loramux.server.api.schemas.common import (
    INT64_MAX,
    MAX_PARTS,
    AdapterWeight,
    Flag,
    RequestModel,
    ResponseModel,
    RouterParams,
    ServedBy,
    Text,
    neutral,
)
from loramux.server.api.schemas.prompts import MAX_VARIABLES, JsonObject, never

SHARED = (
    "model", "temperature", "top_p", "stream", "adapters", "router", "top_k", "min_p", "seed", "ignore_eos",
    "cache_salt", "chat_template_kwargs",
)  # fmt: skip
"""Fields that mean the same in chat completions."""
TEXT_PARTS = ("input_text", "output_text", "text")
STORED = "responses are not stored here; send the whole conversation as `input`"

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]
Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
]


def _text_type(kind: Any) -> Any:
    """Parts other than text are refused by their type; nothing they point to is ever fetched."""
    if kind not in TEXT_PARTS:
        raise PydanticCustomError(
            "unsupported", "{kind} parts are not supported; send input_text parts", {"kind": repr(kind)[:64]}
        )
    return kind


class InputPart(RequestModel):
    """A piece of text. `annotations` and `logprobs` come with what is replayed from an earlier answer."""

    type: Annotated[Literal["input_text", "output_text", "text"], BeforeValidator(_text_type)]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    logprobs: Annotated[Any, neutral([])] = None

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, value: Any) -> Any:
        """A part of another type is wrong in its type, whatever fields that type has."""
        if isinstance(value, dict) and value.get("type") not in (None, *TEXT_PARTS):
            return {"type": value["type"], "text": ""}
        return value


def _item_type(kind: Any) -> Any:
    """Only messages: function calls come with tools, everything else is a tool of OpenAI's own."""
    if kind != "message":
        raise PydanticCustomError(
            "unsupported", "{kind} items are not supported yet; send messages", {"kind": repr(kind)[:64]}
        )
    return kind


class InputItem(RequestModel):
    """One turn, as a client writes it or as an earlier answer had it (then with `id` and `status`)."""

    type: Annotated[Literal["message"], BeforeValidator(_item_type)] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(max_length=MAX_PARTS)]
    id: Text | None = None
    status: ItemStatus | None = None
    phase: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, value: Any) -> Any:
        """An item of another type is wrong in its type."""
        if isinstance(value, dict) and value.get("type") not in (None, "message"):
            return {"type": value["type"], "role": "user", "content": ""}
        if isinstance(value, dict) and value.get("type", "") is None:
            return {key: item for key, item in value.items() if key != "type"}
        return value

    def message(self) -> Message:
        """The turn as chat completions know it."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        return Message(role=self.role, content=[TextPart(type="text", text=part.text) for part in self.content])


class TextFormat(RequestModel):
    """Plain text."""

    type: Annotated[Any, neutral("text")] = None


class TextOptions(RequestModel):
    """How the answer's text is written."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, neutral("medium")] = None


class ResponseStreamOptions(RequestModel):
    """Nothing is added to a stream to hide its lengths, whatever is asked."""

    include_obfuscation: Annotated[Any, neutral(False)] = None


class ResponsesRequest(RequestModel):
    """The body. `store` is false unless it is given, and can be nothing else; `instructions` are the first turn.

    The last block of fields is this server's own, as in chat completions.
    """

    model: Text = Field(min_length=1, max_length=512)
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: Flag
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    metadata: Metadata | None = None

    user: Text | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: Flag
    truncation: Annotated[Any, neutral("disabled")] = None
    include: Annotated[Any, neutral([])] = None
    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("auto", "none")] = None
    max_tool_calls: Annotated[Any, neutral()] = None
    reasoning: Annotated[Any, neutral({})] = None
    top_logprobs: Annotated[Any, neutral(0)] = None
    prompt: Annotated[None, never("stored prompts are not supported; send `input`")] = None
    store: Annotated[Literal[False] | None, never(STORED, False)] = None
    previous_response_id: Annotated[None, never(STORED)] = None
    conversation: Annotated[None, never(STORED)] = None
    background: Annotated[Any, neutral(False)] = None

    adapters: list[AdapterWeight] | None = Field(None, max_length=64)
    router: RouterParams | None = None
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    ignore_eos: Flag
    cache_salt: Text | None = Field(None, min_length=1, max_length=256)
    chat_template_kwargs: Annotated[JsonObject | None, Field(max_length=MAX_VARIABLES)] = None

    def as_chat(self) -> ChatRequest:
        """The same request of chat completions, where sampling and prompts are at home."""
        turns = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            turns.append(Message(role="user", content=self.input))
        else:
            turns.extend(item.message() for item in self.input)
        same = {name: getattr(self, name) for name in SHARED}
        return ChatRequest.model_validate({**same, "messages": turns, "max_completion_tokens": self.max_output_tokens})


class OutputText(ResponseModel):
    """The text of an answer's message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(ResponseModel):
    """The assistant's turn."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class InputDetails(ResponseModel):
    """Of the tokens in."""

    cached_tokens: int


class OutputDetails(ResponseModel):
    """Of the tokens out."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """Tokens in and out."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(ResponseModel):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponseError(ResponseModel):
    """Why an answer failed after it had begun."""

    code: str
    message: str


class ResponseObject(ResponseModel):
    """A response, at any moment of its life."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: str
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    loramux: ServedBy | None = None
