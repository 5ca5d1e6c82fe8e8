"""Adapters from the server's own disk: `--lora-modules`, vLLM's load and unload, and the ways out of a root."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, Bench, adapter_files, base_spec

from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore
from loramux.server.api.lora_modules import LoraModuleError, register_modules
from loramux.server.lora_modules import LoraModule


def write(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
async def rooted(make: Callable[..., Any], tmp_path: Path) -> Bench:
    """A server with `tmp_path/root` as its adapter root."""
    write(tmp_path / "root" / "team" / "skill")
    bench: Bench = await make(adapter_root=[tmp_path / "root"])
    return bench


async def load(bench: Bench, path: Any, name: str = "skill", **more: Any) -> Any:
    return await bench.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


@pytest.mark.anyio
async def test_load_and_unload(rooted: Bench, tmp_path: Path) -> None:
    response = await load(rooted, tmp_path / "root/team/skill")
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'skill' added successfully.")
    assert (await rooted.chat(model="skill")).status_code == 200
    error = (await load(rooted, "team/skill")).json()["error"]
    assert (error["param"], error["code"]) == ("lora_name", "name_taken")
    write(tmp_path / "root/team/skill", seed=1)
    assert (await load(rooted, "team/skill", load_inplace=True)).status_code == 200
    assert (await rooted.client.get("/v1/adapters/skill")).json()["version"] == 2
    gone = await rooted.client.post("/v1/unload_lora_adapter", json={"lora_name": "skill", "lora_int_id": 5})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'skill' removed successfully.")
    assert (await rooted.chat(model="skill")).status_code == 404
    again = await rooted.client.post("/v1/unload_lora_adapter", json={"lora_name": "skill"})
    assert again.status_code == 404


@pytest.mark.anyio
async def test_ways_out(rooted: Bench, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in adapter_files():
        (root / "files" / name).symlink_to(outside / name)
    (root / "pipes").mkdir()
    for name in adapter_files():
        os.mkfifo(root / "pipes" / name)
    (tmp_path / "root-look-alike").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_bytes(b"{}")
    paths = [
        outside, "../outside", "team/../../outside", "link", "files", "pipes", "half", "nothing", "/", ".", "",
        "..", root, f"{root}-look-alike", "team/skill\0", "\0", "x" * 5000, "~", "%2e%2e/outside", "/proc/self/cwd",
        "team/skill/adapter_config.json", "link/../outside",
    ]  # fmt: skip
    words = set()
    for path in paths:
        response = await load(rooted, path)
        assert response.status_code in (400, 404), path
        if response.json()["error"]["code"] == "adapter_not_found":
            words.add(response.json()["error"]["message"])
    assert len(words) == 1
    assert str(tmp_path) not in words.pop()
    assert not (await rooted.client.get("/v1/adapters")).json()["data"]


@pytest.mark.anyio
async def test_links_inside_a_root_are_followed(rooted: Bench, tmp_path: Path) -> None:
    snapshot = tmp_path / "root" / "snapshot"
    snapshot.mkdir()
    for name in adapter_files():
        (snapshot / name).symlink_to(tmp_path / "root/team/skill" / name)
    (tmp_path / "root" / "newest").symlink_to(snapshot)
    assert (await load(rooted, "newest")).status_code == 200


@pytest.mark.anyio
async def test_what_is_read_is_checked_as_an_upload(rooted: Bench, tmp_path: Path) -> None:
    (tmp_path / "root/team/skill/adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    assert (await load(rooted, "team/skill")).status_code == 400
    write(tmp_path / "root/team/skill")
    for name in (BASE, "auto", "Upper", "a/b", "../x"):
        assert (await load(rooted, "team/skill", name=name)).status_code in (400, 409)
    assert not list((rooted.store.blob_dir.parent / "uploads").iterdir())


@pytest.mark.anyio
async def test_switched_off_without_a_root(bench: Bench, tmp_path: Path) -> None:
    response = await load(bench, write(tmp_path / "skill"))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "adapter_root_missing")
    assert "--adapter-root" in response.json()["error"]["message"]


@pytest.mark.anyio
@pytest.mark.parametrize("body", [{}, {"lora_name": "a"}, {"lora_path": "b"}, {"lora_name": 1, "lora_path": "b"}])
async def test_mistakes(rooted: Bench, body: dict[str, Any]) -> None:
    assert (await rooted.client.post("/v1/load_lora_adapter", json=body)).status_code == 400


@pytest.mark.anyio
async def test_only_admins_read_the_disk(make: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "root" / "skill")
    bench = await make(adapter_root=[tmp_path / "root"])
    user, _ = bench.state.tenants.create_key("acme")
    admin, _ = bench.state.tenants.create_key("boss", role="admin")
    bench.client.headers["authorization"] = f"Bearer {user}"
    assert (await load(bench, "skill")).status_code == 403
    bench.client.headers["authorization"] = f"Bearer {admin}"
    assert (await load(bench, "skill")).status_code == 200
    assert (await bench.client.get("/v1/adapters/skill")).json()["owner"] == "boss"


def test_from_the_start(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", base_spec(), StoreLimits(min_free_bytes=0))
    module = LoraModule("skill", str(write(tmp_path / "a")))
    register_modules(store, [module])
    register_modules(store, [module])
    assert store.resolve("skill").version == 1
    write(tmp_path / "a", seed=1)
    register_modules(store, [module])
    assert store.resolve("skill").version == 2
    with pytest.raises(LoraModuleError, match="--lora-modules gone=/no/such"):
        register_modules(store, [LoraModule("gone", "/no/such")])
    with pytest.raises(LoraModuleError, match="reserved"):
        register_modules(store, [LoraModule("auto", module.path)])
    store.close()


@pytest.mark.anyio
async def test_several_names_of_the_base(make: Callable[..., Any]) -> None:
    bench = await make(served_model_name=[BASE, "other", "x/third"])
    bench.put("skill")
    ids = [card["id"] for card in (await bench.client.get("/v1/models")).json()["data"]]
    assert ids == [BASE, "other", "x/third", "skill"]
    for name in ids[:3]:
        body = (await bench.chat(model=name)).json()
        assert (body["model"], body["loramux"]) == (name, {"adapters": []})
        card = (await bench.client.get(f"/v1/models/{name}")).json()
        assert (card["id"], card["root"], card["parent"]) == (name, BASE, None)
        fused = await bench.chat(model=name, adapters=[{"name": "skill"}])
        assert fused.json()["loramux"]["adapters"][0]["name"] == "skill"
        assert (await bench.chat(model=BASE, adapters=[{"name": name}])).status_code == 400
    assert all(not request.adapters for request in bench.engine.requests[::2])
