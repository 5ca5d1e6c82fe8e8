"""`/v1/admin`: who may use the server, and how much of it. For keys with the role `admin`."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from loramux.adapters_store.names import owner_and_name
from loramux.adapters_store.store import StoreUsage
from loramux.adapters_store.tenants import Key, Tenant
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.schemas.admin import (
    ApiKey,
    ApiKeyList,
    KeyRequest,
    Limits,
    NewApiKey,
    TenantList,
    TenantObject,
    TenantPatch,
    Usage,
)
from loramux.server.api.state import ServerState, State

router = APIRouter(prefix="/v1/admin", route_class=BodyRoute)

JSON = "application/json"
PageSize = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query()]


def key_fields(key: Key) -> Mapping[str, Any]:
    """A key as clients see it."""
    return {**asdict(key), "object": "api_key"}


@router.post("/keys", response_model=NewApiKey, status_code=201)
async def create_key(body: KeyRequest, state: State) -> Response:
    """Makes a key, and its tenant if that is new. The answer holds the key; it is not to be had again."""
    secret, key = await state.in_store(
        state.tenants.create_key, body.tenant, role=body.role, label=body.label, expires_at=body.expires_at
    )
    made = NewApiKey(key=secret, **key_fields(key))
    return Response(made.json_text(), status_code=201, media_type=JSON, headers={"cache-control": "no-store"})


@router.get("/keys", response_model=ApiKeyList)
async def list_keys(state: State, limit: PageSize = 100, after: After = None, tenant: After = None) -> Response:
    """The keys, oldest first, revoked ones included; of one tenant if asked for."""
    page = await state.in_store(state.tenants.keys, limit, after, tenant)
    data = [ApiKey(**key_fields(key)) for key in page.data]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    listing = ApiKeyList(object="list", data=data, has_more=page.has_more, first_id=first, last_id=last)
    return Response(listing.json_text(), media_type=JSON)


@router.get("/keys/{id}", response_model=ApiKey)
async def get_key(id: str, state: State) -> Response:
    """One key."""
    return Response(ApiKey(**key_fields(await state.in_store(state.tenants.key, id))).json_text(), media_type=JSON)


@router.delete("/keys/{id}", response_model=ApiKey)
async def revoke_key(id: str, state: State) -> Response:
    """Revokes a key: the next request with it is refused, those that run finish. Its record stays."""
    key = await state.in_store(state.tenants.revoke_key, id)
    return Response(ApiKey(**key_fields(key)).json_text(), media_type=JSON)


@router.get("/tenants", response_model=TenantList)
async def list_tenants(state: State, limit: PageSize = 100, after: After = None) -> Response:
    """The tenants by name, with their limits and what they have now."""
    page = await state.in_store(state.tenants.tenants, limit, after)
    data = [await _shown(state, tenant) for tenant in page.data]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    listing = TenantList(object="list", data=data, has_more=page.has_more, first_id=first, last_id=last)
    return Response(listing.json_text(), media_type=JSON)


@router.get("/tenants/{tenant}", response_model=TenantObject)
async def get_tenant(tenant: str, state: State) -> Response:
    """One tenant."""
    found = await state.in_store(state.tenants.tenant, tenant)
    return Response((await _shown(state, found)).json_text(), media_type=JSON)


@router.patch("/tenants/{tenant}", response_model=TenantObject)
async def update_tenant(tenant: str, patch: TenantPatch, state: State) -> Response:
    """Changes a tenant's limits. A tenant comes to be with its first key."""
    changes = {name: getattr(patch, name) for name in patch.model_fields_set}
    found = await state.in_store(state.tenants.set_limits, tenant, changes)
    return Response((await _shown(state, found)).json_text(), media_type=JSON)


async def _shown(state: ServerState, tenant: Tenant) -> TenantObject:
    limits = tenant.limits.over(state.settings.tenant_limits)
    kept: StoreUsage = await state.in_store(state.store.usage, tenant.name)
    use = state.gate.of(tenant.name)
    left = state.gate.tokens_left(tenant.name, limits.tokens_per_minute)
    return TenantObject(
        id=tenant.name,
        object="tenant",
        created_at=tenant.created_at,
        limits=Limits(**asdict(tenant.limits)),
        limits_in_force=Limits(**asdict(limits)),
        usage=Usage(
            adapters=kept.adapters,
            adapter_bytes=kept.bytes,
            pinned=sum(owner_and_name(key)[0] == tenant.name for key in state.pinned),
            requests=use.sequences,
            tokens_left=None if left is None else max(0, math.floor(left)),
        ),
    )
