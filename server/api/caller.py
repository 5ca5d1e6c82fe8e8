"""Who sent a request: the tenant, what its key allows, its limits, and the salt that keeps its caches apart."""

import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from loramux.adapters_store.names import LOCAL_TENANT, key_at
from loramux.adapters_store.store import StoreQuota
from loramux.adapters_store.tenants import Role, TenantLimits

_KEY = "loramux.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's sender.

    `key_id` is the id of its key, "setting" for one of `--api-key`, None while no keys exist: then everybody is the
    local tenant. `secret` is the tenant's salt; None while there is nobody to keep caches from.
    """

    tenant: str
    role: Role
    limits: TenantLimits
    key_id: str | None = None
    secret: bytes | None = field(default=None, repr=False)

    @property
    def is_alone(self) -> bool:
        """Whether there are no other tenants, because there are no keys."""
        return self.key_id is None

    @property
    def quota(self) -> StoreQuota:
        """What the tenant may keep in the store."""
        return StoreQuota(self.limits.adapters, self.limits.adapter_bytes)

    def salt(self, given: str) -> str:
        """What separates prefix caches: BLAKE2b-128 of the client's own salt under the tenant's secret, in hex.

        Requests of one tenant share blocks, requests of two never do, and no tenant can make up another's salt.
        """
        if self.secret is None:
            return given
        return hashlib.blake2b(given.encode(), key=self.secret, digest_size=16).hexdigest()

    def key_at(self, address: str) -> str:
        """The key of the adapter that this caller calls `address`; see `adapters_store.names`."""
        return key_at(address, self.tenant)

    def remembered(self, request_id: str) -> str:
        """The id under which a request of this caller's is remembered, so that nobody else's id ever names it."""
        if self.tenant == LOCAL_TENANT and "/" not in request_id:
            return request_id
        return f"{self.tenant}/{request_id}"


def attach_caller(scope: Scope, caller: Caller) -> None:
    """Says whose request this is, for the routes."""
    scope[_KEY] = caller


async def caller_of(request: Request) -> Caller:
    """Whose request this is."""
    caller: Caller = request.scope[_KEY]
    return caller


From = Annotated[Caller, Depends(caller_of)]
