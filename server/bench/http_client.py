"""An HTTP/1.1 client of the standard library alone: one request per connection, and the body in pieces as it comes."""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

HEAD_LIMIT = 64 << 10
READ_BYTES = 64 << 10
PLAIN = re.compile(r"[\x21-\x7e]+")


class ServingError(Exception):
    """Why a request counts as failed: a `kind` to group by, and what the server said."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class NotListeningError(ValueError):
    """Nobody answers at an address."""


@dataclass(frozen=True)
class Target:
    """A server: `address` is what is connected to, `host` what its certificate and the Host header say."""

    host: str
    port: int
    address: str
    prefix: str = ""
    api_key: str | None = None
    tls: ssl.SSLContext | None = None

    def head(self, method: str, path: str, length: int) -> bytes:
        """The request line and headers; the connection is not reused."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {name}:{self.port}", "Connection: close",
            "User-Agent: loramux-benchmark", "Accept: text/event-stream, application/json", "Accept-Encoding: identity",
        ]  # fmt: skip
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def find_target(url: str, *, api_key: str | None = None, allow_remote: bool = False) -> Target:
    """The server at `url`, with or without a trailing /v1.

    Raises ValueError for a URL that names no server and for one beyond this machine's loopback unless `allow_remote`,
    `NotListeningError` when nothing listens there.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url} is not a server's address such as http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    if not all(PLAIN.fullmatch(text) for text in (parts.hostname, prefix or "/", api_key or "-")):
        raise ValueError("the URL and the key may hold printable ASCII characters only, and no spaces")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{parts.hostname} cannot be resolved: {error}") from None
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    remote = [a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    if remote and not allow_remote:
        raise ValueError(f"{parts.hostname} ({remote[0]}) is not this machine; --allow-remote loads it all the same")
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError:
            continue
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Target(parts.hostname, port, address, prefix, api_key, tls)
    raise NotListeningError(f"nothing listens at {parts.hostname}:{port}")


class HttpResponse:
    """One HTTP/1.1 response, parsed as its bytes come; bodies may be chunked, sized, or end with the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = bytearray()
        self._state: Callable[[bytearray], bool] = self._head
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes from the connection; returns the part of the body that they complete.

        Raises ServingError when they are not HTTP.
        """
        self._buffer += data
        body = bytearray()
        while not self.done and self._state(body):
            pass
        return bytes(body)

    def close(self) -> None:
        """The connection has ended. Raises ServingError when the response had not."""
        if self._state == self._until_close:
            self.done = True
        elif not self.done:
            raise ServingError("cut off: connection closed", "inside the body" if self.status else "before an answer")

    def _line(self) -> str | None:
        """The next line without its end, or None while it is incomplete."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ServingError("not HTTP", "a line without an end")
            return None
        line = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 2]
        return line

    def _head(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ServingError("not HTTP", "headers without an end")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        match = re.match(r"HTTP/1\.[01] (\d{3})(?: |$)", first)
        if match is None:
            raise ServingError("not HTTP", first[:100])
        if match[1].startswith("1"):  # an interim response: the real one follows
            return True
        self.status = int(match[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if self.headers.get("transfer-encoding", "").lower().endswith("chunked"):
            self._state = self._chunk_size
        elif "content-length" in self.headers:
            if not re.fullmatch(r"\d{1,18}", self.headers["content-length"]):
                raise ServingError("not HTTP", "a Content-Length that is no length")
            self._left = int(self.headers["content-length"])
            self._state = self._sized
        else:
            self._state = self._until_close
        self.done = self.status in (204, 304) or (self._state == self._sized and self._left == 0)
        return True

    def _take(self, body: bytearray) -> bool:
        """Moves what there is of the `_left` bytes to the body; true when none is left."""
        part = self._buffer[: self._left]
        body += part
        del self._buffer[: len(part)]
        self._left -= len(part)
        return self._left == 0

    def _sized(self, body: bytearray) -> bool:
        self.done = self._take(body)
        return False

    def _until_close(self, body: bytearray) -> bool:
        self._left = len(self._buffer)
        self._take(body)
        return False

    def _chunk_size(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        size = line.partition(";")[0].strip()
        if not re.fullmatch(r"[0-9A-Fa-f]{1,15}", size):
            raise ServingError("not HTTP", "a chunk without a size")
        self._left = int(size, 16)
        self._state = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, body: bytearray) -> bool:
        if not self._take(body):
            return False
        self._state = self._chunk_end
        return True

    def _chunk_end(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        if line:
            raise ServingError("not HTTP", "a chunk longer than its size")
        self._state = self._chunk_size
        return True

    def _trailer(self, body: bytearray) -> bool:
        line = self._line()
        self.done = line == ""
        return line is not None


async def exchange(
    target: Target, method: str, path: str, body: bytes, receive: Callable[[HttpResponse, bytes], None]
) -> HttpResponse:
    """One request on a connection of its own; `receive` gets the body in pieces, as they arrive.

    Raises ServingError for an answer that is cut off or not HTTP, OSError from the connection.
    """
    name = target.host if target.tls else None
    reader, writer = await asyncio.open_connection(target.address, target.port, ssl=target.tls, server_hostname=name)
    try:
        writer.write(target.head(method, path, len(body)) + body)
        response = HttpResponse()
        while not response.done:
            data = await reader.read(READ_BYTES)
            if not data:
                response.close()
                break
            part = response.feed(data)
            if part:
                receive(response, part)
        return response
    finally:
        writer.close()
