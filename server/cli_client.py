"""What the commands share: the server's API as they use it, and how a command fails."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

OK, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3


class CommandError(Exception):
    """A command failed; `status` is the exit status."""

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The server's adapter API, as the commands use it. Raises `CommandError` with the server's own words."""

    def __init__(self, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/").removesuffix("/v1")
        timeout = httpx.Timeout(30.0, read=600.0, write=600.0)
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, transport=transport)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """One request; the decoded JSON body."""
        try:
            response = self._client.request(method, path, **options)
        except httpx.InvalidURL as error:
            raise CommandError(f"--url {self._url}: {error}", USAGE) from None
        except httpx.UnsupportedProtocol:
            raise CommandError(f"--url {self._url}: give it as http://HOST:PORT", USAGE) from None
        except httpx.TransportError as error:
            raise CommandError(
                f"cannot reach {self._url} ({error}); is the server running? (loramux serve, or --url)", UNREACHABLE
            ) from None
        try:
            body = response.json()
        except ValueError:
            raise CommandError(
                f"{self._url} does not answer like a loramux server (status {response.status_code})"
            ) from None
        if response.is_error:
            envelope = body.get("error") if isinstance(body, dict) else None
            message = envelope.get("message") if isinstance(envelope, dict) else None
            raise CommandError(f"{message or body} (status {response.status_code})")
        return body

    def adapters(self) -> Iterator[dict[str, Any]]:
        """All adapters, page by page."""
        after: str | None = None
        while True:
            page = self.call("GET", "/v1/adapters", params={"limit": 500, **({"after": after} if after else {})})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def adapter(self, name: str) -> str:
        """The path of one adapter."""
        return f"/v1/adapters/{quote(name, safe='@')}"
