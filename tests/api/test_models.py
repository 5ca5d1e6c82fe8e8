"""`/v1/models`: the base and the adapters as models."""

import pytest
from api.harness import BASE, Bench

pytestmark = pytest.mark.anyio


async def test_list(bench: Bench) -> None:
    bench.put("b", 1)
    bench.put("a", 2)
    new = bench.put("a", 3)
    body = (await bench.client.get("/v1/models")).json()
    assert body["object"] == "list"
    base, first, second = body["data"]
    assert base == {
        "id": BASE,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "loramux",
        "root": BASE,
        "parent": None,
        "max_model_len": 256,
    }
    assert (first["id"], first["parent"], first["root"], first["created"]) == ("a", BASE, "a@2", new.created_at)
    assert second["id"] == "b"


async def test_more_adapters_than_a_page(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.server.api.state.PAGE", 2)
    for name in "abcde":
        bench.put(name, ord(name))
    body = (await bench.client.get("/v1/models")).json()
    assert [card["id"] for card in body["data"]] == [BASE, *"abcde"]


@pytest.mark.parametrize("path", [BASE, BASE.replace("/", "%2F"), BASE.replace("/", "%2f")])
async def test_names_with_slashes(bench: Bench, path: str) -> None:
    response = await bench.client.get(f"/v1/models/{path}")
    assert response.json()["id"] == BASE


@pytest.mark.parametrize("path", ["skill", "skill@1", "skill%401"])
async def test_adapter(bench: Bench, path: str) -> None:
    bench.put("skill")
    body = (await bench.client.get(f"/v1/models/{path}")).json()
    assert (body["id"], body["root"]) == (path.replace("%40", "@"), "skill@1")


@pytest.mark.parametrize("path", ["nope", "a/b", "skill@2", "..%2f..%2fetc%2fpasswd", "skill/"])
async def test_unknown(bench: Bench, path: str) -> None:
    bench.put("skill")
    response = await bench.client.get(f"/v1/models/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_a_control_character_is_in_no_name(bench: Bench) -> None:
    response = await bench.client.get("/v1/models/%00")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_before_the_engine_is_ready(make) -> None:
    bench = await make()
    bench.engine.info_value, bench.engine.state = None, "starting"
    assert (await bench.client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
