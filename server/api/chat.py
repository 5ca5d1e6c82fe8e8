"""`POST /v1/chat/completions`."""

from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.context import arrival, request_id
from loramux.server.api.generation import Delta, Generation, check_request, sampling_params
from loramux.server.api.resolve import Query, select
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
from loramux.server.api.state import State
from loramux.server.api.streaming import event

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(request: Request, body: ChatRequest, state: State) -> Response:
    """Answers a conversation, in one piece or as a stream of server-sent events."""
    check_request(body, state.vocab_size)
    id = f"chatcmpl-{request_id(request)}"
    query = Query(request_id(request), lambda: query_of(body.messages), body.router, body.cache_salt or "")
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, body.model, body.adapters, query))
        state.require_engine()
        prompt = await state.renderer.chat_tokens([message.for_template() for message in body.messages])
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        sampling = sampling_params(state, body, len(prompt), wanted=wanted, default=None)
        generation = Generation(
            state, selection, body, request_id=id, prompts=[prompt], sampling=[sampling], start=arrival(request)
        )
        answer = ChatAnswer(id, selection, body, generation)
        return await answer.respond(request, resources, stream=bool(body.stream))


class ChatAnswer(Answer):
    """A chat completion: always one choice."""

    def whole(self) -> ChatCompletion:
        """See `Answer.whole`."""
        choice = self.generation.choices[0]
        ids: dict[str, Any] = {"token_ids": choice.token_ids} if self._want_ids else {}
        turn = ChatChoice(
            index=0,
            message=AnswerMessage(role="assistant", content="".join(choice.text), refusal=None),
            logprobs=None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            **ids,
        )
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[turn],
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
        """See `Answer.opening`: the role, and what serves the request."""
        turn = TurnDelta(role="assistant", content="", refusal=None)
        choice = ChatChunkChoice(index=0, delta=turn, logprobs=None, finish_reason=None)
        return [self._chunk([choice], loramux=self.selection.served_by, **self._prompt_ids())]

    def delta(self, delta: Delta) -> list[bytes]:
        """See `Answer.delta`: text, if there is any, and the end, if it has come."""
        chunks = []
        ids: dict[str, Any] = {"token_ids": delta.token_ids} if self._want_ids else {}
        if delta.text or (self._want_ids and delta.token_ids):
            turn = TurnDelta(content=delta.text)
            chunks.append(self._chunk([ChatChunkChoice(index=0, delta=turn, logprobs=None, finish_reason=None, **ids)]))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=0,
                delta=TurnDelta(),
                logprobs=None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            chunks.append(self._chunk([end], **self._at_end()))
        return chunks

    def usage_event(self) -> bytes:
        """See `Answer.usage_event`."""
        return self._chunk([], usage=self.generation.usage)
