"""Optional API keys: every path needs one, but for a short list of paths that probes and scrapers read."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.api.errors import APIError

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})


class ApiKeys:
    """The keys that are accepted, as digests. With none, everybody is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: bytes) -> bool:
        """Compared in constant time, as digests, against every key: neither content nor length nor position leaks."""
        given = hashlib.sha256(key).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


class AuthMiddleware:
    """Lets requests through that carry a key in `Authorization: Bearer`, or that go to an open path."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 itself; unknown paths need a key, too."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() == b"bearer" and self._keys.accepts(key.strip()):
            await self._app(scope, receive, send)
            return
        message = "Incorrect API key provided." if header else "No API key provided: send `Authorization: Bearer KEY`."
        error = APIError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        await error.response()(scope, receive, send)
