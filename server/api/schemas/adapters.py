"""`/v1/adapters`."""

from typing import Annotated, Literal

from pydantic import Field

from loramux.server.api.schemas.common import MAX_PARTS, RequestModel, ResponseModel, Text

Tier = Literal["device", "host", "disk"]


class Adapter(ResponseModel):
    """One version of an adapter. `tier` is where its weights are now; `pinned` ones stay on the device.

    `name` is what the caller calls it: `owner/name` for another tenant's. `shared_with` is shown to the owner alone.
    """

    id: str
    object: Literal["adapter"]
    name: str
    version: int
    digest: str
    status: str
    base_model: str
    rank: int
    target_modules: list[str]
    bytes: int
    created_at: int
    description: str | None
    examples: list[str]
    warnings: list[str]
    pinned: bool
    tier: Tier
    last_error: str | None
    owner: str
    visibility: str
    shared_with: list[str] | None


class AdapterList(ResponseModel):
    """A page of adapters (the newest version of each); ask for the next with `after=last_id`."""

    object: Literal["list"]
    data: list[Adapter]
    has_more: bool
    first_id: str | None
    last_id: str | None


class AdapterDeleted(ResponseModel):
    """The name is free again; running requests finish on the weights they started with."""

    id: str
    object: Literal["adapter.deleted"]
    name: str
    deleted: Literal[True]


class AdapterPatch(RequestModel):
    """What may change without a new version. Absent fields stay, null removes a text.

    `shared_with` is the whole list of tenants that may use the adapter, and makes it `shared`.
    """

    description: Text | None = None
    examples: Annotated[list[Text], Field(max_length=MAX_PARTS)] | None = None
    pinned: bool | None = None
    visibility: Literal["private", "shared", "public"] | None = None
    shared_with: Annotated[list[Text], Field(min_length=1, max_length=MAX_PARTS)] | None = None
