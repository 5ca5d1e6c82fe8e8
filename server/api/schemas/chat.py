"""`POST /v1/chat/completions`, with tools."""

import json
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
    example_of,
    neutral,
)
from loramux.server.api.schemas.logprobs import ChatLogprobs
from loramux.server.api.schemas.prompts import TemplateFields, never
from loramux.server.api.schemas.structured import Schema, StructuredFields

MAX_MESSAGES = 2048
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_DESCRIPTION = 1 << 15
MAX_NAME = 256
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


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
    """Answers of functions came before answers of tools."""
    if role == "function":
        raise PydanticCustomError(
            "unsupported", "'function' messages are not supported; send the result as a 'tool' message with the "
            "tool_call_id of the call",
        )  # fmt: skip
    return role


def _only_functions(kind: Any) -> Any:
    """Other kinds of tools and calls are refused by their type."""
    if kind != "function":
        raise PydanticCustomError(
            "unsupported", "{kind} is not supported; send tools of type function", {"kind": repr(kind)[:64]}
        )
    return kind


FunctionType = Annotated[Literal["function"], BeforeValidator(_only_functions)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def known_choice(choice: Any) -> Any:
    """Choices of anything but a function are refused by their type."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind not in (None, "function"):
        raise PydanticCustomError(
            "unsupported", "{kind} is not supported; send none, auto, required or a function, and in `tools` only what "
            "may be called", {"kind": repr(kind)[:64]},
        )  # fmt: skip
    return choice


class TypedByFunction(RequestModel):
    """Something that has a type, which can only be `function`."""

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, value: Any) -> Any:
        """What has another type is wrong in its type, whatever fields that type has."""
        if isinstance(value, dict) and value.get("type", "function") not in ("function", None):
            _only_functions(value["type"])
        return value


class FunctionSpec(RequestModel):
    """A function that the model may call. Without `parameters` it takes none; `strict` holds the model to them."""

    name: FunctionName
    description: Annotated[Text, Field(max_length=MAX_DESCRIPTION)] | None = None
    parameters: Schema | None = None
    strict: Flag

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Arguments are always an object."""
        if value and value.get("type", "object") != "object":
            raise ValueError('must be the JSON schema of an object: {"type": "object", "properties": ...}')
        return value

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        return self.parameters or NO_PARAMETERS


class Tool(TypedByFunction):
    """A tool: a function."""

    type: FunctionType
    function: FunctionSpec

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees, in the order that templates were trained with."""
        spec = self.function
        function: dict[str, Any] = {"name": spec.name}
        if spec.description is not None:
            function["description"] = spec.description
        return {"type": "function", "function": {**function, "parameters": spec.schema_of_arguments}}


class CalledFunction(RequestModel):
    """What was called, and with what: a JSON object as text, if the model wrote one."""

    name: Text = Field(max_length=MAX_NAME)
    arguments: Text

    def for_template(self) -> dict[str, Any]:
        """The arguments as transformers' templates take them, as an object; text that is none stays as it is."""
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        return {"name": self.name, "arguments": found if isinstance(found, dict) else self.arguments}


class ToolCall(TypedByFunction):
    """A call of an earlier answer. `index` comes with what was put together from a stream."""

    id: Text = Field(min_length=1, max_length=MAX_NAME)
    type: FunctionType = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees."""
        return {"id": self.id, "type": "function", "function": self.function.for_template()}


class ChosenName(RequestModel):
    """The function to call."""

    name: FunctionName


class ToolChoice(TypedByFunction):
    """A function that must be called."""

    type: FunctionType
    function: ChosenName


def check_names(names: list[str]) -> None:
    """Raises ValueError for functions of one name, which a call could not tell apart."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"has two functions with the name {twice!r}")


def check_chosen(chosen: str | None, names: list[str]) -> None:
    """Raises ValueError where a call must be made, of the function `chosen` if there is one, and cannot be."""
    if not names:
        raise ValueError("needs `tools`")
    if chosen is not None and chosen not in names:
        raise ValueError(f"names {chosen!r}, which is not among the tools")


class Message(RequestModel):
    """One turn. Of what clients replay from an earlier answer, a refusal is what was said instead of content, and
    annotations are about the text and no part of the prompt."""

    role: Annotated[Literal["developer", "system", "user", "assistant", "tool"], BeforeValidator(_known_role)]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Text | None = None
    tool_call_id: Annotated[Text, Field(max_length=MAX_NAME)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _of_its_role(self) -> "Message":
        """Calls and reasoning are the assistant's; a tool answers a call."""
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("needs `tool_call_id`, the id of the call that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError("has a `tool_call_id`, which only messages of the role tool have")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning or self.refusal):
            raise ValueError("has tool_calls, reasoning or a refusal, which only messages of the role assistant have")
        return self

    def text(self) -> str:
        """The content as one string; several parts are joined by newlines."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees; `developer` is the newer word for `system`. Parts stay parts.

        Reasoning has the two names that templates know it by.
        """
        content: Any = self.text()
        if isinstance(self.content, list):
            content = [{"type": "text", "text": part.text} for part in self.content]
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if reasoning := self.reasoning_content or self.reasoning:
            turn["reasoning_content"] = reasoning
            if not (self.tool_calls and self.text()):  # templates that read this name refuse it beside both
                turn["thinking"] = reasoning
        return turn


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What the chat template sees of a conversation: a tool's answer says which function it is of, if that is known."""
    turns, names = [], {}
    for message in messages:
        names.update({call.id: call.function.name for call in message.tool_calls or ()})
        turn = message.for_template()
        if message.tool_call_id in names:
            turn.setdefault("name", names[message.tool_call_id])
        turns.append(turn)
    return turns


def query_of(messages: Sequence[Message]) -> str:
    """What is routed of a conversation: the last user turn, or the last turn where no user spoke."""
    return next((m for m in reversed(messages) if m.role == "user"), messages[-1]).text()


class ChatRequest(GenerationRequest, TemplateFields, StructuredFields):
    """The body. Without a limit the answer may fill the rest of the context."""

    model_config = example_of({"model": "reverse", "messages": [{"role": "user", "content": "Reverse this: planet"}]})

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    parallel_tool_calls: Flag

    logprobs: Flag
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | ToolChoice | None, BeforeValidator(known_choice)] = (
        None
    )
    functions: Annotated[Any, never("is not supported; send `tools`, each {type: function, function: ...}", [])] = None
    function_call: Annotated[Any, never("is not supported; send `tool_choice`", "none", "auto")] = None
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

    @field_validator("tools")
    @classmethod
    def _named_once(cls, value: list[Tool] | None) -> list[Tool] | None:
        """A call names its function."""
        check_names([tool.function.name for tool in value or ()])
        return value

    @field_validator("tool_choice")
    @classmethod
    def _among_tools(cls, value: str | ToolChoice | None, info: ValidationInfo) -> str | ToolChoice | None:
        """A call that must be made needs something to call."""
        if "tools" in info.data and value not in (None, "none", "auto"):
            chosen = value.function.name if isinstance(value, ToolChoice) else None
            check_chosen(chosen, [tool.function.name for tool in info.data["tools"] or ()])
        return value

    @property
    def choice(self) -> str:
        """`none`, `auto` or `required`; `named` for a function that must be called."""
        if isinstance(self.tool_choice, ToolChoice):
            return "named"
        return self.tool_choice or "auto"

    @property
    def callable_functions(self) -> list[FunctionSpec]:
        """The functions that the answer may call."""
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [tool.function for tool in self.tools or () if chosen in (None, tool.function.name)]

    @property
    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest.wanted_logprobs`."""
        return self.top_logprobs or 0 if self.logprobs else None


class AnsweredFunction(ResponseModel):
    """What is called. In a stream the arguments come in parts, and the name with the first."""

    name: str | None = None
    arguments: str


class AnsweredCall(ResponseModel):
    """A call. In a stream `index` says which one grows, and only the first part has `id` and `type`."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: AnsweredFunction


class AnswerMessage(ResponseModel):
    """The assistant's turn. `reasoning` and `reasoning_content` are two names of the same text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


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
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


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
