"""`/v1/adapters`: upload, list, look, change, delete."""

import json
from typing import Any

import httpx
import pytest
from api.harness import BASE, Bench, adapter_files, parts

from loramux.server.engine.protocol import AdapterLoadError, AdapterResidency, EngineStats

pytestmark = pytest.mark.anyio


async def test_upload_and_use(bench: Bench) -> None:
    response = await bench.upload("skill", description="does things", examples='["do it", "now"]')
    assert response.status_code == 201
    body = response.json()
    assert set(body) == {
        "id", "object", "name", "version", "digest", "status", "base_model", "rank", "target_modules", "bytes",
        "created_at", "description", "examples", "warnings", "pinned", "tier", "last_error", "owner", "visibility",
        "shared_with",
    }  # fmt: skip
    assert body["digest"].startswith("sha256:")
    assert (body["object"], body["name"], body["version"], body["status"]) == ("adapter", "skill", 1, "ready")
    assert (body["base_model"], body["rank"], body["last_error"], body["tier"]) == (BASE, 2, None, "disk")
    assert (body["description"], body["examples"]) == ("does things", ["do it", "now"])
    assert (body["owner"], body["visibility"], body["shared_with"]) == ("default", "private", [])
    assert (await bench.chat(model="skill")).json()["loramux"]["adapters"][0]["version"] == 1


async def test_same_content_is_the_same_version(bench: Bench) -> None:
    first = await bench.upload("skill", 1)
    again = await bench.upload("skill", 1)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    other = await bench.upload("skill", 2)
    assert (other.status_code, other.json()["version"]) == (201, 2)
    assert (await bench.chat(model="skill")).headers["x-loramux-adapters"] == "skill@2;w=1"


async def post(bench: Bench, fields: list[tuple[str, Any]], **headers: str) -> httpx.Response:
    return await bench.client.post("/v1/adapters", files=fields, headers=headers)


async def test_parts_in_any_order(bench: Bench) -> None:
    first, second = parts(adapter_files())
    name = ("name", (None, b"skill"))
    for order in ([name, first, second], [second, first, name], [second, name, first]):
        response = await post(bench, order)
        assert response.status_code in (200, 201), response.text
        assert response.json()["version"] == 1


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        (lambda p: p[1:], "name", "Missing"),
        (lambda p: p[:1], "files", "No files"),
        (lambda p: p[:2], "files", "adapter_model.safetensors"),
        (lambda p: [p[0], p[2]], "files", "adapter_config.json"),
        (lambda p: [*p, p[1]], "files", "twice"),
        (lambda p: [*p, p[0]], "name", "twice"),
        (lambda p: [*p, ("colour", (None, b"red"))], "colour", "Unrecognized"),
        (lambda p: [*p, ("weights", ("x.safetensors", b"x"))], "weights", "files"),
        (lambda p: [*p, ("files", (None, b"x"))], "files", "file name"),
        (lambda p: [*p, ("examples", (None, b"not json"))], "examples", "JSON list"),
        (lambda p: [*p, ("examples", (None, b'{"a": 1}'))], "examples", "JSON list"),
        (lambda p: [*p, ("examples", (None, b"[1]"))], "examples", "JSON list"),
        (lambda p: [*p, ("examples", (None, b"[" * 10_000))], "examples", "JSON list"),
        (lambda p: [*p, ("shared_with", (None, b"them"))], "shared_with", "JSON list"),
        (lambda p: [*p, ("shared_with", (None, b"[]"))], "shared_with", "exactly when"),
        (lambda p: [*p, ("shared_with", (None, b'["../x"]'))], "shared_with", "no tenant's name"),
        (lambda p: [*p, ("visibility", (None, b"secret"))], "visibility", "one of"),
        (lambda p: [*p, ("visibility", (None, b"shared"))], "shared_with", "exactly when"),
        (lambda p: [*p, ("description", (None, b"\xff\xfe"))], "description", "UTF-8"),
        (lambda p: [*p, ("description", (None, b"x" * 20_000))], "description", "longer"),
        (lambda p: [*p, *[("files", (None, b"x"))] * 20], "files", "file name"),
    ],
)
async def test_forms_that_are_refused(bench: Bench, change: Any, param: str, words: str) -> None:
    response = await post(bench, change([("name", (None, b"skill")), *parts(adapter_files())]))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert not any(bench.store.blob_dir.iterdir())
    assert not any((bench.store.blob_dir.parent / "uploads").iterdir())


