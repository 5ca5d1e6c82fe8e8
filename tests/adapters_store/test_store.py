import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from store_helpers import BASE, config, lora, safetensors, snapshot, upload

from loramux.adapters_store import storage
from loramux.adapters_store.canonical import read_canonical
from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    StoreFull,
    StoreUnavailableError,
    UploadTooLarge,
)
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore

LIMITS = StoreLimits(min_free_bytes=0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = AdapterStore(tmp_path / "s", BASE, LIMITS, reserved_names=("served",), clock=lambda: 1234.5)
    yield opened
    opened.close()


def weights(seed: int) -> bytes:
    return safetensors(lora(seed=seed))


def test_an_upload_becomes_version_one(store: AdapterStore) -> None:
    result = upload(store, "my-adapter", description="reverses", examples=["reverse abc", "spell backwards"])
    adapter = result.adapter
    assert result.created
    assert (adapter.id, adapter.name, adapter.version) == ("my-adapter@1", "my-adapter", 1)
    assert (adapter.status, adapter.last_error, adapter.base_model) == ("ready", None, "tiny-base")
    assert (adapter.rank, adapter.ranks, adapter.target_modules) == (4, (4,), ("q_proj", "v_proj"))
    assert (adapter.created_at, adapter.warnings) == (1234, [])
    assert (adapter.description, adapter.examples) == ("reverses", ["reverse abc", "spell backwards"])
    path = blob_path(store.blob_dir, adapter.digest)
    assert path.stat().st_size == adapter.bytes
    modules = read_canonical(path, dtype=torch.float32)
    assert modules["model.layers.1.self_attn.v_proj"].B.shape == (8, 4)
    assert store.get("my-adapter") == store.resolve("my-adapter") == store.resolve("my-adapter@1") == adapter
    assert list((store.blob_dir.parent / "uploads").iterdir()) == []


def test_same_content_is_the_same_version_and_updates_the_texts(store: AdapterStore) -> None:
    first = upload(store, description="old", examples=["x"]).adapter
    again = upload(store, configuration=config(lora_dropout=0.5))
    assert not again.created
    assert again.adapter == first
    changed = upload(store, description="new")
    assert not changed.created
    assert (changed.adapter.description, changed.adapter.examples) == ("new", ["x"])
    assert len(store.versions("a")) == 1


def test_new_content_is_a_new_version_and_old_ones_stay(store: AdapterStore) -> None:
    one = upload(store, weights=weights(1), description="d").adapter
    two = upload(store, weights=weights(2)).adapter
    assert (two.version, two.description) == (2, "d")
    assert store.resolve("a").digest == two.digest
    assert store.resolve("a@1").digest == one.digest
    back = upload(store, weights=weights(1)).adapter  # newest is what counts
    assert (back.version, back.digest) == (3, one.digest)
    assert [v.version for v in store.versions("a")] == [3, 2, 1]
    assert len(list(store.blob_dir.iterdir())) == 2


def test_a_version_number_never_means_two_contents(store: AdapterStore) -> None:
    one = upload(store, weights=weights(1), description="d").adapter
    upload(store, weights=weights(2))
    store.delete("a")
    again = upload(store, weights=weights(1)).adapter
    assert again.version == 3
    assert again.digest == one.digest
    assert again.description is None
    for version in (1, 2):
        with pytest.raises(AdapterNotFound):
            store.get("a", version)
    assert [v.version for v in store.versions("a")] == [3]


def test_delete_removes_what_nobody_has(store: AdapterStore) -> None:
    shared = upload(store, "a", weights=weights(1)).adapter.digest
    own = upload(store, "a", weights=weights(2)).adapter.digest
    upload(store, "b", weights=weights(1))
    assert store.delete("a") == [own]
    assert not blob_path(store.blob_dir, own).exists()
    assert blob_path(store.blob_dir, shared).exists()
    assert store.delete("b") == [shared]
    assert list(store.blob_dir.iterdir()) == []
    for call in (store.get, store.versions, store.resolve, store.delete):
        with pytest.raises(AdapterNotFound) as refusal:
            call("a")
        assert refusal.value.status == 404


def test_a_lease_keeps_the_blob(store: AdapterStore) -> None:
    digest = upload(store).adapter.digest
    path = blob_path(store.blob_dir, digest)
    with store.lease(digest):
        store.acquire_lease(digest)
        assert store.delete("a") == [digest]
        assert path.exists()
        store.acquire_lease(digest)  # a request resolved before the deletion
        store.release_lease(digest)
        store.release_lease(digest)
        assert path.exists()
    assert not path.exists()
    with pytest.raises(AdapterNotFound):
        store.acquire_lease(digest)
    with pytest.raises(KeyError):
        store.release_lease(digest)


def test_content_that_comes_back_while_leased_stays(store: AdapterStore) -> None:
    digest = upload(store).adapter.digest
    with store.lease(digest):
        store.delete("a")
        assert upload(store).adapter.digest == digest
    assert blob_path(store.blob_dir, digest).exists()


def test_owners_do_not_see_each_other(store: AdapterStore) -> None:
    mine = upload(store, owner="me", weights=weights(1)).adapter
    theirs = upload(store, owner="them", weights=weights(1)).adapter
    assert (mine.version, theirs.version) == (1, 1)
    with pytest.raises(AdapterNotFound):
        store.get("a")
    assert store.list(owner="default").data == []
    assert store.delete("a", owner="me") == []
    assert store.get("a", owner="them") == theirs


def test_list_pages_by_name(store: AdapterStore) -> None:
    for name in ("c", "a", "b", "d"):
        upload(store, name)
    upload(store, "b", weights=weights(9))
    store.delete("c")
    first = store.list(limit=2)
    assert [v.id for v in first.data] == ["a@1", "b@2"]
    assert first.has_more
    assert [v.id for v in store.list(limit=2, after=first.data[-1].id).data] == ["d@1"]
    assert not store.list(limit=1, after="b").has_more
    assert store.list(after="zz").data == []
    with pytest.raises(InvalidAdapter):
        store.list(after="\ud800")


def test_update_changes_only_what_is_given(store: AdapterStore) -> None:
    upload(store, description="d", examples=["x"])
    assert store.update("a", description="e").examples == ["x"]
    assert store.update("a", examples=None).description == "e"
    changed = store.update("a")
    assert (changed.description, changed.examples, changed.version) == ("e", None, 1)
    with pytest.raises(AdapterNotFound):
        store.update("b", description="x")


BAD_NAMES = [
    "",
    "A",
    "-a",
    ".a",
    "_a",
    "..",
    "../a",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "%2e%2e",
    "a\0",
    "a\n",
    "a b",
    "a@1",
    "a:b",
    "а",  # Cyrillic
    "ａ",
    "a" * 65,
    "\ud800",
    "a'; DROP TABLE adapters; --",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_and_never_found(store: AdapterStore, name: str) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        upload(store, name)
    assert (refusal.value.code, refusal.value.field) == ("invalid_name", "name")
    assert refusal.value.message.encode()
    for call in (store.get, store.versions, store.delete, store.update):
        with pytest.raises(AdapterNotFound):
            call(name)
    assert snapshot(store.blob_dir.parent) == {}


@pytest.mark.parametrize(
    "model", ["a@", "a@0", "a@01", "a@-1", "a@2", "a@x", "a@1@1", "a@9999999999", "@1", "a@１", "b"]
)
def test_what_does_not_resolve_is_not_found(store: AdapterStore, model: str) -> None:
    upload(store)
    with pytest.raises(AdapterNotFound):
        store.resolve(model)


@pytest.mark.parametrize("name", ["auto", "tiny-base", "served"])
def test_reserved_names_conflict(store: AdapterStore, name: str) -> None:
    with pytest.raises(AdapterConflict) as refusal:
        upload(store, name)
    assert (refusal.value.status, refusal.value.code) == (409, "name_reserved")


FILE_NAMES = {
    "adapter_model.bin": "pickle_refused",
    "adapter_model.BIN": "pickle_refused",
    "x.pt": "pickle_refused",
    "model.pkl": "pickle_refused",
    "../adapter_config.json": "invalid_file_name",
    "/adapter_config.json": "invalid_file_name",
    "adapter_config.json\0": "invalid_file_name",
    "Adapter_Config.json": "invalid_file_name",
    "adapter_config.json ": "invalid_file_name",
    "README.md": "invalid_file_name",
    "a.zip": "invalid_file_name",
    "": "invalid_file_name",
    "x" * 10_000: "invalid_file_name",
}


@pytest.mark.parametrize("filename", FILE_NAMES)
def test_other_files_are_refused(store: AdapterStore, filename: str) -> None:
    with store.begin_upload() as parts, pytest.raises(InvalidAdapter) as refusal:
        parts.open_file(filename)
    assert (refusal.value.code, refusal.value.field) == (FILE_NAMES[filename], "files")
    assert len(refusal.value.message) < 400


def test_files_come_once_and_all(store: AdapterStore) -> None:
    with store.begin_upload() as parts:
        parts.open_file("adapter_config.json").write(config())
        with pytest.raises(InvalidAdapter, match="came twice"):
            parts.open_file("adapter_config.json")
        with pytest.raises(InvalidAdapter, match=r"no adapter_model\.safetensors"):
            store.commit(parts, name="a")


def test_limits_bind_while_bytes_arrive(tmp_path: Path) -> None:
    limits = StoreLimits(min_free_bytes=0, max_upload_bytes=1000, max_config_bytes=2000)
    store = AdapterStore(tmp_path, BASE, limits)
    with store.begin_upload() as parts:
        sink = parts.open_file("adapter_model.safetensors")
        sink.write(b"x" * 1000)
        with pytest.raises(UploadTooLarge, match="1000 bytes") as refusal:
            sink.write(b"x")
        assert refusal.value.status == 413
        with pytest.raises(UploadTooLarge, match="2000 bytes"):
            parts.open_file("adapter_config.json").write(b"x" * 2001)
    assert snapshot(tmp_path) == {}
    store.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("description", "x" * 5000),
        ("description", "\ud800"),
        ("description", 7),
        ("examples", "text"),
        ("examples", [1]),
        ("examples", ["x" * 5000]),
        ("examples", ["x"] * 1000),
        ("examples", {"a": 1}),
    ],
)
def test_bad_texts_name_their_field(store: AdapterStore, field: str, value: Any) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        upload(store, **{field: value})
    assert refusal.value.field == field
    upload(store)
    with pytest.raises(InvalidAdapter):
        store.update("a", **{field: value})


