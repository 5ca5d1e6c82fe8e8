"""Keys of the settings and of the registry, and which routes are open to whom."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, Bench
from fastapi.routing import iter_route_contexts

from loramux.adapters_store.tenants import TenantLimits, Tenants
from loramux.server.api.auth import KeyRing
from loramux.server.api.refused import REFUSED

pytestmark = pytest.mark.anyio

KEYS = ["first-key", "second-kéy"]
OPEN = {"/", "/console/{version}/{name}", "/health", "/ready", "/version"}
METRICS = {"/metrics"}
KEY = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{id:path}",
    "/v1/adapters",
    "/v1/adapters/{name:path}",
    "/v1/route",
    "/v1/feedback",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/openapi.json",
    *REFUSED,
}
ADMIN = {
    "/v1/router",
    "/v1/router/scores",
    "/v1/router/train",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/admin/keys",
    "/v1/admin/keys/{id}",
    "/v1/admin/tenants",
    "/v1/admin/tenants/{tenant}",
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {key}".encode()}


async def test_every_route_is_on_one_list(make: Callable[..., Any]) -> None:
    bench = await make(api_key=KEYS)
    paths = {context.path for context in iter_route_contexts(bench.app.routes)}
    assert paths == OPEN | METRICS | KEY | ADMIN
    user, _ = bench.state.tenants.create_key("acme")
    reader, _ = bench.state.tenants.create_key("acme", role="metrics")
    for path in sorted(paths):
        at = path
        for part in ("{id:path}", "{name:path}", "{rest:path}", "{name}", "{id}", "{tenant}", "{version}"):
            at = at.replace(part, "x")
        for method in METHODS:

            async def status(key: str | None, method: str = method, at: str = at) -> int:
                response = await bench.client.request(method, at, headers=bearer(key) if key else {})
                return int(response.status_code)

            refused = {401, 403}
            assert (await status(None) == 401) == (path not in OPEN), (method, path)
            assert (await status(user) in refused) == (path in ADMIN | METRICS), (method, path)
            assert (await status(reader) in refused) == (path in ADMIN | KEY), (method, path)
            assert await status(KEYS[0]) not in refused, (method, path)


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/health/", "//health", "/health/../v1/models", "/v1", "/Health", "/ready%2f", "//", "/console",
     "/v1/admin", "/v1/admin/", "//v1/admin/keys", "/V1/admin/keys", "/metrics/"],
)  # fmt: skip
async def test_unknown_paths_need_a_key(make: Callable[..., Any], path: str) -> None:
    bench = await make(api_key=KEYS)
    assert (await bench.client.get(f"http://server{path}")).status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyx", "Basic first-key", "first-key", "Bearer second-key",
     "Bearer first-key,second-key", "Bearer " + "x" * 5000, "Bearer ' OR 1=1 --", "Bearer ' UNION SELECT * FROM keys--",
     "Bearer %", "Bearer \x7f"],
)  # fmt: skip
async def test_wrong_keys(make: Callable[..., Any], header: str) -> None:
    bench = await make(api_key=KEYS)
    bench.state.tenants.create_key("acme")
    response = await bench.client.get("/v1/models", headers={"authorization": header} if header else {})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("key", KEYS)
async def test_right_keys(make: Callable[..., Any], key: str) -> None:
    bench = await make(api_key=KEYS)
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {b"authorization": f"{scheme} {key}".encode()}
        body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
        assert (await bench.client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200


async def test_without_keys_everything_but_keys_is_open(bench: Bench) -> None:
    assert (await bench.client.get("/v1/models", headers={"authorization": "Bearer anything"})).status_code == 200
    assert (await bench.client.get("/metrics")).status_code == 200
    assert (await bench.client.get("/v1/router")).status_code == 200
    for method in METHODS:
        response = await bench.client.request(method, "/v1/admin/keys", json={"tenant": "thief", "role": "admin"})
        assert response.status_code == 403
        if method != "HEAD":
            assert "loramux keys create" in response.json()["error"]["message"]
    assert not bench.state.tenants.has_keys()


async def test_the_first_key_closes_the_server_at_once_and_for_good(bench: Bench) -> None:
    other = Tenants(bench.store.registry_path)  # as the command line does it, in another process
    assert (await bench.client.get("/v1/models")).status_code == 200
    secret, key = other.create_key("acme")
    assert (await bench.client.get("/v1/models")).status_code == 401
    assert (await bench.client.get("/v1/models", headers=bearer(secret))).status_code == 200
    other.revoke_key(key.id)
    assert (await bench.client.get("/v1/models", headers=bearer(secret))).status_code == 401
    assert (await bench.client.get("/v1/models")).status_code == 401
    other.close()


async def test_expired_keys(bench: Bench) -> None:
    secret, _ = bench.state.tenants.create_key("acme", expires_at=int(time.time()) + 100)
    assert (await bench.client.get("/v1/models", headers=bearer(secret))).status_code == 200
    bench.state.tenants._clock = lambda: time.time() + 200
    assert (await bench.client.get("/v1/models", headers=bearer(secret))).status_code == 401


async def test_metrics_of_a_server_with_keys(make: Callable[..., Any]) -> None:
    bench = await make(metrics_open=True)
    bench.state.tenants.create_key("acme")
    assert (await bench.client.get("/metrics")).status_code == 200
    assert (await bench.client.get("/v1/models")).status_code == 401


async def test_no_log_line_has_a_key(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret, key = bench.state.tenants.create_key("acme")
    admin, _ = bench.state.tenants.create_key("ops", role="admin")
    await bench.client.get("/v1/models", headers=bearer(secret))
    await bench.client.get("/v1/models", headers=bearer("lm-" + "wrong" * 8))
    made = await bench.client.post("/v1/admin/keys", json={"tenant": "new"}, headers=bearer(admin))
    await bench.client.delete(f"/v1/admin/keys/{key.id}", headers=bearer(admin))
    text = "\n".join(str(record.__dict__) + record.getMessage() for record in caplog.records)
    assert text
    for word in (secret, admin, "wrongwrong", made.json()["key"], secret.removeprefix("lm-")):
        assert word not in text
    assert secret not in repr(bench.state.keys.caller(secret.encode()))
    salt = bench.state.tenants.tenant("acme").salt
    assert repr(salt) not in repr(bench.state.keys.caller(secret.encode()))


def test_comparison_is_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    tenants = Tenants(tmp_path / "registry.sqlite3")
    secret, _ = tenants.create_key("acme")
    monkeypatch.setattr("hmac.compare_digest", spy)
    keys = KeyRing(tenants, ["a", "bb" * 50], TenantLimits(), lambda call: None)
    assert keys.caller(b"a") is not None
    assert keys.caller(b"") is None
    assert compared == [(32, 32)] * 4  # every key of the settings, as digests of one length, also after a match
    found = keys.caller(secret.encode())
    assert found is not None
    assert found.tenant == "acme"
    assert compared == [(32, 32)] * 7  # and the digest that the index found
    tenants.close()


def test_uses_are_written_together(tmp_path: Path) -> None:
    tenants = Tenants(tmp_path / "registry.sqlite3")
    keys = [tenants.create_key("acme") for _ in range(3)]
    now = 1e9
    writes: list[Callable[[], None]] = []
    ring = KeyRing(tenants, [], TenantLimits(), writes.append, clock=lambda: now)
    for seconds in (0, 1, 2, 29):
        now = 1e9 + seconds
        for secret, _ in keys:
            ring.caller(secret.encode())
    assert len(writes) == 1
    now = 1e9 + 31
    ring.caller(keys[0][0].encode())
    assert len(writes) == 2
    for write in writes:
        write()
    tenants.note_uses(ring.take_uses())
    assert [tenants.key(key.id).last_used_at for _, key in keys] == [10**9 + 31, 10**9 + 29, 10**9 + 29]
    tenants.close()
