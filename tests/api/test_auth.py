"""API keys, and which routes are open."""

import pytest
from api.harness import BASE, Bench
from fastapi.routing import iter_route_contexts

from loramux.server.api.auth import OPEN_PATHS, ApiKeys

pytestmark = pytest.mark.anyio

KEYS = ["first-key", "second-kéy"]
OPEN = {"/health", "/ready", "/version", "/metrics"}
PROTECTED = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{id:path}",
    "/v1/adapters",
    "/v1/adapters/{name}",
    "/v1/route",
    "/v1/router",
    "/v1/router/scores",
    "/v1/router/train",
    "/v1/feedback",
    "/openapi.json",
}


async def test_every_route_is_on_one_list(make) -> None:
    bench = await make(api_key=KEYS)
    paths = {context.path for context in iter_route_contexts(bench.app.routes)}
    assert paths == OPEN | PROTECTED
    assert OPEN_PATHS == OPEN
    for path in sorted(paths):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
            response = await bench.client.request(method, path.replace("{id:path}", "x").replace("{name}", "x"))
            assert (response.status_code == 401) == (path in PROTECTED), (method, path)


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/health/", "//health", "/health/../v1/models", "/v1", "/Health", "/ready%2f"]
)
async def test_unknown_paths_need_a_key(make, path: str) -> None:
    bench = await make(api_key=KEYS)
    assert (await bench.client.get(path)).status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyx", "Basic first-key", "first-key", "Bearer second-key",
     "Bearer first-key,second-key", "Bearer " + "x" * 5000],
)  # fmt: skip
async def test_wrong_keys(make, header: str) -> None:
    bench = await make(api_key=KEYS)
    response = await bench.client.get("/v1/models", headers={"authorization": header} if header else {})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("key", KEYS)
async def test_right_keys(make, key: str) -> None:
    bench = await make(api_key=KEYS)
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {b"authorization": f"{scheme} {key}".encode()}
        body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
        assert (await bench.client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200


async def test_without_keys_everything_is_open(bench: Bench) -> None:
    assert (await bench.client.get("/v1/models", headers={"authorization": "Bearer anything"})).status_code == 200


def test_comparison_is_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", spy)
    keys = ApiKeys(["a", "bb" * 50])
    assert keys.accepts(b"a")
    assert not keys.accepts(b"")
    assert compared == [(32, 32)] * 4  # every key, as digests of one length, also after a match