def test_a_refused_upload_changes_nothing(store: AdapterStore) -> None:
    upload(store, description="d")
    before, listed = snapshot(store.blob_dir.parent), store.list().data
    bad = bytearray(weights(3))
    bad[-4:] = b"\xff\xff\xff\x7f"
    for options in ({"weights": bytes(bad)}, {"configuration": b"{}"}, {"weights": weights(3)[:-1]}):
        with pytest.raises(AdapterError):
            upload(store, description="e", **options)
    assert snapshot(store.blob_dir.parent) == before
    assert store.list().data == listed


@pytest.mark.parametrize("where", ["config", "weights", "canonical", "rename", "registry"])
def test_a_full_disk_changes_nothing(store: AdapterStore, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    upload(store)
    before, listed = snapshot(store.blob_dir.parent), store.list().data
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors", "canonical": "canonical"}
    real_open = Path.open

    def full(path: Path, mode: str = "r", *args: Any) -> Any:
        return open("/dev/full", "wb", buffering=0) if path.name == names.get(where) else real_open(path, mode, *args)

    def no_rename(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    if where == "rename":
        monkeypatch.setattr(Path, "replace", no_rename)
    if where == "registry":
        pages = store._registry.connection.execute("PRAGMA page_count").fetchone()[0]
        store._registry.connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for number in range(1 if where != "registry" else 200):
            upload(store, f"b{number}", weights=weights(1), description="d" * 4000)

    with pytest.raises(StoreFull) as refusal:
        fill()
    assert refusal.value.status == 507
    monkeypatch.undo()
    if where != "registry":
        assert snapshot(store.blob_dir.parent) == before
        assert store.list().data == listed
    else:
        blobs = {v.digest.replace(":", "-") for v in store.list(limit=500).data}
        assert {p.name for p in store.blob_dir.iterdir()} == blobs
    store._registry.connection.execute("PRAGMA max_page_count = 1000000")
    assert upload(store, "c", weights=weights(2)).created


def test_the_free_space_reserve_is_kept(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, StoreLimits(min_free_bytes=1 << 60))
    with pytest.raises(StoreFull):
        store.begin_upload()
    store.close()


def test_bounds_of_the_store(tmp_path: Path) -> None:
    size = upload(AdapterStore(tmp_path / "x", BASE, LIMITS)).adapter.bytes
    limits = StoreLimits(min_free_bytes=0, max_total_bytes=2 * size, max_adapters=3, max_versions=2)
    store = AdapterStore(tmp_path / "y", BASE, limits)
    upload(store, "a", weights=weights(1))
    upload(store, "a", weights=weights(2))
    with pytest.raises(StoreFull, match="2 versions"):
        upload(store, "a", weights=weights(1))
    with pytest.raises(StoreFull, match="bytes of adapters"):
        upload(store, "b", weights=weights(3))
    upload(store, "b", weights=weights(1))
    upload(store, "c", weights=weights(2))
    with pytest.raises(StoreFull, match="3 adapters"):
        upload(store, "d", weights=weights(2))
    store.delete("a")
    upload(store, "a", weights=weights(2))
    store.close()


def test_concurrent_uploads_and_deletions_stay_consistent(store: AdapterStore) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(6):
                name, content = f"n{(seed + i) % 3}", weights((seed * i) % 4)
                digest = upload(store, name, weights=content, piece=10_000).adapter.digest
                try:
                    with store.lease(digest):
                        assert blob_path(store.blob_dir, digest).exists()
                    if i % 3 == 2:
                        store.delete(name)
                except AdapterNotFound:
                    pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    digests = {v.digest for page in [store.list(limit=10).data] for n in page for v in store.versions(n.name)}
    assert {p.name for p in store.blob_dir.iterdir()} == {d.replace(":", "-") for d in digests}


def test_reopening_finds_everything_and_sweeps_the_rest(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, LIMITS)
    kept = upload(store, "kept", weights=weights(1)).adapter
    lost = upload(store, "lost", weights=weights(2)).adapter
    cut = upload(store, "cut", weights=weights(3)).adapter
    store.close()
    blob_path(store.blob_dir, lost.digest).unlink()
    os.truncate(blob_path(store.blob_dir, cut.digest), 100)
    (store.blob_dir / "sha256-unreferenced").write_bytes(b"x")
    (tmp_path / "uploads" / "0123").mkdir()
    (tmp_path / "uploads" / "0123" / "adapter_config.json").write_bytes(b"x")
    store = AdapterStore(tmp_path, BASE, LIMITS)
    assert store.get("kept") == kept
    assert store.get("lost").status == "failed"
    assert "missing" in (store.get("lost").last_error or "")
    assert "size" in (store.get("cut").last_error or "")
    assert list((tmp_path / "uploads").iterdir()) == []
    assert len(list(store.blob_dir.iterdir())) == 2
    assert upload(store, "lost", weights=weights(2)).adapter == lost  # the same content heals it
    assert upload(store, "other", weights=weights(3)).created
    assert store.get("cut") == cut
    store.close()


def test_two_processes_cannot_open_one_store(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, LIMITS)
    with pytest.raises(StoreUnavailableError, match="another process"):
        AdapterStore(tmp_path, BASE, LIMITS)
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from store_helpers import BASE; from loramux.adapters_store.store import AdapterStore\n"
        "AdapterStore(pathlib.Path(sys.argv[1]), BASE)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": _src()})
    assert done.returncode != 0
    assert "another process has this adapter store open" in done.stderr
    store.close()
    AdapterStore(tmp_path, BASE, LIMITS).close()


def _src() -> str:
    return str(Path(storage.__file__).parents[2])


def test_a_registry_of_another_version_is_refused(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, LIMITS)
    store._registry.connection.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StoreUnavailableError, match="schema version 99"):
        AdapterStore(tmp_path, BASE, LIMITS)


def test_examples_are_stored_as_they_came(store: AdapterStore) -> None:
    examples = ["ümläut", "日本", '"quotes"', "'; DROP TABLE versions; --", "line\nbreak", ""]
    assert upload(store, examples=examples, description="'); --").adapter.examples == examples
    assert json.dumps(store.get("a").examples) == json.dumps(examples)
