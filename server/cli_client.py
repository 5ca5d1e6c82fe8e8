"""What the commands share: which server they talk to, its API as they use it, and how a command fails."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

OK, REFUSED, USAGE, UNREACHABLE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 130, 141
STATUSES = """\
exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the server cannot be reached, 130 interrupted,
141 the reader of the output went away."""
DEFAULT_URL = "http://127.0.0.1:8000"
BUSY = frozenset({429, 503})
TRIES = 5
LONGEST_WAIT = 60.0
WAIT_WITHOUT_WORD = 1.0


class CommandError(Exception):
    """A command failed; `status` is the exit status."""

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Server:
    """Where a command goes, and with which key."""

    url: str
    key: str | None


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that talks to a server; `server_of` reads them."""
    parser.add_argument("--url", help=f"the server (default: {DEFAULT_URL}) [LORAMUX_URL, else OPENAI_BASE_URL]")
    parser.add_argument(
        "--api-key", metavar="KEY",
        help="the key to send [LORAMUX_API_KEY; for a server by OPENAI_BASE_URL, OPENAI_API_KEY]",
    )  # fmt: skip


def server_of(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Server:
    """The flags, else LORAMUX_URL with LORAMUX_API_KEY, else OPENAI_BASE_URL with OPENAI_API_KEY, else the default.

    A key from a variable goes only where that variable's own address leads, so that none reaches somebody else's
    server. LORAMUX_API_KEY may hold the several keys of a server; the first is sent.
    """
    key: str | None = args.api_key
    foreign = not args.url and not environment.get("LORAMUX_URL") and environment.get("OPENAI_BASE_URL")
    if foreign:
        return Server(foreign, key or environment.get("OPENAI_API_KEY") or None)
    url = args.url or environment.get("LORAMUX_URL") or DEFAULT_URL
    own = environment.get("LORAMUX_API_KEY", "").split(",")[0].strip()
    return Server(url, key or own or None)


def wait_of(response: httpx.Response) -> float | None:
    """Seconds after which a busy server wants to be asked again; None where repeating is no use."""
    if response.status_code not in BUSY or response.headers.get("x-should-retry") == "false":
        return None
    try:
        seconds = float(response.headers.get("retry-after", WAIT_WITHOUT_WORD))
    except ValueError:
        return WAIT_WITHOUT_WORD  # a date, from a proxy
    return seconds if 0 <= seconds <= LONGEST_WAIT else None


def _say_nothing(text: str) -> None:
    """For callers that have nobody to tell."""


class Api:
    """A server's API, as the commands use it. Raises `CommandError` with the server's own words.

    A server that is busy (429, 503) is asked again when it says so, a few times; `say` hears of it.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        transport: httpx.BaseTransport | None = None,
        *,
        say: Callable[[str], None] = _say_nothing,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/").removesuffix("/v1")
        self._has_key = api_key is not None
        self._say = say
        self._sleep = sleep
        timeout = httpx.Timeout(30.0, read=600.0, write=600.0)
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, transport=transport)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise CommandError(f"--url {url} or the key cannot be used: {error}", USAGE) from None

    def call(self, method: str, path: str, *, resend: bool = False, **options: Any) -> Any:
        """One request; the decoded JSON body. With `resend`, a connection that breaks on the way is tried anew."""
        with self._open(method, path, resend=resend, **options) as response:
            response.read()
            return self._decoded(response)

    @contextmanager
    def stream(self, path: str, body: Any) -> Iterator[Iterator[bytes]]:
        """The answer to a POST in pieces as they come. Raises for a refusal before the first."""
        with self._open("POST", path, json=body) as response:
            if response.is_error or not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.read()
                self._decoded(response)
                raise CommandError(f"{self._url} answers without streaming; try --no-stream")
            yield self._pieces(response)

    def _pieces(self, response: httpx.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise CommandError(f"the answer was cut off ({error or type(error).__name__})", UNREACHABLE) from None

    @contextmanager
    def _open(self, method: str, path: str, *, resend: bool = False, **options: Any) -> Iterator[httpx.Response]:
        """The response, its body unread; busy servers, and broken connections with `resend`, are tried again."""
        request = self._client.build_request(method, path, **options)
        for tried in range(1, TRIES + 1):
            try:
                response = self._client.send(request, stream=True)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol):
                raise CommandError(f"--url {self._url}: give it as http://HOST:PORT", USAGE) from None
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise self._unreachable(error) from None
            except httpx.TransportError as error:
                if not resend or tried == TRIES:
                    raise self._unreachable(error) from None
                self._again(f"the connection broke ({error or type(error).__name__})", float(tried))
            else:
                wait = wait_of(response)
                if wait is None or tried == TRIES:
                    break
                response.close()
                self._again(f"the server is busy (status {response.status_code})", wait)
            request = self._client.build_request(method, path, **options)  # rewinds the files that it sends
        try:
            yield response
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        finally:
            response.close()

    def _again(self, reason: str, seconds: float) -> None:
        self._say(f"{reason}: trying again in {seconds:g} s")
        self._sleep(seconds)

    def _unreachable(self, error: httpx.TransportError) -> CommandError:
        reason = str(error) or type(error).__name__
        return CommandError(
            f"cannot reach {self._url} ({reason}); is the server running? (loramux serve, or --url)", UNREACHABLE
        )

    def _decoded(self, response: httpx.Response) -> Any:
        """The body. Raises `CommandError` for a refusal, and for what is no JSON."""
        try:
            body = response.json()
        except ValueError:
            raise CommandError(
                f"{self._url} does not answer like a loramux server (status {response.status_code})"
            ) from None
        if response.is_error:
            envelope = body.get("error") if isinstance(body, dict) else None
            message = envelope.get("message") if isinstance(envelope, dict) else None
            keyless = response.status_code == 401 and not self._has_key
            hint = "; give a key by --api-key or LORAMUX_API_KEY" if keyless else ""
            raise CommandError(f"{message or body} (status {response.status_code}){hint}")
        return body

    def pages(self, path: str, size: int, **wanted: str) -> Iterator[dict[str, Any]]:
        """Everything of a list, asked for `size` at a time; `wanted` are further parameters of its query."""
        params: dict[str, Any] = {"limit": size, **wanted}
        while True:
            page = self.call("GET", path, params=params)
            yield from page["data"]
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]

    def adapters(self) -> Iterator[dict[str, Any]]:
        """All adapters, page by page."""
        return self.pages("/v1/adapters", 500)

    def models(self) -> list[dict[str, Any]]:
        """What the server lists under /v1/models, loramux or not."""
        return list(self.call("GET", "/v1/models")["data"])

    def adapter(self, name: str) -> str:
        """The path of one adapter."""
        return f"/v1/adapters/{quote(name, safe='@')}"
