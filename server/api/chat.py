"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import From
from loramux.server.api.context import arrival, request_id
from loramux.server.api.conversation import Conversation, ReadCall, prepare
from loramux.server.api.generation import Delta, Generation, check_request, count_choices, sampling_params
from loramux.server.api.logprobs import TokenScore, chat_logprobs
from loramux.server.api.resolve import Query, Selection, select
from loramux.server.api.schemas.chat import (
    AnsweredCall,
    AnsweredFunction,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    TurnDelta,
    query_of,
)
from loramux.server.api.schemas.common import CompletionTokensDetails, Usage
from loramux.server.api.schemas.logprobs import ChatLogprobs
from loramux.server.api.state import State
from loramux.server.api.streaming import event
from loramux.server.api.token_bytes import TokenBytes

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(request: Request, body: ChatRequest, state: State, caller: From) -> Response:
    """Answers a conversation, in one piece or as a stream of server-sent events."""
    check_request(body, state.vocab_size)
    id = f"chatcmpl-{request_id(request)}"
    query = Query(request_id(request), lambda: query_of(body.messages), body.router, body.cache_salt or "", caller)
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, body.model, body.adapters, query))
        copies = count_choices(state, body.n or 1, 1, "n")
        talk = await prepare(state, body, caller.tenant, copies)
        prompt = talk.prompt.token_ids
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        sampling = sampling_params(state, body, len(prompt), wanted=wanted, default=None, constraint=talk.constraint)
        generation = Generation(
            state, selection, body, request_id=id, prompts=[prompt], sampling=[sampling], start=arrival(request),
            copies=copies, hidden=talk.hidden,
        )  # fmt: skip
        answer = ChatAnswer(id, selection, body, generation, talk, state.renderer.token_bytes)
        return await answer.respond(request, resources, stream=bool(body.stream))


class ChatAnswer(Answer):
    """A chat completion: one conversation's choices."""

    def __init__(
        self,
        id: str,
        selection: Selection,
        body: ChatRequest,
        generation: Generation,
        talk: Conversation,
        words: TokenBytes,
    ) -> None:
        super().__init__(id, selection, body, generation)
        self._readers = talk.readers
        self._counts_reasoning = talk.has_reasoning
        self._want_logprobs = bool(body.logprobs)
        self._words = words

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs | None:
        return chat_logprobs(scores, self._words) if self._want_logprobs else None

    def read(self, delta: Delta) -> None:
        """See `Answer.read`."""
        self._readers[delta.index].take(delta)

    @property
    def usage(self) -> Usage:
        """See `Answer.usage`; where the model's format has reasoning, its tokens are told."""
        usage = self.generation.usage
        if not self._counts_reasoning:
            return usage
        details = CompletionTokensDetails(reasoning_tokens=sum(reader.reasoning_tokens for reader in self._readers))
        return usage.model_copy(update={"completion_tokens_details": details})

    def whole(self) -> ChatCompletion:
        """See `Answer.whole`."""
        turns = []
        for choice, reader in zip(self.generation.choices, self._readers, strict=True):
            ids: dict[str, Any] = {"token_ids": choice.token_ids} if self._want_ids else {}
            calls = reader.calls
            content = None if calls and not reader.content else reader.content
            message = AnswerMessage(
                role="assistant", content=content, refusal=None, **_beside_content(reader.reasoning, calls, index=False)
            )
            turn = ChatChoice(
                index=choice.index,
                message=message,
                logprobs=self._logprobs(reader.scores),
                finish_reason=reader.finish_reason(choice.finish_reason),
                stop_reason=choice.stop_reason,
                **ids,
            )
            turns.append(turn)
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=turns,
            usage=self.usage,
            loramux=self.selection.served_by,
            **self._prompt_ids(),
        )

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.generation.choices[0].prompt)} if self._want_ids else {}

    def _chunk(self, choices: list[ChatChunkChoice], **extra: Any) -> bytes:
        fields = {**self._common, **self._usage(), **extra}
        return event(ChatChunk(**fields, object="chat.completion.chunk", choices=choices))

    def opening(self) -> list[bytes]:
        """See `Answer.opening`: each choice's role, and with the first of them what serves the request."""
        turn = TurnDelta(role="assistant", content="", refusal=None)
        opened = [ChatChunkChoice(index=choice.index, delta=turn, logprobs=None, finish_reason=None)
                  for choice in self.generation.choices]  # fmt: skip
        first = self._chunk(opened[:1], loramux=self.selection.served_by, **self._prompt_ids())
        return [first, *(self._chunk([choice]) for choice in opened[1:])]

    def delta(self, delta: Delta) -> list[bytes]:
        """See `Answer.delta`: what the message grew by, if it did, and the end, if it has come."""
        chunks = []
        reader = self._readers[delta.index]
        grown = reader.take(delta)
        content, beside = grown.text("content"), _beside_content(grown.text("reasoning"), grown.calls, index=True)
        ids: dict[str, Any] = {"token_ids": delta.token_ids} if self._want_ids else {}
        if content or beside or grown.scores or (self._want_ids and delta.token_ids):
            turn = TurnDelta(**beside) if beside and not content else TurnDelta(content=content, **beside)
            scores = self._logprobs(grown.scores)
            more = ChatChunkChoice(index=delta.index, delta=turn, logprobs=scores, finish_reason=None, **ids)
            chunks.append(self._chunk([more]))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=delta.index,
                delta=TurnDelta(),
                logprobs=None,
                finish_reason=reader.finish_reason(delta.finish_reason),
                stop_reason=delta.stop_reason,
            )
            chunks.append(self._chunk([end], **self._at_end()))
        return chunks

    def closing(self) -> list[bytes]:
        """See `Answer.closing`."""
        return self._ending(lambda: self._chunk([], usage=self.usage))


def _beside_content(reasoning: str, calls: Sequence[ReadCall], *, index: bool) -> dict[str, Any]:
    """A message's fields, or a delta's, besides its content: those that there are."""
    fields: dict[str, Any] = {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}
    if calls:
        fields["tool_calls"] = [_call(call, index=index) for call in calls]
    return fields


def _call(call: ReadCall, *, index: bool) -> AnsweredCall:
    """A call, or what it grew by, which has its `index`."""
    fields: dict[str, Any] = {"index": call.index} if index else {}
    if call.id is None:
        return AnsweredCall(**fields, function=AnsweredFunction(arguments=call.arguments))
    function = AnsweredFunction(name=call.name, arguments=call.arguments)
    return AnsweredCall(**fields, id=call.id, type="function", function=function)
