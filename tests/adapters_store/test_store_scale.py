"""Ten thousand registered adapters: opening, listing and resolving do a fixed number of queries."""

from pathlib import Path

import pytest
from store_helpers import BASE, upload

from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.registry import NewVersion
from loramux.adapters_store.store import AdapterStore

LIMITS = StoreLimits(min_free_bytes=0)


def fill(store: AdapterStore, count: int) -> None:
    registry = store._registry
    with registry.transaction():
        for i in range(count):
            digest = f"sha256:{i:064x}"
            registry.add_version("default", f"a{i:05}", NewVersion(digest, 1, "tiny-base", [4], ["q_proj"], [], 0))
            blob_path(store.blob_dir, digest).write_bytes(b"x")


def statements(root: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Statements that opening, and each call, executes beside `count` adapters."""
    store = AdapterStore(root, BASE, LIMITS)
    fill(store, count)
    store.close()
    traced: list[str] = []
    recover = AdapterStore._recover

    def traced_recovery(self: AdapterStore) -> None:
        self._registry.connection.set_trace_callback(traced.append)
        recover(self)

    monkeypatch.setattr(AdapterStore, "_recover", traced_recovery)
    store = AdapterStore(root, BASE, LIMITS)
    monkeypatch.undo()
    found = {"open": len(traced)}

    def resolve_foreign() -> None:
        with pytest.raises(AdapterNotFound):
            store.resolve("default/a00030", tenant="other")

    calls = {
        "visible": lambda: store.visible("default", limit=50, after="a00020"),
        "foreign": lambda: store.visible("other", limit=50),
        "resolve foreign": resolve_foreign,
        "usage": lambda: store.usage("default"),
        "list": lambda: store.list(limit=50, after="a00020"),
        "resolve": lambda: store.resolve("a00030@1"),
        "lease": lambda: store.acquire_lease(f"sha256:{30:064x}"),
        "upload": lambda: upload(store, "new"),
        "delete": lambda: store.delete("a00031"),
    }
    for name, call in calls.items():
        traced.clear()
        call()
        found[name] = len(traced)
    store.close()
    return found


def test_ten_thousand_adapters_cost_as_many_queries_as_a_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = statements(tmp_path / "few", 100, monkeypatch)
    many = statements(tmp_path / "many", 10_000, monkeypatch)
    assert few == many
    assert max(few.values()) <= 20


def test_listing_and_resolving_read_by_index(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, LIMITS)
    connection = store._registry.connection
    traced: list[str] = []
    connection.set_trace_callback(traced.append)
    store.list(limit=5, after="x")
    upload(store, "a")
    store.resolve("a")
    store.resolve("a@1")
    store.versions("a")
    store.resolve("default/a")
    store.visible("default", limit=5)
    store.visible_keys("default")
    store.every(limit=5, after="a")
    store.usage("default")
    store.delete("a")
    connection.set_trace_callback(None)
    plans = [
        step[3]
        for query in traced
        if query.lstrip().startswith("SELECT")
        and "FROM adapters a" in query
        and "visibility = 'shared' AND" not in query
        for step in connection.execute(f"EXPLAIN QUERY PLAN {query}")
    ]
    assert len(plans) >= 9
    # what is public is read whole, from an index of nothing else; what is shared with one tenant is sorted when read
    assert {step for step in plans if step.startswith("SCAN")} <= {"SCAN a USING INDEX adapters_public"}
    assert not [step for step in plans if "TEMP B-TREE" in step]
    store.close()
