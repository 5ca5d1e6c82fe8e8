"""`POST /tokenize` and `POST /detokenize`: what a prompt looks like to the model, and back."""

import asyncio
from dataclasses import replace

from fastapi import APIRouter
from starlette.responses import Response

from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import Caller, From
from loramux.server.api.errors import bad_request
from loramux.server.api.generation import check_token_ids
from loramux.server.api.models import find_adapter, max_len
from loramux.server.api.rendering import Prompt, PromptTooLongError
from loramux.server.api.resolve import AUTO
from loramux.server.api.schemas.chat import turns_of
from loramux.server.api.schemas.tokenize import Detokenized, DetokenizeRequest, TokenizeRequest, Tokens
from loramux.server.api.state import ServerState, State
from loramux.server.api.wire import JSONAnswer, written

router = APIRouter(route_class=BodyRoute)

JSON = "application/json"
MAX_LISTED = 1 << 20
"""Tokens that one answer lists: nothing else runs while a longer list is made (some 50 ms for four million)."""


async def _check_model(state: ServerState, model: str | None, caller: Caller) -> None:
    """Raises 404 `model_not_found` for a name that the caller cannot use. All models have one vocabulary."""
    if model is not None and model != AUTO and model not in state.settings.base_names:
        await find_adapter(state, model, caller)


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, state: State, caller: From) -> Response:
    """The ids of a text, or of a conversation's prompt; nothing is generated."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Send either `prompt` or `messages`.", "prompt", "invalid_value")
    with state.gate.admit(caller):
        await _check_model(state, body.model, caller)
        try:
            ids = await _token_ids(state, body)
        except PromptTooLongError as error:
            field = "messages" if body.prompt is None else "prompt"
            raise bad_request(
                f"`{field}` has {error.tokens} tokens; at most {MAX_LISTED} are listed at once: send it in parts.",
                field, "too_many_tokens",
            ) from None  # fmt: skip
        strings = await asyncio.to_thread(state.renderer.token_strings, ids) if body.return_token_strs else None
        found = Tokens.model_construct(count=len(ids), max_model_len=max_len(state), tokens=ids, token_strs=strings)
        return JSONAnswer(await written(found))


async def _token_ids(state: ServerState, body: TokenizeRequest) -> list[int]:
    """The ids of what is asked about. Raises `PromptTooLongError`."""
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        (ids,) = await state.renderer.text_tokens([body.prompt], add_special_tokens=special, most=MAX_LISTED)
        return ids
    tools = [tool.for_template() for tool in body.tools or ()] or None
    options = replace(body.template_options, tools=tools)
    talk = body.messages or ()

    def render() -> Prompt:
        return state.renderer.prompt(turns_of(talk), options, most=MAX_LISTED)

    return (await state.renderer.in_thread(render)).token_ids


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, state: State, caller: From) -> Response:
    """The text of ids. Raises a 400 for one that the model does not have."""
    with state.gate.admit(caller):
        await _check_model(state, body.model, caller)
        check_token_ids(body.tokens, state.vocab_size, "tokens")
        text = await asyncio.to_thread(state.renderer.decode, body.tokens, skip_special_tokens=False)
        return Response(Detokenized(prompt=text).json_text(), media_type=JSON)
