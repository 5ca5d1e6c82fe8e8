"""`/v1/adapters`: upload, list, look at, change and delete adapters while the server runs."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from loramux.adapters_store.errors import QuotaExceeded
from loramux.adapters_store.names import owner_and_name
from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.storage import Upload
from loramux.adapters_store.store import CommitResult
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import Caller, From
from loramux.server.api.errors import APIError
from loramux.server.api.schemas.adapters import Adapter, AdapterDeleted, AdapterList, AdapterPatch, Tier
from loramux.server.api.state import ServerState, State, in_thread
from loramux.server.api.uploads import Form, receive_form, sharing_of
from loramux.server.api.wire import JSONAnswer, joined
from loramux.server.engine.protocol import AdapterResidency, EngineError

logger = logging.getLogger(__name__)
router = APIRouter(route_class=BodyRoute)

JSON = "application/json"
QUOTA_RETRY_SECONDS = 60
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
                    "visibility": {"type": "string", "enum": ["private", "shared", "public"]},
                    "shared_with": {"type": "string", "description": "a JSON list of tenants"},
                },
            }
        }
    },
}


class AdapterView:
    """Adapters as one caller sees them: the store's record, and where the weights are at this moment.

    An adapter is on the device or the host only if it was brought there under its own name: that equal content of
    another's is there already is not shown.
    """

    def __init__(self, state: ServerState, caller: Caller) -> None:
        self._pinned = state.pinned
        self._names = state.names
        self._tenant = caller.tenant
        self._places: dict[str, AdapterResidency] = {item.digest: item for item in state.engine.stats.adapters}

    def of(self, version: AdapterVersion) -> Adapter:
        """One version."""
        place = self._places.get(version.digest) if self._names.used(version) else None
        name = version.address(self._tenant)
        tier: Tier = "device" if place and place.device else "host" if place and place.host else "disk"
        return Adapter(
            id=f"{name}@{version.version}",
            object="adapter",
            name=name,
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
            pinned=self._pinned.get(version.key) == version.digest,
            tier=tier,
            last_error=version.last_error,
            owner=version.owner,
            visibility=version.visibility,
            shared_with=list(version.shared_with) if version.owner == self._tenant else None,
        )


@asynccontextmanager
async def _upload(state: ServerState) -> AsyncIterator[Upload]:
    """An upload of the store's, whose remains are removed at the end."""
    folder = ExitStack()
    try:
        yield await in_thread(state.upload_threads, lambda: folder.enter_context(state.store.begin_upload()))
    finally:
        await in_thread(state.upload_threads, folder.close)


async def take_in(
    state: ServerState, caller: Caller, fill: Callable[[Upload], Awaitable[Form]]
) -> tuple[CommitResult, dict[str, str]]:
    """Makes what `fill` puts into an upload the newest version of the caller's adapter, or finds that it is already.

    Returns the result and headers for the answer. Raises what the store raises, and a 429 beyond the caller's share.
    """
    with state.gate.admit(caller):
        async with _upload(state) as upload:
            form = await fill(upload)
            commit = partial(
                state.store.commit, upload, name=form.name, description=form.description, examples=form.examples,
                sharing=form.sharing, owner=caller.tenant, quota=caller.quota,
            )  # fmt: skip
            try:
                result = await in_thread(state.upload_threads, commit)
            except QuotaExceeded as error:
                raise _over_quota(error) from None
    if result.adapter.key in state.pinned:
        await _repin(state, result.adapter)
    await state.count_store()
    return result, await _learn(state, result.adapter.key)


async def take_out(state: ServerState, caller: Caller, name: str) -> AdapterVersion:
    """Deletes all versions of the caller's adapter, here and in the engine. Raises `AdapterNotFound`."""
    version = await state.in_store(state.store.own, name, owner=caller.tenant)
    unreferenced = await state.in_store(state.store.delete, version.name, owner=caller.tenant)
    if state.router is not None:
        await state.router.deleted(version.key)
    await _unpin(state, version.key)
    state.metrics.forget_adapter(version.key)
    state.names.drop(version.key)
    for digest in unreferenced:
        await state.retire(digest)
    await state.count_store()
    return version


@router.post("/v1/adapters", response_model=Adapter, status_code=201, openapi_extra={"requestBody": UPLOAD_SCHEMA})
async def create_adapter(request: Request, state: State, caller: From) -> Response:
    """Takes an adapter as multipart/form-data: `name`, the two PEFT files as `files`, `description`, `examples`, and
    who may use it: `visibility`, `shared_with`.

    201 for a new version, which new requests use at once; 200 when the newest version has this very content.
    """
    content_type = request.headers.get("content-type", "")

    async def receive(upload: Upload) -> Form:
        return await receive_form(request.stream(), content_type, upload.open_file, state.upload_threads)

    result, headers = await take_in(state, caller, receive)
    text = AdapterView(state, caller).of(result.adapter).json_text()
    return Response(text, status_code=201 if result.created else 200, media_type=JSON, headers=headers)


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(
    state: State,
    caller: From,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query()] = None,
) -> Response:
    """The newest version of each adapter that the caller may use, its own first, a page at a time."""
    page = await state.in_store(state.store.visible, caller.tenant, limit=limit, after=after)
    view = AdapterView(state, caller)

    def listing() -> bytes:
        data = [view.of(version) for version in page.data]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return joined(AdapterList(object="list", data=data, has_more=page.has_more, first_id=first, last_id=last))

    return JSONAnswer(await state.in_store(listing))


