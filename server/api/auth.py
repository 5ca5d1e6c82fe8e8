"""Keys: whose request it is, and whether its path is open to that key.

Every path needs a key as soon as there is one: in the settings (`--api-key`: the local tenant's, with admin rights) or
in the registry. Until then everybody is the local tenant, and nobody manages keys over the network: the first one is
made on the server's machine (`loramux keys create`), so that an open server is never taken from its owner.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.adapters_store.names import LOCAL_TENANT
from loramux.adapters_store.tenants import Tenant, TenantLimits, Tenants
from loramux.server.api.caller import Caller, attach_caller
from loramux.server.api.context import set_tenant
from loramux.server.api.errors import APIError

Access = Literal["open", "metrics", "key", "admin"]

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
OPEN_PREFIX = "/console/"
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/v1/admin/"
ADMIN_PATHS = frozenset(
    {"/v1/router", "/v1/router/scores", "/v1/router/train", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
)
"""What shows or changes something of all tenants at once, or reads the server's disk."""
SETTING = "setting"
USES_SECONDS = 30.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def access_to(path: str) -> Access:
    """What a path asks of its caller: nothing, a key that may read metrics, any key but those, or an admin's."""
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
        return "open"
    if path == METRICS_PATH:
        return "metrics"
    return "admin" if path in ADMIN_PATHS or path.startswith(ADMIN_PREFIX) else "key"


class KeyRing:
    """The keys that count: those of the settings, by digest, and the registry's.

    `defaults` are the limits of tenants that have none of their own. `write` runs a blocking call soon, in a thread.
    """

    def __init__(
        self,
        tenants: Tenants,
        keys: Sequence[str],
        defaults: TenantLimits,
        write: Callable[[Callable[[], None]], object],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tenants = tenants
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._defaults = defaults
        self._write = write
        self._clock = clock
        self._uses: dict[str, float] = {}
        self._written = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there are no keys at all."""
        return not self._digests and not self._tenants.has_keys()

    def anybody(self) -> Caller:
        """Who everybody is while there are no keys."""
        return Caller(LOCAL_TENANT, "admin", self._limits_of(self._tenants.tenant(LOCAL_TENANT)))

    def caller(self, key: bytes) -> Caller | None:
        """Whose key this is, None for nobody's. Every look-up asks the registry, so that a change counts at once."""
        if self._is_setting(key):
            tenant = self._tenants.tenant(LOCAL_TENANT)
            return Caller(LOCAL_TENANT, "admin", self._limits_of(tenant), SETTING, tenant.salt)
        found = self._tenants.authenticate(key)
        if found is None:
            return None
        record, tenant = found
        self._used(record.id)
        return Caller(tenant.name, record.role, self._limits_of(tenant), record.id, tenant.salt)

    def _is_setting(self, key: bytes) -> bool:
        """Compared in constant time, as digests, against every key: neither content nor length nor position leaks."""
        given = hashlib.sha256(key).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found

    def _limits_of(self, tenant: Tenant) -> TenantLimits:
        return tenant.limits.over(self._defaults)

    def _used(self, id: str) -> None:
        """Notes the use; notes are written together, now and then."""
        now = self._clock()
        self._uses[id] = now
        if not 0 <= now - self._written < USES_SECONDS:
            self._written = now
            uses = self.take_uses()
            self._write(lambda: self._tenants.note_uses(uses))

    def take_uses(self) -> Mapping[str, float]:
        """The uses that are not written yet; they are the caller's to write."""
        uses, self._uses = self._uses, {}
        return uses


class AuthMiddleware:
    """Answers 401 to those without a key and 403 to keys that are for something else; says the others' names.

    Paths with control characters are not found: the patterns of routes end in `$`, which also matches before a newline
    at the end, so that `/v1/router/train%0a` would reach a route that is an admin's under a path that is not.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, *, metrics_open: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._metrics_open = metrics_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Unknown paths need a key, too."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _CONTROL.search(scope["path"]):
            await _no_such_path().response()(scope, receive, send)
            return
        access = access_to(scope["path"])
        if access == "metrics" and self._metrics_open:
            access = "open"
        try:
            caller = None if access == "open" else self._admit(scope, access)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if caller is not None:
            attach_caller(scope, caller)
            set_tenant(scope, caller.tenant)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, access: Access) -> Caller:
        """The caller. Raises 401 for an absent or wrong key, 403 for one that is not for this path."""
        if self._keys.is_open:
            caller = self._keys.anybody()
            if scope["path"].startswith(ADMIN_PREFIX):
                raise _forbidden(
                    "This server has no keys yet; make the first on its machine: `loramux keys create NAME --admin`."
                )
            return caller
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        found = self._keys.caller(key.strip()) if scheme.lower() == b"bearer" else None
        if found is None:
            raise _unauthorized(given=bool(header))
        if found.role == "metrics" and access != "metrics":
            raise _forbidden("This key reads /metrics and nothing else.")
        if found.role == "user" and access != "key":
            raise _forbidden(
                "This needs a key with the role `admin`" + (" or `metrics`." if access == "metrics" else ".")
            )
        return found


def _unauthorized(*, given: bool) -> APIError:
    message = "Incorrect API key provided." if given else "No API key provided: send `Authorization: Bearer KEY`."
    return APIError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _no_such_path() -> APIError:
    return APIError(404, "Unknown request URL: it has a control character.", code="not_found")


def _forbidden(message: str) -> APIError:
    return APIError(403, message, code="insufficient_permissions")