@pytest.mark.parametrize(
    "filename",
    ["adapter_model.bin", "../adapter_config.json", "/etc/passwd", "adapter_config.json\x00", "..\\adapter_config.json",
     "%2e%2e/adapter_config.json", "adapter_config.json ", "ADAPTER_CONFIG.JSON", ""],
)  # fmt: skip
async def test_file_names_never_become_paths(bench: Bench, filename: str) -> None:
    quoted = filename.replace("\\", "\\\\")
    head = f'--x\r\ncontent-disposition: form-data; name="files"; filename="{quoted}"\r\n\r\n'
    body = head.encode() + b"{}\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await bench.client.post("/v1/adapters", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "files"
    assert "/" not in response.json()["error"]["message"].replace(filename, "")


@pytest.mark.parametrize("name", ["Skill", "a b", "", "../x", "a/b", "x" * 65, "-a", "é", "a\x00"])
async def test_bad_names(bench: Bench, name: str) -> None:
    response = await bench.upload(name)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "name"


@pytest.mark.parametrize("name", ["auto"])
async def test_reserved_names(bench: Bench, name: str) -> None:
    response = await bench.upload(name)
    assert response.status_code == 409
    assert response.headers["x-should-retry"] == "false"


async def test_the_stores_refusals_reach_the_client(bench: Bench) -> None:
    for files, status in ((adapter_files(width=16), 400), ({**adapter_files(), "adapter_config.json": b"{"}, 400)):
        response = await bench.client.post("/v1/adapters", data={"name": "skill"}, files=parts(files))
        assert response.status_code == status
        error = response.json()["error"]
        assert error["code"]
        assert str(bench.store.blob_dir.parent) not in response.text


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 500, b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\nskill'),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 10_000 + b": b\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 100 + b"\r\n"),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
    ],
)
async def test_malformed_bodies(bench: Bench, content_type: str, body: bytes) -> None:
    response = await bench.client.post("/v1/adapters", content=body, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_upload_size_limit(make) -> None:
    bench = await make(adapter_max_bytes=1 << 20)
    files = {**adapter_files(), "adapter_model.safetensors": b"x" * (3 << 20)}
    response = await bench.client.post("/v1/adapters", data={"name": "skill"}, files=parts(files))
    assert response.status_code == 413
    assert not any((bench.store.blob_dir.parent / "uploads").iterdir())


async def test_list_by_pages(bench: Bench) -> None:
    for name in "abcde":
        bench.put(name, ord(name))
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await bench.client.get("/v1/adapters", params={"limit": "2", **after})).json()
        assert page["object"] == "list"
        seen += [item["name"] for item in page["data"]]
        assert page["first_id"] == page["data"][0]["id"]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == list("abcde")
    empty = (await bench.client.get("/v1/adapters", params={"after": "zzz"})).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1e3", "99999"])
async def test_bad_limits(bench: Bench, limit: str) -> None:
    response = await bench.client.get("/v1/adapters", params={"limit": limit})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"


