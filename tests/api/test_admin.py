"""`/v1/admin`: keys and tenants over the network, for admin keys only."""

import asyncio
import time
from typing import Any

import pytest
from api.harness import Bench
from api.test_tenants import As

pytestmark = pytest.mark.anyio


@pytest.fixture
async def admin(bench: Bench) -> As:
    return As(bench, "ops", "admin")


async def test_a_keys_life(admin: As) -> None:
    expires = int(time.time()) + 1000
    body = {"tenant": "acme", "label": "laptop", "expires_at": expires}
    made = await admin.ask("POST", "/v1/admin/keys", json=body)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key = made.json()
    secret = key.pop("key")
    assert secret.startswith("lm-")
    assert set(key) == {
        "id", "object", "tenant", "role", "label", "created_at", "expires_at", "revoked_at", "last_used_at",
    }  # fmt: skip
    assert (key["object"], key["tenant"], key["role"], key["label"]) == ("api_key", "acme", "user", "laptop")
    assert (key["expires_at"], key["revoked_at"], key["last_used_at"]) == (expires, None, None)
    assert (await admin.ask("GET", f"/v1/admin/keys/{key['id']}")).json() == key
    listed = (await admin.ask("GET", "/v1/admin/keys")).json()
    assert listed["data"][1] == key
    assert (listed["object"], listed["first_id"], listed["last_id"]) == ("list", admin.key.id, key["id"])
    assert secret not in str(listed)
    headers = {"authorization": f"Bearer {secret}"}
    assert (await admin.bench.client.get("/v1/models", headers=headers)).status_code == 200
    gone = await admin.ask("DELETE", f"/v1/admin/keys/{key['id']}")
    assert gone.json()["revoked_at"] >= key["created_at"]
    assert (await admin.bench.client.get("/v1/models", headers=headers)).status_code == 401
    again = await admin.ask("DELETE", f"/v1/admin/keys/{key['id']}")
    assert again.json()["revoked_at"] == gone.json()["revoked_at"]


