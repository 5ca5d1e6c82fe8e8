"""`/v1/admin/keys` and `/v1/admin/tenants`."""

from typing import Literal

from pydantic import Field

from loramux.server.api.schemas.common import RequestModel, ResponseModel, Text

MAX_LIMIT = 2**62


class KeyRequest(RequestModel):
    """A key to make. `expires_at` is in Unix seconds; without it the key holds until it is revoked."""

    tenant: Text = Field(min_length=1, max_length=256)
    role: Literal["user", "admin", "metrics"] = "user"
    label: Text | None = Field(None, max_length=256)
    expires_at: int | None = Field(None, ge=0, le=MAX_LIMIT)


class ApiKey(ResponseModel):
    """A key, without the key itself. Times are in Unix seconds."""

    id: str
    object: Literal["api_key"]
    tenant: str
    role: str
    label: str | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewApiKey(ApiKey):
    """A key that was just made: the only answer that holds it."""

    key: str


class ApiKeyList(ResponseModel):
    """A page of keys, oldest first; ask for the next with `after=last_id`."""

    object: Literal["list"]
    data: list[ApiKey]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Limits(ResponseModel):
    """What a tenant may have at once; null is any number."""

    adapters: int | None
    adapter_bytes: int | None
    pinned: int | None
    requests: int | None
    tokens_per_minute: int | None


class Usage(ResponseModel):
    """What a tenant has now. `tokens_left` of this minute's, null without such a limit."""

    adapters: int
    adapter_bytes: int
    pinned: int
    requests: int
    tokens_left: int | None


class TenantObject(ResponseModel):
    """A tenant: its own limits, those in force (its own, else the server's), and what it has."""

    id: str
    object: Literal["tenant"]
    created_at: int
    limits: Limits
    limits_in_force: Limits
    usage: Usage


class TenantList(ResponseModel):
    """A page of tenants by name; ask for the next with `after=last_id`."""

    object: Literal["list"]
    data: list[TenantObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class TenantPatch(RequestModel):
    """Limits to change; null goes back to the server's. They count from the next request on."""

    adapters: int | None = Field(None, ge=0, le=MAX_LIMIT)
    adapter_bytes: int | None = Field(None, ge=0, le=MAX_LIMIT)
    pinned: int | None = Field(None, ge=0, le=MAX_LIMIT)
    requests: int | None = Field(None, ge=1, le=MAX_LIMIT)
    tokens_per_minute: int | None = Field(None, ge=1, le=MAX_LIMIT)
