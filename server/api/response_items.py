"""The items of a response as they grow: reasoning, messages and calls, in the order in which the model wrote them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from loramux.server.api.conversation import ReadCall
from loramux.server.api.schemas.responses import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)

Kind = Literal["content", "reasoning", "call"]
Event = tuple[str, dict[str, Any]]
"""An event's type and its fields."""

_NAMES: dict[Kind, tuple[str, str]] = {
    "content": ("msg", "response.output_text"),
    "reasoning": ("rs", "response.reasoning_text"),
    "call": ("fc", "response.function_call_arguments"),
}
"""What an item's id begins with, and what the events of its text do."""


@dataclass(slots=True)
class _Item:
    """One item: text, or a call with its arguments' text."""

    kind: Kind
    id: str
    index: int
    call: ReadCall | None = None
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def part(self, text: str) -> OutputText | ReasoningText:
        """The only part of a message or of reasoning."""
        if self.kind == "content":
            return OutputText(type="output_text", text=text, annotations=[], logprobs=[])
        return ReasoningText(type="reasoning_text", text=text)

    def shown(self, status: ItemStatus) -> OutputItem:
        """The item as it is; one that is in progress has nothing in it yet."""
        text = "" if status == "in_progress" else self.text
        if self.call is not None:
            return OutputCall(
                id=self.id, type="function_call", call_id=self.call.id or "", name=self.call.name or "",
                arguments=text, status=status,
            )  # fmt: skip
        part = self.part(text)
        if isinstance(part, OutputText):
            content = [] if status == "in_progress" else [part]
            return OutputMessage(id=self.id, type="message", role="assistant", status=status, content=content)
        thoughts = [] if status == "in_progress" else [part]
        return OutputReasoning(id=self.id, type="reasoning", summary=[], content=thoughts, status=status)


class ResponseItems:
    """All items of one response. Only the last of them grows; what begins another one ends it."""

    def __init__(self, response: str) -> None:
        """`response` is a name that no other response has."""
        self._response = response
        self._items: list[_Item] = []
        self._is_open = False

    def __bool__(self) -> bool:
        return bool(self._items)

    def shown(self, last: ItemStatus) -> list[OutputItem]:
        """The items; `last` is the status of the one that was not ended."""
        return [item.shown(last if self._is_open and item is self._items[-1] else "completed") for item in self._items]

    def grow(self, step: tuple[Literal["content", "reasoning"], str] | ReadCall) -> Iterator[Event]:
        """Takes in what the answer grew by."""
        call = step if isinstance(step, ReadCall) else None
        kind: Kind = "call" if isinstance(step, ReadCall) else step[0]
        begins = call is not None and call.id is not None
        if begins or not self._is_open or self._items[-1].kind != kind:
            yield from self.close("completed")
            yield from self._open(kind, call)
        item = self._items[-1]
        text = step.arguments if isinstance(step, ReadCall) else step[1]
        item.parts.append(text)
        if text:
            extra: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
            yield self._about(f"{_NAMES[kind][1]}.delta", item, delta=text, **extra)

    def _open(self, kind: Kind, call: ReadCall | None) -> Iterator[Event]:
        index = len(self._items)
        name = f"{_NAMES[kind][0]}_{self._response}" + (f"_{index}" if index else "")
        item = _Item(kind, name, index, call)
        self._items.append(item)
        self._is_open = True
        yield "response.output_item.added", {"output_index": index, "item": item.shown("in_progress")}
        if call is None:
            yield self._about("response.content_part.added", item, part=item.part(""))

    def close(self, status: ItemStatus) -> Iterator[Event]:
        """Ends the last item, if it is not."""
        if not self._is_open:
            return
        item = self._items[-1]
        self._is_open = status != "completed"
        done = f"{_NAMES[item.kind][1]}.done"
        if item.call is not None:
            yield self._about(done, item, arguments=item.text)
        else:
            extra: dict[str, Any] = {"logprobs": []} if item.kind == "content" else {}
            yield self._about(done, item, text=item.text, **extra)
            yield self._about("response.content_part.done", item, part=item.part(item.text))
        yield "response.output_item.done", {"output_index": item.index, "item": item.shown(status)}

    @staticmethod
    def _about(kind: str, item: _Item, **fields: Any) -> Event:
        """An event inside an item."""
        place = {"item_id": item.id, "output_index": item.index}
        return kind, {**place, **({} if item.kind == "call" else {"content_index": 0}), **fields}
