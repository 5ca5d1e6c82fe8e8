"""`GET /v1/models` and `GET /v1/models/{id}`: the base, and every adapter as a model of its own."""

from fastapi import APIRouter
from starlette.responses import Response

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.registry import AdapterVersion
from loramux.server.api.errors import model_not_found
from loramux.server.api.schemas.models import ModelCard, ModelList
from loramux.server.api.state import ServerState, State, all_adapters
from loramux.server.engine.protocol import EngineDeadError

router = APIRouter()

OWNER = "loramux"


def _max_len(state: ServerState) -> int | None:
    """The context length; unknown before the engine was ready for the first time."""
    try:
        return state.engine.info.max_model_len
    except EngineDeadError:
        return state.settings.max_model_len


def _base_card(state: ServerState) -> ModelCard:
    name = state.settings.base_name
    return ModelCard(
        id=name,
        object="model",
        created=state.model_created,
        owned_by=OWNER,
        root=name,
        parent=None,
        max_model_len=_max_len(state),
    )


def _adapter_card(state: ServerState, id: str, version: AdapterVersion) -> ModelCard:
    return ModelCard(
        id=id,
        object="model",
        created=version.created_at,
        owned_by=OWNER,
        root=f"{version.name}@{version.version}",
        parent=state.settings.base_name,
        max_model_len=_max_len(state),
    )


@router.get("/v1/models", response_model=ModelList)
async def list_models(state: State) -> Response:
    """The base, then the newest version of every adapter."""

    def build() -> str:
        cards = [_adapter_card(state, version.name, version) for version in all_adapters(state.store)]
        return ModelList(object="list", data=[_base_card(state), *cards]).json_text()

    return Response(await state.in_store(build), media_type="application/json")


@router.get("/v1/models/{id:path}", response_model=ModelCard)
async def get_model(id: str, state: State) -> Response:
    """One model: the base, `name` or `name@version`. Base names may hold slashes, sent as such or as `%2F`."""
    if id == state.settings.base_name:
        card = _base_card(state)
    else:
        try:
            card = _adapter_card(state, id, await state.in_store(state.store.resolve, id))
        except AdapterNotFound:
            raise model_not_found(id) from None
    return Response(card.json_text(), media_type="application/json")
