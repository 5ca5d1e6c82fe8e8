"""What chat completions and responses share: a conversation's prompt, what holds its answer, and how that is read."""

import secrets
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

from loramux.server.api.answer_formats import CallStyle
from loramux.server.api.generation import Delta, too_long
from loramux.server.api.logprobs import TokenScore
from loramux.server.api.parsing import Piece, Reader
from loramux.server.api.rendering import Prompt, PromptTooLongError
from loramux.server.api.schemas.chat import ChatRequest, turns_of
from loramux.server.api.state import ServerState
from loramux.server.api.structured import check_constraint, one_constraint
from loramux.server.api.tools import AnswerGrammar, offered_tools
from loramux.server.engine.protocol import Constraint


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A call, or what one grew by: then without `id` and `name` but for the first time."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Growth:
    """What an answer's message grew by: content, reasoning, and calls, each as often as they follow one another.

    `scores` are those of the content's tokens.
    """

    steps: Sequence[tuple[Literal["content", "reasoning"], str] | ReadCall] = ()
    scores: Sequence[TokenScore] = ()

    @property
    def calls(self) -> list[ReadCall]:
        """What the calls grew by."""
        return [step for step in self.steps if isinstance(step, ReadCall)]

    def text(self, kind: Literal["content", "reasoning"]) -> str:
        """What the content or the reasoning grew by."""
        return "".join(step[1] for step in self.steps if not isinstance(step, ReadCall) and step[0] == kind)


class ChoiceReader:
    """Reads one choice's deltas. Without a `reader` all of them are content.

    `reasoning_tokens` counts the tokens of reasoning and of its marks, in steps of the deltas; a mark that is no token
    of its own is counted from where it is known to be one.
    """

    def __init__(self, reader: Reader | None, style: CallStyle | None, *, ends_with_call: bool) -> None:
        self._reader = reader
        self._prefix, self._id_chars = (style.id_prefix, style.id_chars) if style else ("call_", 24)
        self._ends_with_call = ends_with_call
        self._spans: list[tuple[int, int]] = []
        self._unplaced: list[TokenScore] = []
        self._content: list[str] = []
        self._ids: list[str] = []
        self.scores: list[TokenScore] = []
        self.reasoning_tokens = 0

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._reader.reasoning if self._reader else ""

    @property
    def calls(self) -> list[ReadCall]:
        """The calls so far."""
        made = self._reader.calls if self._reader else []
        return [ReadCall(i, id, call.name, call.arguments)
                for i, (id, call) in enumerate(zip(self._ids, made, strict=True))]  # fmt: skip

    def finish_reason(self, reason: str | None) -> str | None:
        """`tool_calls` where the model ended by calling; as with OpenAI `stop` where it had to call one function."""
        return "tool_calls" if reason == "stop" and self._ids and self._ends_with_call else reason

    def take(self, delta: Delta) -> Growth:
        """What the message grew by."""
        if self._reader is None:
            self._content.append(delta.text)
            self.scores.extend(delta.scores)
            return Growth([("content", delta.text)] if delta.text else [], delta.scores)
        reader, ended = self._reader, delta.finish_reason is not None
        reasoned = reader.is_reasoning
        pieces = reader.feed(delta.text)
        if reasoned or reader.is_reasoning:
            self.reasoning_tokens += len(delta.token_ids)
        if ended:
            pieces += reader.finish()
        grown = Growth([*self._steps(pieces)], self._place(reader, delta.scores, ended=ended))
        self._content.append(grown.text("content"))
        self.scores.extend(grown.scores)
        return grown

    def _steps(self, pieces: Sequence[Piece]) -> Iterator[tuple[Literal["content", "reasoning"], str] | ReadCall]:
        """The pieces, those of one kind as one; calls get their ids."""
        for (kind, call), group in groupby(pieces, lambda piece: (piece.kind.replace("arguments", "call"), piece.call)):
            same = list(group)
            text = "".join(piece.text for piece in same if piece.kind != "call")
            if kind == "content":
                self._spans.extend((piece.start, piece.start + len(piece.text)) for piece in same)
            if kind == "content" or kind == "reasoning":
                yield kind, text
            elif same[0].kind == "call":
                self._ids.append(self._prefix + secrets.token_hex(self._id_chars)[: self._id_chars])
                yield ReadCall(call, self._ids[-1], same[0].text, text)
            else:
                yield ReadCall(call, None, None, text)

    def _place(self, reader: Reader, scores: Sequence[TokenScore], *, ended: bool) -> list[TokenScore]:
        """The scores of tokens that begin in content, as far as that is known. What ends an answer that is nothing but
        content belongs to it."""
        self._unplaced.extend(scores)
        count, decided = len(self._unplaced), reader.decided
        if not ended:
            count = next((i for i, score in enumerate(self._unplaced) if score.offset >= decided), count)
        due, self._unplaced = self._unplaced[:count], self._unplaced[count:]
        plain = ended and not self._ids and not reader.reasoning
        found = []
        for score in due:
            while len(self._spans) > 1 and self._spans[0][1] <= score.offset:
                del self._spans[0]
            if (self._spans and self._spans[0][0] <= score.offset < self._spans[0][1]) or (
                plain and score.offset >= decided
            ):
                found.append(score)
        return found


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request's prompt, and what is known of the answer beforehand.

    `hidden` are the tokens that the answer's text leaves out: see `Renderer.hidden_tokens`. `has_reasoning` says if
    the model's answers may have any.
    """

    prompt: Prompt
    constraint: Constraint | None
    hidden: Set[int] | None
    readers: Sequence[ChoiceReader]
    has_reasoning: bool


async def prepare(
    state: ServerState, body: ChatRequest, tenant: str, copies: int = 1, *, called: str | None = None
) -> Conversation:
    """The conversation of a request for `copies` answers. `called` is the name of the field that holds the content to a
    format, where it is not the body's own. Raises a 400 for what the model or its template cannot do."""
    renderer = state.renderer
    format = renderer.format
    tools = offered_tools(body, format)
    options = replace(body.template_options, tools=tools)
    most = state.require_engine().max_model_len
    try:
        prompt = await renderer.in_thread(lambda: renderer.prompt(turns_of(body.messages), options, most=most))
    except PromptTooLongError as error:
        raise too_long(error.tokens, most, "messages") from None
    readers: list[Reader | None] = [None] * copies
    given = one_constraint(body)
    field_name, constraint = given or ("tools", None)
    field_name = called or field_name
    if format is not None:
        first = format.reader(prompt.begun, tools)
        readers = [first, *(format.reader(prompt.begun, tools) for _ in range(1, copies))]
        grammar = AnswerGrammar(format, renderer.marks)
        held = await renderer.in_thread(
            partial(
                grammar.constraint, body, offered=tools is not None, is_reasoning=first.is_reasoning, given=constraint
            )
        )
        if tools is not None and held is not constraint:
            field_name = "tools"
        constraint = held
    if constraint is not None:
        constraint = await check_constraint(state, constraint, field_name, tenant=tenant)
    style = format.style if format else None
    return Conversation(
        prompt, constraint, renderer.hidden_tokens(offered=tools is not None),
        [ChoiceReader(reader, style, ends_with_call=body.choice != "named") for reader in readers],
        format is not None and format.reasoning is not None,
    )  # fmt: skip
