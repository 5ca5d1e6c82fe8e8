"""`GET /v1/models` and `GET /v1/models/{id}`: the base, and every adapter as a model of its own."""

from fastapi import APIRouter
from starlette.responses import Response

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.registry import AdapterVersion
from loramux.server.api.caller import Caller, From
from loramux.server.api.errors import model_not_found
from loramux.server.api.schemas.models import ModelCard, ModelList
from loramux.server.api.state import ServerState, State, all_adapters
from loramux.server.engine.protocol import EngineDeadError

router = APIRouter()

OWNER = "loramux"


def max_len(state: ServerState) -> int | None:
    """The context length; unknown before the engine was ready for the first time."""
    try:
        return state.engine.info.max_model_len
    except EngineDeadError:
        return state.settings.max_model_len


def _base_card(state: ServerState, id: str) -> ModelCard:
    return ModelCard(
        id=id,
        object="model",
        created=state.model_created,
        owned_by=OWNER,
        root=state.settings.base_name,
        parent=None,
        max_model_len=max_len(state),
    )


def _adapter_card(state: ServerState, id: str, version: AdapterVersion, caller: Caller) -> ModelCard:
    return ModelCard(
        id=id,
        object="model",
        created=version.created_at,
        owned_by=version.owner,
        root=f"{version.address(caller.tenant)}@{version.version}",
        parent=state.settings.base_name,
        max_model_len=max_len(state),
    )


async def find_adapter(state: ServerState, model: str, caller: Caller) -> AdapterVersion:
    """The adapter that the caller means by a model's name. Raises 404 `model_not_found`."""
    try:
        return await state.in_store(state.store.resolve, model, tenant=caller.tenant)
    except AdapterNotFound:
        raise model_not_found(model) from None


@router.get("/v1/models", response_model=ModelList)
async def list_models(state: State, caller: From) -> Response:
    """The base by each of its names, then the newest version of every adapter of the caller's, its own first."""

    def build() -> str:
        found = all_adapters(state.store, caller.tenant)
        cards = [_adapter_card(state, version.address(caller.tenant), version, caller) for version in found]
        bases = [_base_card(state, name) for name in state.settings.base_names]
        return ModelList(object="list", data=[*bases, *cards]).json_text()

    return Response(await state.in_store(build), media_type="application/json")


@router.get("/v1/models/{id:path}", response_model=ModelCard)
async def get_model(id: str, state: State, caller: From) -> Response:
    """One model: the base, `name`, `owner/name`, or either with `@version`. Slashes are sent as such or as `%2F`."""
    if id in state.settings.base_names:
        card = _base_card(state, id)
    else:
        card = _adapter_card(state, id, await find_adapter(state, id, caller), caller)
    return Response(card.json_text(), media_type="application/json")