async def test_pages_of_keys(admin: As) -> None:
    made = [As(admin.bench, tenant).key.id for tenant in ("a", "b", "a")]
    first = (await admin.ask("GET", "/v1/admin/keys", params={"limit": "2"})).json()
    assert ([key["id"] for key in first["data"]], first["has_more"]) == ([admin.key.id, made[0]], True)
    rest = (await admin.ask("GET", "/v1/admin/keys", params={"after": first["last_id"]})).json()
    assert ([key["id"] for key in rest["data"]], rest["has_more"]) == (made[1:], False)
    one = (await admin.ask("GET", "/v1/admin/keys", params={"tenant": "a"})).json()
    assert [key["id"] for key in one["data"]] == [made[0], made[2]]
    assert (await admin.ask("GET", "/v1/admin/keys", params={"after": "x"})).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tenant"), ({"tenant": "A"}, "tenant"), ({"tenant": "a'--"}, "tenant"), ({"tenant": "a/b"}, "tenant"),
        ({"tenant": "a", "role": "root"}, "role"), ({"tenant": "a", "label": "x" * 300}, "label"),
        ({"tenant": "a", "label": "a\nb"}, "label"), ({"tenant": "a", "expires_at": 1}, "expires_at"),
        ({"tenant": "a", "expires_at": "soon"}, "expires_at"), ({"tenant": "a", "key": "lm-mine"}, "key"),
        ({"tenant": 1}, "tenant"),
    ],
)  # fmt: skip
async def test_keys_that_make_no_sense(admin: As, body: dict[str, Any], param: str) -> None:
    response = await admin.ask("POST", "/v1/admin/keys", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert len((await admin.ask("GET", "/v1/admin/keys")).json()["data"]) == 1


@pytest.mark.parametrize("role", ["user", "metrics"])
async def test_only_admins_manage(admin: As, role: Any) -> None:
    user = As(admin.bench, "acme", role)
    for method, path in (
        ("GET", "/v1/admin/keys"), ("POST", "/v1/admin/keys"), ("DELETE", f"/v1/admin/keys/{admin.key.id}"),
        ("GET", "/v1/admin/tenants"), ("PATCH", "/v1/admin/tenants/acme"), ("GET", "/v1/admin/nothing"),
    ):  # fmt: skip
        response = await user.ask(method, path, json={"tenant": "acme", "role": "admin"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert (await admin.ask("GET", "/v1/admin/keys")).status_code == 200


async def test_tenants_and_their_limits(admin: As) -> None:
    acme = As(admin.bench, "acme")
    await acme.upload("a", 1)
    size = (await acme.upload("b", 1)).json()["bytes"]
    names = [item["id"] for item in (await admin.ask("GET", "/v1/admin/tenants")).json()["data"]]
    assert names == ["acme", "default", "ops"]
    tenant = (await admin.ask("GET", "/v1/admin/tenants/acme")).json()
    nothing = dict.fromkeys(("adapters", "adapter_bytes", "pinned", "requests", "tokens_per_minute"))
    assert tenant["limits"] == tenant["limits_in_force"] == nothing
    assert tenant["usage"] == {"adapters": 2, "adapter_bytes": size, "pinned": 0, "requests": 0, "tokens_left": None}
    changed = await admin.ask("PATCH", "/v1/admin/tenants/acme", json={"adapters": 2, "tokens_per_minute": 500})
    assert changed.json()["limits"] == {**nothing, "adapters": 2, "tokens_per_minute": 500}
    assert (await acme.upload("c", 2)).status_code == 429
    await acme.chat(max_tokens=5)
    assert (await admin.ask("GET", "/v1/admin/tenants/acme")).json()["usage"]["tokens_left"] < 500
    await admin.ask("PATCH", "/v1/admin/tenants/acme", json={"adapters": None})
    assert (await acme.upload("c", 2)).status_code == 201
    assert (await admin.ask("PATCH", "/v1/admin/tenants/nobody", json={})).status_code == 404
    for wrong in ({"adapters": -1}, {"requests": 0}, {"colour": 1}, {"pinned": 1.5}, {"adapter_bytes": 1 << 70}):
        response = await admin.ask("PATCH", "/v1/admin/tenants/acme", json=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(wrong)))


async def test_the_servers_own_limits_hold_where_a_tenant_has_none(make: Any) -> None:
    bench = await make(tenant_max_adapters=1, tenant_max_requests=3)
    admin, acme = As(bench, "ops", "admin"), As(bench, "acme")
    await admin.ask("PATCH", "/v1/admin/tenants/acme", json={"requests": 5})
    shown = (await admin.ask("GET", "/v1/admin/tenants/acme")).json()
    assert (shown["limits"]["adapters"], shown["limits_in_force"]["adapters"]) == (None, 1)
    assert shown["limits_in_force"]["requests"] == 5
    assert (await acme.upload("a", 1)).status_code == 201
    assert (await acme.upload("a", 2)).status_code == 201  # a version is no new adapter
    refused = await acme.upload("b", 1)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (429, "rate_limit_exceeded", "name")
    assert refused.headers["retry-after"] == "60"
    assert refused.headers["x-should-retry"] == "false"  # by itself nothing gets better


async def test_uploads_cannot_race_past_a_quota(admin: As) -> None:
    acme = As(admin.bench, "acme")
    size = (await acme.upload("first", 0)).json()["bytes"]
    await admin.ask("PATCH", "/v1/admin/tenants/acme", json={"adapters": 4})
    answers = await asyncio.gather(*(acme.upload(f"a{i}", i + 1) for i in range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [429] * 5
    await admin.ask("PATCH", "/v1/admin/tenants/acme", json={"adapters": None, "adapter_bytes": 5 * size})
    answers = await asyncio.gather(*(acme.upload(f"b{i}", i + 100) for i in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] + [429] * 5
    assert admin.bench.store.usage("acme").bytes <= 5 * size
    assert (await acme.upload("first", 0)).status_code == 200  # what is there already costs nothing
    assert (await acme.upload("again", 0)).status_code == 201
