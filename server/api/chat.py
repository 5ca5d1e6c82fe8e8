"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.caller import From
from loramux.server.api.context import arrival, request_id
from loramux.server.api.generation import Delta, Generation, check_request, count_choices, sampling_params
from loramux.server.api.logprobs import TokenScore, chat_logprobs
from loramux.server.api.resolve import Query, Selection, select
from loramux.server.api.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    TurnDelta,
    query_of,
)
from loramux.server.api.schemas.logprobs import ChatLogprobs
from loramux.server.api.state import State
from loramux.server.api.streaming import event
from loramux.server.api.token_bytes import TokenBytes

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(request: Request, body: ChatRequest, state: State, caller: From) -> Response:
    """Answers a conversation, in one piece or as a stream of server-sent events."""
    check_request(body, state.vocab_size)
    id = f"chatcmpl-{request_id(request)}"
    query = Query(request_id(request), lambda: query_of(body.messages), body.router, body.cache_salt or "", caller)
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, body.model, body.adapters, query))
        copies = count_choices(state, body.n or 1, 1, "n")
        turns = [message.for_template() for message in body.messages]
        prompt = await state.renderer.chat_tokens(turns, body.template_options)
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        sampling = sampling_params(state, body, len(prompt), wanted=wanted, default=None)
        generation = Generation(
            state, selection, body, request_id=id, prompts=[prompt], sampling=[sampling], start=arrival(request),
            copies=copies,
        )  # fmt: skip
        answer = ChatAnswer(id, selection, body, generation, state.renderer.token_bytes)
        return await answer.respond(request, resources, stream=bool(body.stream))


class ChatAnswer(Answer):
    """A chat completion: one conversation's choices."""

    def __init__(
        self, id: str, selection: Selection, body: ChatRequest, generation: Generation, words: TokenBytes
    ) -> None:
        super().__init__(id, selection, body, generation)
        self._want_logprobs = bool(body.logprobs)
        self._words = words

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs | None:
        return chat_logprobs(scores, self._words) if self._want_logprobs else None

    def whole(self) -> ChatCompletion:
        """See `Answer.whole`."""
        turns = []
        for choice in self.generation.choices:
            ids: dict[str, Any] = {"token_ids": choice.token_ids} if self._want_ids else {}
            turn = ChatChoice(
                index=choice.index,
                message=AnswerMessage(role="assistant", content="".join(choice.text), refusal=None),
                logprobs=self._logprobs(choice.scores),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                **ids,
            )
            turns.append(turn)
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=turns,
            usage=self.generation.usage,
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
        """See `Answer.delta`: text, if there is any, and the end, if it has come."""
        chunks = []
        ids: dict[str, Any] = {"token_ids": delta.token_ids} if self._want_ids else {}
        if delta.text or delta.scores or (self._want_ids and delta.token_ids):
            turn = TurnDelta(content=delta.text)
            scores = self._logprobs(delta.scores)
            more = ChatChunkChoice(index=delta.index, delta=turn, logprobs=scores, finish_reason=None, **ids)
            chunks.append(self._chunk([more]))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=delta.index,
                delta=TurnDelta(),
                logprobs=None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            chunks.append(self._chunk([end], **self._at_end()))
        return chunks

    def closing(self) -> list[bytes]:
        """See `Answer.closing`."""
        return self._ending(lambda: self._chunk([], usage=self.generation.usage))
