"""`/v1/adapters`: upload, list, look at, change and delete adapters while the server runs."""

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.storage import Upload
from loramux.server.api.errors import APIError
from loramux.server.api.schemas.adapters import Adapter, AdapterDeleted, AdapterList, AdapterPatch, Tier
from loramux.server.api.state import ServerState, State, in_thread
from loramux.server.api.uploads import receive_form
from loramux.server.engine.protocol import AdapterResidency, EngineError

logger = logging.getLogger(__name__)
router = APIRouter()

JSON = "application/json"
UPLOAD_SCHEMA = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    "description": {"type": "string"},
                    "examples": {"type": "string", "description": "a JSON list of strings"},
                },
            }
        }
    },
}


class AdapterView:
    """Adapters as clients see them: the store's record, and where the weights are at this moment."""

    def __init__(self, state: ServerState) -> None:
        self._pinned = state.pinned
        self._places: dict[str, AdapterResidency] = {item.digest: item for item in state.engine.stats.adapters}

    def of(self, version: AdapterVersion) -> Adapter:
        """One version."""
        place = self._places.get(version.digest)
        tier: Tier = "device" if place and place.device else "host" if place and place.host else "disk"
        return Adapter(
            id=version.id,
            object="adapter",
            name=version.name,
            version=version.version,
            digest=version.digest,
            status=version.status,
            base_model=version.base_model,
            rank=version.rank,
            target_modules=list(version.target_modules),
            bytes=version.bytes,
            created_at=version.created_at,
            description=version.description,
            examples=list(version.examples or ()),
            warnings=list(version.warnings),
            pinned=self._pinned.get(version.name) == version.digest,
            tier=tier,
            last_error=version.last_error,
        )


@asynccontextmanager
async def _upload(state: ServerState) -> AsyncIterator[Upload]:
    """An upload of the store's, whose remains are removed at the end."""
    folder = ExitStack()
    try:
        yield await in_thread(state.upload_threads, lambda: folder.enter_context(state.store.begin_upload()))
    finally:
        await in_thread(state.upload_threads, folder.close)


@router.post("/v1/adapters", response_model=Adapter, status_code=201, openapi_extra={"requestBody": UPLOAD_SCHEMA})
async def create_adapter(request: Request, state: State) -> Response:
    """Takes an adapter as multipart/form-data: `name`, the two PEFT files as `files`, `description`, `examples`.

    201 for a new version, which new requests use at once; 200 when the newest version has this very content.
    """
    content_type = request.headers.get("content-type", "")
    async with _upload(state) as upload:
        form = await receive_form(request.stream(), content_type, upload.open_file, state.upload_threads)
        name, description, examples = form.name, form.description, form.examples
        result = await in_thread(
            state.upload_threads,
            lambda: state.store.commit(upload, name=name, description=description, examples=examples),
        )
    version = result.adapter
    state.names.learn(version)
    if version.name in state.pinned:
        await _repin(state, version)
    await state.count_store()
    status = 201 if result.created else 200
    headers = await _learn(state, version)
    return Response(AdapterView(state).of(version).json_text(), status_code=status, media_type=JSON, headers=headers)


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(
    state: State, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: Annotated[str | None, Query()] = None
) -> Response:
    """The newest version of each adapter, a page at a time."""
    page = await state.in_store(state.store.list, limit=limit, after=after)
    view = AdapterView(state)
    data = [view.of(version) for version in page.data]
    listing = AdapterList(
        object="list",
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )
    return Response(listing.json_text(), media_type=JSON)


@router.get("/v1/adapters/{name}", response_model=Adapter)
async def get_adapter(name: str, state: State) -> Response:
    """One adapter: its newest version, or `name@version`."""
    version = await state.in_store(state.store.resolve, name)
    return Response(AdapterView(state).of(version).json_text(), media_type=JSON)


@router.patch("/v1/adapters/{name}", response_model=Adapter)
async def update_adapter(name: str, patch: AdapterPatch, state: State) -> Response:
    """Changes description and examples, and pins or unpins the newest version. What is absent stays."""
    changes: dict[str, Any] = {key: getattr(patch, key) for key in patch.model_fields_set - {"pinned"}}
    version = await state.in_store(state.store.get, name)
    if patch.pinned is not None:
        state.require_engine()
    if changes:
        version = await state.in_store(state.store.update, name, **changes)
    if patch.pinned is not None:
        await _pin(state, version, patch.pinned)
    headers = await _learn(state, version) if changes else {}
    return Response(AdapterView(state).of(version).json_text(), media_type=JSON, headers=headers)


@router.delete("/v1/adapters/{name}", response_model=AdapterDeleted)
async def delete_adapter(name: str, state: State) -> Response:
    """Deletes all versions. Running requests finish; then device and host memory are freed."""
    version = await state.in_store(state.store.get, name)
    unreferenced = await state.in_store(state.store.delete, name)
    if state.router is not None:
        await state.router.deleted(name)
    await _unpin(state, name)
    state.metrics.forget_adapter(name)
    for digest in unreferenced:
        await state.retire(digest)
    await state.count_store()
    gone = AdapterDeleted(id=version.id, object="adapter.deleted", name=name, deleted=True)
    return Response(gone.json_text(), media_type=JSON)


async def _learn(state: ServerState, version: AdapterVersion) -> dict[str, str]:
    """Tells the router. `x-loramux-router`: `ready` when the texts count, `pending` while they are being embedded."""
    if state.router is None:
        return {}
    learned = await state.router.learn(version)
    return {} if learned is None else {"x-loramux-router": "ready" if learned else "pending"}


async def _pin(state: ServerState, version: AdapterVersion, pinned: bool) -> None:
    """Pins this version in place of an older one, or unpins the adapter. Raises a 503 when it cannot be loaded."""
    state.require_engine()
    before = state.pinned.get(version.name)
    if pinned:
        state.names.learn(version)
        await state.engine.pin_adapter(version.digest, True)
        state.pinned[version.name] = version.digest
        if before is not None and before not in state.pinned.values():
            await state.engine.pin_adapter(before, False)
    else:
        await _unpin(state, version.name)


async def _unpin(state: ServerState, name: str) -> None:
    """Ends a name's pin, and the engine's pin of its content unless another name holds that."""
    before = state.pinned.pop(name, None)
    if before is not None and before not in state.pinned.values() and state.engine.state == "ready":
        await state.engine.pin_adapter(before, False)


async def _repin(state: ServerState, version: AdapterVersion) -> None:
    """A pinned adapter has a new version: it takes the pin over. The upload has succeeded, whatever comes of it."""
    try:
        await _pin(state, version, True)
    except (EngineError, APIError) as error:
        logger.warning("the new version of pinned adapter %s is not pinned: %s", version.name, error)
