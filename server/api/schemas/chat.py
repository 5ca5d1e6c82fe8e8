"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from loramux.server.api.schemas.common import (
    INT64_MAX,
    MAX_PARTS,
    Flag,
    GenerationRequest,
    RequestModel,
    ResponseModel,
    ServedBy,
    Text,
    Usage,
    neutral,
)
from loramux.server.api.schemas.logprobs import ChatLogprobs
from loramux.server.api.schemas.prompts import TemplateFields

MAX_MESSAGES = 2048
MAX_TOP_LOGPROBS = 20


def _only_text(kind: Any) -> Any:
    """Content parts other than text are refused by their type; nothing they point to is ever fetched."""
    if kind != "text":
        raise PydanticCustomError(
            "unsupported", "{kind} parts are not supported; send text parts", {"kind": repr(kind)[:64]}
        )
    return kind


class TextPart(RequestModel):
    """A piece of text."""

    type: Annotated[Literal["text"], BeforeValidator(_only_text)]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, value: Any) -> Any:
        """A part of another type is wrong in its type, whatever fields that type has."""
        if isinstance(value, dict) and value.get("type", "text") != "text":
            return {"type": value["type"], "text": ""}
        return value


def _known_role(role: Any) -> Any:
    """Tool turns come with tool calling."""
    if role in ("tool", "function"):
        raise PydanticCustomError("unsupported", "{role} messages are not supported yet", {"role": repr(role)})
    return role


class Message(RequestModel):
    """One turn. The fields that clients replay from an earlier answer are accepted while they are empty."""

    role: Annotated[Literal["developer", "system", "user", "assistant"], BeforeValidator(_known_role)]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Text | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None
    tool_calls: Annotated[Any, neutral([])] = None

    def text(self) -> str:
        """The content as one string; several parts are joined by newlines."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees; `developer` is the newer word for `system`. Parts stay parts."""
        content: Any = self.text()
        if isinstance(self.content, list):
            content = [{"type": "text", "text": part.text} for part in self.content]
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        return turn


def query_of(messages: Sequence[Message]) -> str:
    """What is routed of a conversation: the last user turn, or the last turn where no user spoke."""
    return next((m for m in reversed(messages) if m.role == "user"), messages[-1]).text()


class ChatRequest(GenerationRequest, TemplateFields):
    """The body. Without a limit the answer may fill the rest of the context."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    parallel_tool_calls: Flag

    logprobs: Flag
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    audio: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    reasoning_effort: Annotated[Any, neutral()] = None
    verbosity: Annotated[Any, neutral()] = None
    web_search_options: Annotated[Any, neutral()] = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        """They are shown inside `logprobs`."""
        if value and not info.data.get("logprobs"):
            raise ValueError("goes with `logprobs: true`")
        return value

    @property
    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest.wanted_logprobs`."""
        return self.top_logprobs or 0 if self.logprobs else None


class AnswerMessage(ResponseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    loramux: ServedBy


class TurnDelta(ResponseModel):
    """What a chunk adds to the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(ResponseModel):
    """One answer's part of a chunk."""

    index: int
    delta: TurnDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(ResponseModel):
    """One event of a stream. `loramux` and `prompt_token_ids` come with the first."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    loramux: ServedBy | None = None
