"""`POST /v1/completions`."""

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.context import arrival, request_id
from loramux.server.api.errors import bad_request
from loramux.server.api.generation import Delta, Generation, check_request, check_token_ids, sampling_params
from loramux.server.api.resolve import Query, select
from loramux.server.api.schemas.completions import Completion, CompletionChoice, CompletionRequest, Prompt
from loramux.server.api.state import ServerState, State
from loramux.server.api.streaming import event

router = APIRouter()

DEFAULT_MAX_TOKENS = 16
ROUTED_TOKENS = 2048  # of a prompt in token ids the router sees the end


@router.post("/v1/completions", response_model=Completion)
async def create_completion(request: Request, body: CompletionRequest, state: State) -> Response:
    """Continues one prompt or several, each a choice, in one piece or as a stream of server-sent events."""
    check_request(body, state.vocab_size)
    id = f"cmpl-{request_id(request)}"
    text = partial(_text, state, body.prompt[0]) if len(body.prompt) == 1 else None
    query = Query(request_id(request), text, body.router, body.cache_salt or "")
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, body.model, body.adapters, query))
        state.require_engine()
        prompts = [await _tokens(state, prompt) for prompt in body.prompt]
        sampling = [
            sampling_params(state, body, len(prompt), wanted=body.max_tokens, default=DEFAULT_MAX_TOKENS)
            for prompt in prompts
        ]
        generation = Generation(
            state, selection, body, request_id=id, prompts=prompts, sampling=sampling, start=arrival(request)
        )
        answer = TextAnswer(id, selection, body, generation)
        return await answer.respond(request, resources, stream=bool(body.stream))


def _text(state: ServerState, prompt: Prompt) -> str:
    """The prompt as text, for the router. Raises a 400 for ids that the model does not have."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-ROUTED_TOKENS:]
    check_token_ids(last, state.vocab_size, "prompt")
    return state.renderer.decode(last)


async def _tokens(state: ServerState, prompt: Prompt) -> list[int]:
    """The prompt as token ids. Raises a 400 for one without any, or with ids that the model does not have."""
    if isinstance(prompt, str):
        token_ids = await state.renderer.text_tokens(prompt)
    else:
        token_ids = prompt
        check_token_ids(token_ids, state.vocab_size, "prompt")
    if not token_ids:
        raise bad_request("The prompt is empty: there is nothing to continue.", "prompt", "invalid_value")
    return token_ids


class TextAnswer(Answer):
    """A text completion: one choice per prompt. With a single prompt its ids are on the answer too, as in chat."""

    _opened: frozenset[int] = frozenset()

    def _ids(self, index: int, token_ids: list[int]) -> dict[str, Any]:
        """The ids that a choice carries: `token_ids` always, `prompt_token_ids` when it is shown for the first time."""
        if not self._want_ids:
            return {}
        if index in self._opened:
            return {"token_ids": token_ids}
        return {"token_ids": token_ids, "prompt_token_ids": list(self.generation.choices[index].prompt)}

    def _top(self) -> dict[str, Any]:
        """The fields that the whole answer, or a stream's first event, carries besides its choices."""
        choices = self.generation.choices
        ids = {"prompt_token_ids": list(choices[0].prompt)} if self._want_ids and len(choices) == 1 else {}
        return {"loramux": self.selection.served_by, **ids}

    def whole(self) -> Completion:
        """See `Answer.whole`."""
        choices = [
            CompletionChoice(
                index=choice.index,
                text="".join(choice.text),
                logprobs=None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                **self._ids(choice.index, choice.token_ids),
            )
            for choice in self.generation.choices
        ]
        return Completion(
            **self._common, **self._top(), object="text_completion", choices=choices, usage=self.generation.usage
        )

    def _chunk(self, choices: list[CompletionChoice], **extra: Any) -> bytes:
        fields = {**self._common, **self._usage(), **extra}
        return event(Completion(**fields, object="text_completion", choices=choices))

    def opening(self) -> list[bytes]:
        """See `Answer.opening`: nothing, text comes at once."""
        return []

    def delta(self, delta: Delta) -> list[bytes]:
        """See `Answer.delta`."""
        if not delta.text and delta.finish_reason is None and not (self._want_ids and delta.token_ids):
            return []
        ids = self._ids(delta.index, delta.token_ids)
        end: dict[str, Any] = {"stop_reason": delta.stop_reason} if delta.finish_reason is not None else {}
        choice = CompletionChoice(
            index=delta.index, text=delta.text, logprobs=None, finish_reason=delta.finish_reason, **ids, **end
        )
        top = self._top() if not self._opened else self._at_end() if delta.finish_reason is not None else {}
        self._opened |= {delta.index}
        return [self._chunk([choice], **top)]

    def usage_event(self) -> bytes:
        """See `Answer.usage_event`."""
        return self._chunk([], usage=self.generation.usage)
