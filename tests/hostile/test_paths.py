"""No spelling of a path reaches a route that its plain spelling does not: keys are checked by path."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.harness import Bench, in_process, make_bench
from fastapi.routing import iter_route_contexts

from loramux.server.api.auth import access_to

ADMIN_KEY = "path-admin-key"
SPELLINGS: dict[str, Callable[[str], str]] = {
    "newline": lambda path: path + "%0a",
    "carriage return": lambda path: path + "%0d%0a",
    "nul": lambda path: path + "%00",
    "slash": lambda path: path + "/",
    "two slashes": lambda path: "/" + path,
    "inner slashes": lambda path: path.replace("/", "//"),
    "dot": lambda path: "/%2e" + path,
    "dots": lambda path: "/x/%2e%2e" + path,
    "parameter": lambda path: path + ";x=1",
    "capitals": lambda path: path.upper(),
    "encoded letter": lambda path: path[:-1] + f"%25{ord(path[-1]):x}",
    "encoded slash": lambda path: "/" + path[1:].replace("/", "%252f"),
    "backslash": lambda path: "/" + path[1:].replace("/", "%5c"),
    "space": lambda path: path + "%20",
    "full width": lambda path: path[:-1] + "%ef%bd%81",
    "byte that is no text": lambda path: path + "%ff",
}


def admin_paths(bench: Bench) -> list[tuple[str, str]]:
    """(method, path) of every route that a plain key may not use."""
    found = []
    for context in iter_route_contexts(bench.app.routes):
        path = context.path.replace("{id}", "key_0123456789abcdef").replace("{tenant}", "acme")
        if access_to(path) in ("admin", "metrics"):
            found += [(method, path) for method in sorted(context.methods or {"GET"})]
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_plain_key_stays_a_plain_key(tmp_path: Path, spelling: str) -> None:
    async def run() -> None:
        async with in_process(make_bench(tmp_path, api_key=ADMIN_KEY)) as bench:
            admin = {"authorization": f"Bearer {ADMIN_KEY}"}
            made = await bench.client.post("/v1/admin/keys", json={"tenant": "acme"}, headers=admin)
            user = {"authorization": f"Bearer {made.json()['key']}"}
            routes = admin_paths(bench)
            assert {"/metrics", "/v1/admin/keys", "/v1/router/train"} <= {path for _, path in routes}
            for method, path in routes:
                url = httpx.URL(f"http://server{SPELLINGS[spelling](path)}")
                for headers, refusals in ((user, (403, 404)), ({}, (401, 404))):
                    body: dict[str, Any] = {"json": {}} if method in ("POST", "PATCH") else {}
                    answer = await bench.client.request(method, url, headers=headers, **body)
                    assert answer.status_code in refusals, (method, url, answer.text[:200])

    asyncio.run(run())
