"""`POST /v1/responses`: OpenAI's Responses API over the same prompts and the same generation as chat completions.

Nothing is stored: `store: true`, `previous_response_id`, `conversation` and `background` are refused, and answers say
`store: false`. A failure after the stream has begun is a `response.failed` event, its last.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from loramux.server.api.answer import Answer
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import From
from loramux.server.api.context import arrival, request_id
from loramux.server.api.conversation import ChoiceReader, prepare
from loramux.server.api.errors import APIError, from_engine
from loramux.server.api.generation import Delta, Generation, check_request, sampling_params
from loramux.server.api.resolve import Query, Selection, select
from loramux.server.api.response_items import Event, ResponseItems
from loramux.server.api.schemas.chat import ChatRequest, query_of
from loramux.server.api.schemas.responses import (
    Incomplete,
    InputDetails,
    ItemStatus,
    OutputDetails,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
)
from loramux.server.api.state import State
from loramux.server.api.streaming import named_event
from loramux.server.engine.protocol import EngineError, SamplingParams

router = APIRouter(route_class=BodyRoute)

FIELDS = {"messages": "input", "max_tokens": "max_output_tokens"}
"""What this endpoint calls the fields of chat completions that a refusal may name."""


@router.post("/v1/responses", response_model=ResponseObject)
async def create_response(request: Request, body: ResponsesRequest, state: State, caller: From) -> Response:
    """Answers a conversation, in one piece or as a stream of typed events."""
    chat = _as_chat(body)
    check_request(chat, state.vocab_size)
    query = Query(request_id(request), lambda: query_of(chat.messages), chat.router, chat.cache_salt or "", caller)
    async with AsyncExitStack() as resources:
        selection = await resources.enter_async_context(select(state, chat.model, chat.adapters, query))
        state.require_engine()
        try:
            talk = await prepare(state, chat, caller.tenant, called="text.format")
            prompt = talk.prompt.token_ids
            sampling = sampling_params(
                state, chat, len(prompt), wanted=chat.max_completion_tokens, default=None, constraint=talk.constraint
            )
        except APIError as error:
            error.param = FIELDS.get(error.param or "", error.param)
            raise
        id = f"resp_{request_id(request)}"
        generation = Generation(
            state, selection, chat, request_id=id, prompts=[prompt], sampling=[sampling], start=arrival(request),
            hidden=talk.hidden,
        )  # fmt: skip
        answer = ResponsesAnswer(id, selection, body, chat, generation, talk.readers[0], sampling)
        return await answer.respond(request, resources, stream=bool(body.stream))


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    """See `ResponsesRequest.as_chat`. Raises a 400 for what only chat completions refuse: no turn, or too many."""
    try:
        return body.as_chat()
    except ValidationError as error:
        items = error.errors(include_url=False)
        names = [FIELDS.get(str(item["loc"][0]), str(item["loc"][0])) for item in items]
        found = [{**item, "loc": ("body", name)} for item, name in zip(items, names, strict=True)]
        raise RequestValidationError(found, body=dict.fromkeys(names)) from None


class ResponsesAnswer(Answer):
    """One response: reasoning, messages of one text part, and calls."""

    def __init__(
        self,
        id: str,
        selection: Selection,
        body: ResponsesRequest,
        chat: ChatRequest,
        generation: Generation,
        reader: ChoiceReader,
        sampling: SamplingParams,
    ) -> None:
        super().__init__(id, selection, chat, generation)
        self._id = id
        self._items = ResponseItems(id.removeprefix("resp_"))
        self._reader = reader
        self._body = body
        self._sampling = sampling
        self._events_sent = 0

    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self.generation.choices[0].finish_reason == "length" else "completed"

    def _response(self, status: Status, error: ResponseError | None = None) -> ResponseObject:
        """The response as it is at this moment."""
        body, ended = self._body, status != "in_progress"
        last: ItemStatus = "completed" if status == "completed" else "incomplete"
        cut = Incomplete(reason="max_output_tokens") if status == "incomplete" else None
        return ResponseObject(
            id=self._id, object="response", created_at=self._common["created"],
            completed_at=int(time.time()) if status in ("completed", "incomplete") else None,
            status=status,
            background=False, error=error, incomplete_details=cut, instructions=body.instructions,
            max_output_tokens=body.max_output_tokens, max_tool_calls=None, metadata=body.metadata or {},
            model=self.selection.model,
            output=self._items.shown(last) if ended else [],
            parallel_tool_calls=body.parallel_tool_calls is not False, previous_response_id=None,
            prompt_cache_key=body.prompt_cache_key, reasoning={"effort": None, "summary": None},
            safety_identifier=body.safety_identifier, service_tier="default", store=False,
            temperature=self._sampling.temperature, text={"format": body.text_format},
            tool_choice=_plain(body.tool_choice) or "auto", tools=[_plain(tool) for tool in body.tools or ()],
            top_logprobs=0, top_p=self._sampling.top_p,
            truncation="disabled", usage=self._tokens() if ended else None, user=body.user,
            loramux=self.selection.served_by,
        )  # fmt: skip

    def _tokens(self) -> ResponseUsage:
        usage = self.generation.usage
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._reader.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event with the next number."""
        number, self._events_sent = self._events_sent, self._events_sent + 1
        shown = {key: _plain(value) for key, value in fields.items()}
        return named_event(kind, {"type": kind, "sequence_number": number, **shown})

    def read(self, delta: Delta) -> None:
        """See `Answer.read`."""
        for step in self._reader.take(delta).steps:
            for _ in self._items.grow(step):
                pass

    def _ended(self) -> Iterator[Event]:
        """Ends the items. A response has one at least."""
        if not self._items:
            yield from self._items.grow(("content", ""))
        yield from self._items.close(self._status())

    def whole(self) -> ResponseObject:
        """See `Answer.whole`."""
        for _ in self._ended():
            pass
        return self._response(self._status())

    def opening(self) -> list[bytes]:
        """See `Answer.opening`: the response, which has no items yet."""
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
        ]

    def delta(self, delta: Delta) -> list[bytes]:
        """See `Answer.delta`."""
        steps = self._reader.take(delta).steps
        return [self._event(kind, **fields) for step in steps for kind, fields in self._items.grow(step)]

    def closing(self) -> list[bytes]:
        """See `Answer.closing`: what was opened is done."""
        ended = [self._event(kind, **fields) for kind, fields in self._ended()]
        status = self._status()
        return [*ended, self._event(f"response.{status}", response=self._response(status))]

    async def _events(self, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """See `Answer._events`; an engine that fails ends it with `response.failed`."""
        try:
            async with aclosing(super()._events(first, deltas)) as events:
                async for item in events:
                    yield item
        except EngineError as error:
            found = from_engine(error)
            failure = ResponseError(code="server_error", message=found.message)
            yield self._event("response.failed", response=self._response("failed", failure))


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
