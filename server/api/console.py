"""The console at `/`: a page and the files that it loads, read once at start and served from memory.

Only what `FILES` lists is served, by exact name; a request never becomes a path on disk. The files' addresses hold a
digest of them all, so that they may be cached for ever; the page itself is asked for anew each time. The page is open
to everybody, as it holds no data: all it shows comes from the API, with the key of whoever looks.
"""

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loramux.server.api.errors import APIError

PAGE = "index.html"
FILES = (
    "adapters.css", "adapters.js", "api.js", "app.js", "catalog.js", "chat.css", "chat.js", "column.js",
    "combobox.js", "completion.js", "controls.css", "detail.js", "dom.js", "files.js", "format.js", "fusion.js",
    "icon.svg", "keydialog.js", "keys.js", "layout.css", "models.js", "monitor.js", "poll.js", "prometheus.js",
    "remove.js", "row.js", "sampling.js", "served.js", "sse.js", "status.js", "tabs.js", "theme.css",
    "theme.js", "toast.js", "turn.js", "upload.js",
)  # fmt: skip
TYPES = MappingProxyType({
    "css": "text/css; charset=utf-8", "html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
})  # fmt: skip
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
HEADERS = MappingProxyType(
    {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
)
FOREVER = "public, max-age=31536000, immutable"
VERSION_MARK, ROOT_MARK = b"@version@", b"@root@"
METHODS = ("GET", "HEAD")


class Console:
    """The page and its files. `version` is the digest that their addresses hold.

    Behind `root_path` the page's links start with it; without one they are relative, so that a proxy's path works, too.
    """

    def __init__(self, page: bytes, contents: Mapping[str, bytes], root_path: str = "") -> None:
        page = page.replace(ROOT_MARK, f"{root_path}/".encode() if root_path else b"")
        digest = hashlib.sha256(page)
        for name in sorted(contents):
            digest.update(name.encode() + b"\0" + contents[name])
        self.version = digest.hexdigest()[:16]
        self._page = page.replace(VERSION_MARK, self.version.encode())
        self._contents = dict(contents)

    @classmethod
    def load(cls, root_path: str = "") -> "Console":
        """Reads the files that the package ships. Raises FileNotFoundError where one is missing."""
        folder = files("loramux.server") / "console"
        return cls((folder / PAGE).read_bytes(), {name: (folder / name).read_bytes() for name in FILES}, root_path)

    @property
    def paths(self) -> frozenset[str]:
        """Everything that is served."""
        return frozenset({"/", *(f"/console/{self.version}/{name}" for name in self._contents)})

    def page(self, if_none_match: str) -> Response:
        """The page, or a 304 for a client that has it. The version is its tag: it covers the page, too."""
        tag = f'"{self.version}"'
        headers = {**HEADERS, "cache-control": "no-cache", "etag": tag}
        if tag in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(self._page, headers={**headers, "content-type": TYPES["html"]})

    def file(self, version: str, name: str) -> Response:
        """One file. Raises a 404 for a name that is not listed, and for another version's."""
        data = self._contents.get(name) if version == self.version else None
        if data is None:
            raise APIError(404, "The console has no such file; reload the page.", code="not_found")
        kind = TYPES[name.rpartition(".")[2]]
        return Response(data, headers={**HEADERS, "cache-control": FOREVER, "content-type": kind})


def make_router(console: Console) -> APIRouter:
    """The routes of a console; the API's document does not list them."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=list(METHODS))
    async def page(request: Request) -> Response:
        return console.page(request.headers.get("if-none-match", ""))

    @router.api_route("/console/{version}/{name}", methods=list(METHODS))
    async def file(version: str, name: str) -> Response:
        return console.file(version, name)

    return router