@router.get("/v1/adapters/{name:path}", response_model=Adapter)
async def get_adapter(name: str, state: State, caller: From) -> Response:
    """One adapter: its newest version, or `name@version`; another tenant's is `owner/name`."""
    version = await state.in_store(state.store.resolve, name, tenant=caller.tenant)
    return Response(AdapterView(state, caller).of(version).json_text(), media_type=JSON)


@router.patch("/v1/adapters/{name:path}", response_model=Adapter)
async def update_adapter(name: str, patch: AdapterPatch, state: State, caller: From) -> Response:
    """Changes description, examples and who may use it, and pins or unpins the newest version. What is absent stays.

    Only the owner's adapters change: for everybody else there is no such adapter.
    """
    changes: dict[str, Any] = {
        key: getattr(patch, key) for key in ("description", "examples") if key in patch.model_fields_set
    }
    sharing = sharing_of(patch.visibility, patch.shared_with)
    if sharing is not None:
        changes["sharing"] = sharing
    version = await state.in_store(state.store.own, name, owner=caller.tenant)
    if patch.pinned is not None:
        state.require_engine()
    if changes:
        version = await state.in_store(state.store.update, version.name, owner=caller.tenant, **changes)
    if patch.pinned is not None:
        await _pin(state, version, patch.pinned, caller.limits.pinned)
    headers = await _learn(state, version.key) if changes else {}
    return Response(AdapterView(state, caller).of(version).json_text(), media_type=JSON, headers=headers)


@router.delete("/v1/adapters/{name:path}", response_model=AdapterDeleted)
async def delete_adapter(name: str, state: State, caller: From) -> Response:
    """Deletes all versions. Running requests finish; then device and host memory are freed. For the owner only."""
    version = await take_out(state, caller, name)
    gone = AdapterDeleted(id=version.id, object="adapter.deleted", name=version.name, deleted=True)
    return Response(gone.json_text(), media_type=JSON)


def _over_quota(error: QuotaExceeded) -> APIError:
    """A 429 that goes away only when something is deleted: clients must not repeat the upload by themselves."""
    headers = {"retry-after": str(QUOTA_RETRY_SECONDS), "x-should-retry": "false"}
    return APIError(error.status, f"{error}.", type="adapters", param=error.field, code=error.code, headers=headers)


async def _learn(state: ServerState, key: str) -> dict[str, str]:
    """Tells the router of a change. `x-loramux-router`: `ready` when the texts count, `pending` before."""
    if state.router is None:
        return {}
    learned = await state.router.learn(key)
    return {} if learned is None else {"x-loramux-router": "ready" if learned else "pending"}


async def _pin(state: ServerState, version: AdapterVersion, pinned: bool, limit: int | None = None) -> None:
    """Pins this version in place of an older one, or unpins the adapter.

    Raises a 429 beyond the owner's limit of pins, a 503 when it cannot be loaded.
    """
    state.require_engine()
    if not pinned:
        await _unpin(state, version.key)
        return
    before = state.pinned.get(version.key)
    others = sum(owner_and_name(key)[0] == version.owner for key in state.pinned.keys() - {version.key})
    if limit is not None and others >= limit:
        raise _over_quota(
            QuotaExceeded(
                f"you have {others} pinned adapters, your limit is {limit}; unpin one", code="rate_limit_exceeded",
                field="pinned",
            )
        )  # fmt: skip
    state.names.learn(version)
    state.pinned[version.key] = version.digest  # before the wait, so that pins at the same time are counted
    try:
        await state.engine.pin_adapter(version.digest, True)
    except BaseException:
        if before is None:
            state.pinned.pop(version.key, None)
        else:
            state.pinned[version.key] = before
        raise
    if before is not None and before not in state.pinned.values():
        await state.engine.pin_adapter(before, False)


async def _unpin(state: ServerState, key: str) -> None:
    """Ends an adapter's pin, and the engine's pin of its content unless another adapter holds that."""
    before = state.pinned.pop(key, None)
    if before is not None and before not in state.pinned.values() and state.engine.state == "ready":
        await state.engine.pin_adapter(before, False)


async def _repin(state: ServerState, version: AdapterVersion) -> None:
    """A pinned adapter has a new version: it takes the pin over. The upload has succeeded, whatever comes of it."""
    try:
        await _pin(state, version, True)
    except (EngineError, APIError) as error:
        logger.warning("the new version of pinned adapter %s is not pinned: %s", version.key, error)