async def test_get(bench: Bench) -> None:
    bench.put("skill", 1)
    new = bench.put("skill", 2)
    assert (await bench.client.get("/v1/adapters/skill")).json()["digest"] == new.digest
    assert (await bench.client.get("/v1/adapters/skill@1")).json()["version"] == 1
    for path in ("nope", "skill@3", "skill@x"):
        response = await bench.client.get(f"/v1/adapters/{path}")
        assert response.status_code == 404
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_tiers(bench: Bench) -> None:
    digest = bench.put("skill").digest
    await bench.chat(model="skill")
    for device, host, tier in ((True, True, "device"), (False, True, "host"), (False, False, "disk")):
        bench.engine.stats = EngineStats(adapters=(AdapterResidency(digest, device, host, False, 0, 10),))
        assert (await bench.client.get("/v1/adapters/skill")).json()["tier"] == tier


async def test_patch(bench: Bench) -> None:
    bench.put("skill", description="old", examples=["a"])
    patch = bench.client.patch
    body = (await patch("/v1/adapters/skill", json={"description": "new"})).json()
    assert (body["description"], body["examples"]) == ("new", ["a"])
    body = (await patch("/v1/adapters/skill", json={"examples": ["b"], "description": None})).json()
    assert (body["description"], body["examples"]) == (None, ["b"])
    assert (await patch("/v1/adapters/skill", json={})).json() == body
    assert (await patch("/v1/adapters/nope", json={"description": "x"})).status_code == 404
    for bad, param in (({"name": "x"}, "name"), ({"examples": [1]}, "examples[0]"), ({"pinned": "x"}, "pinned")):
        response = await patch("/v1/adapters/skill", json=bad)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    response = await patch("/v1/adapters/skill", json={"description": "x" * 100_000})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "description")


async def test_pins_follow_the_newest_version(bench: Bench) -> None:
    old = bench.put("skill", 1)
    url = "/v1/adapters/skill"
    assert (await bench.client.patch(url, json={"pinned": True})).json()["pinned"] is True
    assert bench.engine.pins == [(old.digest, True)]
    new = (await bench.upload("skill", 2)).json()
    assert new["pinned"] is True
    assert bench.engine.pins[1:] == [(new["digest"], True), (old.digest, False)]
    assert (await bench.client.patch(url, json={"pinned": False})).json()["pinned"] is False
    assert bench.engine.pins[-1] == (new["digest"], False)


async def test_a_pin_that_cannot_be_had(bench: Bench) -> None:
    bench.put("skill")
    bench.engine.pin_error = AdapterLoadError("larger than the device's budget")
    response = await bench.client.patch("/v1/adapters/skill", json={"pinned": True})
    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "false"
    assert (await bench.client.get("/v1/adapters/skill")).json()["pinned"] is False
    bench.engine.state = "dead"
    assert (await bench.client.patch("/v1/adapters/skill", json={"pinned": True})).status_code == 503


async def test_a_failed_repin_does_not_fail_the_upload(bench: Bench) -> None:
    await bench.upload("skill", 1)
    await bench.client.patch("/v1/adapters/skill", json={"pinned": True})
    bench.engine.pin_error = AdapterLoadError("no room")
    response = await bench.upload("skill", 2)
    assert (response.status_code, response.json()["pinned"]) == (201, False)


async def test_delete(bench: Bench) -> None:
    bench.put("other", 1)
    shared = bench.put("skill", 1)
    own = bench.put("skill", 2)
    response = await bench.client.delete("/v1/adapters/skill")
    assert response.json() == {"id": own.id, "object": "adapter.deleted", "name": "skill", "deleted": True}
    assert bench.engine.forgotten == [own.digest]
    assert (await bench.chat(model="skill")).status_code == 404
    assert (await bench.chat(model="other")).status_code == 200
    assert bench.store.get("other").digest == shared.digest
    assert (await bench.client.delete("/v1/adapters/skill")).status_code == 404
    assert (await bench.upload("skill", 3)).status_code == 201


async def test_examples_may_be_empty(bench: Bench) -> None:
    assert (await bench.upload("skill", examples="")).json()["examples"] == []
    assert (await bench.upload("skill", examples=json.dumps(["é"]))).json()["examples"] == ["é"]
