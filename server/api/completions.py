"""`POST /v1/completions`."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import From
from loramux.server.api.context import arrival, request_id
from loramux.server.api.errors import bad_request
from loramux.server.api.generation import (
    Delta,
    Generation,
    check_request,
    check_token_ids,
    count_choices,
    sampling_params,
    too_long,
)
from loramux.server.api.logprobs import TokenScore, text_logprobs
from loramux.server.api.rendering import PromptTooLongError
from loramux.server.api.resolve import Query, Selection, select
from loramux.server.api.schemas.completions import Completion, CompletionChoice, CompletionRequest, Prompt
from loramux.server.api.schemas.logprobs import TextLogprobs
from loramux.server.api.state import ServerState, State
from loramux.server.api.streaming import event
from loramux.server.api.structured import checked_constraint
from loramux.server.api.token_bytes import TokenBytes

router = APIRouter(route_class=BodyRoute)

DEFAULT_MAX_TOKENS = 16
ROUTED_TOKENS = 2048  # of a prompt in token ids the router sees the end


@router.post("/v1/completions", response_model=Completion)
async def create_completion(request: Request, body: CompletionRequest, state: State, caller: From) -> Response:
    """Continues one prompt or several, each a choice, in one piece or as a stream of server-sent events."""
    check_request(body, state.vocab_size)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1, or 0 with `echo: true`.", "max_tokens", "invalid_value")
    id = f"cmpl-{request_id(request)}"
    text = partial(_text, state, body.prompt[0]) if len(body.prompt) == 1 else None
    query = Query(request_id(request), text, body.router, body.cache_salt or "", caller)
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, body.model, body.adapters, query))
        copies, keep = _copies(state, body)
        constraint = await checked_constraint(state, body, caller.tenant)
        prompts = await prompt_tokens(state, body.prompt, add_special_tokens=body.add_special_tokens is not False)
        sampling = [
            sampling_params(
                state, body, len(prompt), wanted=body.max_tokens, default=DEFAULT_MAX_TOKENS, constraint=constraint
            )
            for prompt in prompts
        ]
        generation = Generation(
            state, selection, body, request_id=id, prompts=prompts, sampling=sampling, start=arrival(request),
            copies=copies, keep=keep, echo=bool(body.echo),
        )  # fmt: skip
        answer = TextAnswer(id, selection, body, generation, state.renderer.token_bytes)
        return await answer.respond(request, resources, stream=bool(body.stream))


def _copies(state: ServerState, body: CompletionRequest) -> tuple[int, int]:
    """How many answers each prompt gets, and how many of them are shown. Raises a 400 that names the field."""
    n = count_choices(state, body.n or 1, len(body.prompt), "n")
    if body.best_of is None:
        return n, n
    if body.best_of < n:
        raise bad_request(f"best_of is {body.best_of}, but n is {n}: it is at least n.", "best_of", "invalid_value")
    if body.stream and body.best_of > n:
        raise bad_request(
            "best_of above n cannot be streamed: the best is known at the end.", "best_of", "invalid_value"
        )
    return count_choices(state, body.best_of, len(body.prompt), "best_of"), n


def _text(state: ServerState, prompt: Prompt) -> str:
    """The prompt as text, for the router. Raises a 400 for ids that the model does not have."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-ROUTED_TOKENS:]
    check_token_ids(last, state.vocab_size, "prompt")
    return state.renderer.decode(last)


async def prompt_tokens(
    state: ServerState, prompts: Sequence[Prompt], *, add_special_tokens: bool = True, field_name: str = "prompt"
) -> list[list[int]]:
    """Prompts as token ids. Raises a 400 for one without any, for a text that has more than fit into the context, and
    for ids that the model does not have."""
    most = state.require_engine().max_model_len
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    try:
        encoded = iter(await state.renderer.text_tokens(texts, add_special_tokens=add_special_tokens, most=most))
    except PromptTooLongError as error:
        raise too_long(error.tokens, most, field_name) from None
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            token_ids = next(encoded)
        else:
            check_token_ids(prompt, state.vocab_size, field_name)
            token_ids = prompt
        if not token_ids:
            raise bad_request("The text is empty: it has no tokens.", field_name, "invalid_value")
        found.append(token_ids)
    return found


class TextAnswer(Answer):
    """A text completion: a prompt's choices, then the next one's. A single prompt's ids are on the answer, too."""

    def __init__(
        self, id: str, selection: Selection, body: CompletionRequest, generation: Generation, words: TokenBytes
    ) -> None:
        super().__init__(id, selection, body, generation)
        self._want_logprobs = body.logprobs is not None
        self._has_one_prompt = len(body.prompt) == 1
        self._words = words
        self._opened: frozenset[int] = frozenset()

    def _logprobs(self, scores: Sequence[TokenScore]) -> TextLogprobs | None:
        return text_logprobs(scores, self._words) if self._want_logprobs else None

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
        ids = {"prompt_token_ids": list(choices[0].prompt)} if self._want_ids and self._has_one_prompt else {}
        return {"loramux": self.selection.served_by, **ids}

    def read(self, delta: Delta) -> None:
        """See `Answer.read`: the generation keeps all that there is."""

    def whole(self) -> Completion:
        """See `Answer.whole`."""
        choices = [
            CompletionChoice(
                index=choice.index,
                text="".join(choice.text),
                logprobs=self._logprobs(choice.scores),
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
        shows = delta.text or delta.scores or delta.finish_reason is not None or (self._want_ids and delta.token_ids)
        if not shows:
            return []
        ids = self._ids(delta.index, delta.token_ids)
        end: dict[str, Any] = {"stop_reason": delta.stop_reason} if delta.finish_reason is not None else {}
        choice = CompletionChoice(
            index=delta.index, text=delta.text, logprobs=self._logprobs(delta.scores),
            finish_reason=delta.finish_reason, **ids, **end,
        )  # fmt: skip
        top = self._top() if not self._opened else self._at_end() if delta.finish_reason is not None else {}
        self._opened |= {delta.index}
        return [self._chunk([choice], **top)]

    def closing(self) -> list[bytes]:
        """See `Answer.closing`."""
        return self._ending(lambda: self._chunk([], usage=self.generation.usage))
