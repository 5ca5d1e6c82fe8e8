"""`POST /v1/responses`: the part of OpenAI's Responses API that needs nothing stored."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from loramux.server.api.schemas.chat import (
    MAX_MESSAGES,
    MAX_NAME,
    MAX_TOOLS,
    CalledFunction,
    ChatRequest,
    FunctionName,
    FunctionSpec,
    FunctionType,
    Message,
    TextPart,
    ToolCall,
    TypedByFunction,
    check_chosen,
    check_names,
    known_choice,
)
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
    example_of,
    neutral,
)
from loramux.server.api.schemas.prompts import MAX_VARIABLES, JsonObject, never
from loramux.server.api.schemas.structured import TextFormat

SHARED = (
    "model", "temperature", "top_p", "stream", "adapters", "router", "top_k", "min_p", "seed", "ignore_eos",
    "cache_salt", "chat_template_kwargs", "parallel_tool_calls",
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
    """Messages, functions and reasoning: everything else is a tool of OpenAI's own."""
    if kind != "message":
        raise PydanticCustomError(
            "unsupported", "{kind} items are not supported; send messages, function calls and their outputs",
            {"kind": repr(kind)[:64]},
        )  # fmt: skip
    return kind


Parts = Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class InputItem(RequestModel):
    """One turn, as a client writes it or as an earlier answer had it (then with `id` and `status`)."""

    type: Annotated[Literal["message"] | None, BeforeValidator(_item_type)] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: Text | Parts
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
        return Message(role=self.role, content=_content(self.content))


class CallItem(RequestModel):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Text = Field(min_length=1, max_length=MAX_NAME)
    name: Text = Field(max_length=MAX_NAME)
    arguments: Text
    id: Text | None = None
    status: ItemStatus | None = None

    def call(self) -> ToolCall:
        """The call as chat completions know it."""
        return ToolCall(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))


class CallOutputItem(RequestModel):
    """What a function answered."""

    type: Literal["function_call_output"]
    call_id: Text = Field(min_length=1, max_length=MAX_NAME)
    output: Text | Parts
    name: Text | None = Field(None, max_length=MAX_NAME)
    id: Text | None = None
    status: ItemStatus | None = None

    def message(self) -> Message:
        """The turn as chat completions know it."""
        return Message(role="tool", content=_content(self.output), tool_call_id=self.call_id, name=self.name)


class ReasoningPart(RequestModel):
    """A piece of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(RequestModel):
    """Reasoning of an earlier answer: a part of the turn that follows it."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    content: Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    encrypted_content: Annotated[None, never("is not supported; send reasoning as its text, in `content`")] = None
    id: Text | None = None
    status: ItemStatus | None = None

    def text(self) -> str:
        """The reasoning, or the summary where there is nothing else."""
        return "\n".join(part.text for part in self.content or self.summary)


def _content(content: str | list[InputPart]) -> str | list[TextPart]:
    """The content as chat completions know it."""
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _item_kind(value: Any) -> str:
    """Which item it is; what is none of them is refused as a message of the wrong type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{kind}-item" if kind in ("function_call", "function_call_output", "reasoning") else "message-item"


Item = Annotated[
    Annotated[InputItem, Tag("message-item")]
    | Annotated[CallItem, Tag("function_call-item")]
    | Annotated[CallOutputItem, Tag("function_call_output-item")]
    | Annotated[ReasoningItem, Tag("reasoning-item")],
    Discriminator(_item_kind),
]


def turns_of_items(items: Sequence[InputItem | CallItem | CallOutputItem | ReasoningItem]) -> list[Message]:
    """The turns that the items are: calls belong to the assistant's text before them, reasoning to what follows it.

    Reasoning that the assistant did not go on from is left out.
    """
    turns: list[Message] = []
    reasoning: str | None = None
    for item in items:
        if isinstance(item, ReasoningItem):
            reasoning = item.text()
            continue
        if isinstance(item, CallItem):
            last = turns[-1] if turns and reasoning is None else None
            if last is None or last.role != "assistant" or len(last.tool_calls or ()) >= MAX_TOOLS:
                last = Message(role="assistant", content="")
                turns.append(last)
            last.tool_calls = [*(last.tool_calls or ()), item.call()]
        else:
            turns.append(item.message())
        if turns[-1].role == "assistant" and reasoning is not None:
            turns[-1].reasoning_content = reasoning
        reasoning = None
    return turns


class FunctionTool(FunctionSpec, TypedByFunction):
    """A function that the model may call, its fields beside the type."""

    type: FunctionType

    def as_tool(self) -> dict[str, Any]:
        """The tool as chat completions know it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class ChosenFunction(TypedByFunction):
    """A function that must be called."""

    type: FunctionType
    name: FunctionName


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

    model_config = example_of({"model": "reverse", "input": "Reverse this: planet"})

    model: Text = Field(min_length=1, max_length=512)
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True)]
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
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: Flag
    truncation: Annotated[Any, neutral("disabled")] = None
    include: Annotated[Any, neutral([])] = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenFunction | None, BeforeValidator(known_choice)
    ] = None
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

    @property
    def text_format(self) -> dict[str, Any]:
        """`text.format` as the answer repeats it."""
        given = self.text.format if self.text is not None else None
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)

    @field_validator("tools")
    @classmethod
    def _named_once(cls, value: list[FunctionTool] | None) -> list[FunctionTool] | None:
        """A call names its function."""
        check_names([tool.name for tool in value or ()])
        return value

    @field_validator("tool_choice")
    @classmethod
    def _among_tools(cls, value: str | ChosenFunction | None, info: ValidationInfo) -> str | ChosenFunction | None:
        """A call that must be made needs something to call."""
        if "tools" in info.data and value not in (None, "none", "auto"):
            chosen = value.name if isinstance(value, ChosenFunction) else None
            check_chosen(chosen, [tool.name for tool in info.data["tools"] or ()])
        return value

    def as_chat(self) -> ChatRequest:
        """The same request of chat completions, where sampling and prompts are at home."""
        turns = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            turns.append(Message(role="user", content=self.input))
        else:
            turns.extend(turns_of_items(self.input))
        same = {name: getattr(self, name) for name in SHARED}
        if self.text is not None and self.text.format is not None:
            same["response_format"] = self.text.format.as_response_format()
        if isinstance(self.tool_choice, ChosenFunction):
            same["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            same["tool_choice"] = self.tool_choice
        same["tools"] = [tool.as_tool() for tool in self.tools or ()]
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


class OutputCall(ResponseModel):
    """A call of a function, which the client makes."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ReasoningText(ResponseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(ResponseModel):
    """What the model thought. There is no summary of it."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]
    status: ItemStatus


OutputItem = OutputMessage | OutputCall | OutputReasoning


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
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: str
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    loramux: ServedBy | None = None
