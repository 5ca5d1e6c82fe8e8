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
from loramux.server.api.resolve import AUTO
from loramux.server.api.schemas.chat import turns_of
from loramux.server.api.schemas.tokenize import Detokenized, DetokenizeRequest, TokenizeRequest, Tokens
from loramux.server.api.state import ServerState, State
from loramux.server.api.wire import JSONAnswer, written

router = APIRouter(route_class=BodyRoute)

JSON = "application/json"


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
        if body.prompt is not None:
            (ids,) = await state.renderer.text_tokens(
                [body.prompt], add_special_tokens=body.add_special_tokens is not False
            )
        else:
            tools = [tool.for_template() for tool in body.tools or ()] or None
            options = replace(body.template_options, tools=tools)
            talk = body.messages or ()
            prompt = await state.renderer.in_thread(lambda: state.renderer.prompt(turns_of(talk), options))
            ids = prompt.token_ids
        strings = await asyncio.to_thread(state.renderer.token_strings, ids) if body.return_token_strs else None
        found = Tokens.model_construct(count=len(ids), max_model_len=max_len(state), tokens=ids, token_strs=strings)
        return JSONAnswer(await written(found))


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, state: State, caller: From) -> Response:
    """The text of ids. Raises a 400 for one that the model does not have."""
    with state.gate.admit(caller):
        await _check_model(state, body.model, caller)
        check_token_ids(body.tokens, state.vocab_size, "tokens")
        text = await asyncio.to_thread(state.renderer.decode, body.tokens, skip_special_tokens=False)
        return Response(Detokenized(prompt=text).json_text(), media_type=JSON)
