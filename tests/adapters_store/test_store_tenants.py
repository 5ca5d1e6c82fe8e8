"""What a tenant may use of the store, what it may keep there, and that no answer tells of others' adapters."""

import threading
from pathlib import Path

import pytest
from store_helpers import BASE, lora, safetensors, upload

from loramux.adapters_store.errors import AdapterConflict, AdapterNotFound, InvalidAdapter, QuotaExceeded, StoreFull
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.registry import Sharing
from loramux.adapters_store.store import AdapterStore, StoreQuota


@pytest.fixture
def store(tmp_path: Path):
    made = AdapterStore(tmp_path, BASE, StoreLimits(min_free_bytes=0, max_shares=3), reserved_names={"team/base"})
    yield made
    made.close()


def weights(seed: int) -> bytes:
    return safetensors(lora(seed=seed))


def test_who_may_use_what(store: AdapterStore) -> None:
    for seed, (name, sharing) in enumerate(
        {"own": None, "given": Sharing("shared", ("you", "you")), "open": Sharing("public")}.items()
    ):
        upload(store, name, owner="me", weights=weights(seed), sharing=sharing)
    upload(store, "open", owner="you", weights=weights(9))
    assert [v.address("me") for v in store.visible("me").data] == ["given", "open", "own"]
    assert [v.address("you") for v in store.visible("you").data] == ["open", "me/given", "me/open"]
    assert [v.address("default") for v in store.visible("default").data] == ["me/open", "you/open"][:1]
    assert store.visible_keys("you") == {"you/open", "me/given", "me/open"}
    assert store.visible_keys("default") == {"me/open"}
    assert store.resolve("me/open@1", tenant="you").key == "me/open"
    assert store.resolve("you/open", tenant="you") == store.resolve("open", tenant="you")
    assert store.get("given", owner="me").shared_with == ("you",)
    for name, tenant in (
        ("own", "you"),
        ("me/own", "you"),
        ("me/given", "third"),
        ("given", "you"),
        ("me/own", "default"),
    ):
        with pytest.raises(AdapterNotFound):
            store.resolve(name, tenant=tenant)
    for address in ("me/open", "me/given", "own", "none/x", "me/none"):
        with pytest.raises(AdapterNotFound):
            store.own(address, owner="you")
    assert store.own("you/open", owner="you").version == 1
    assert [v.key for v in store.every(limit=2).data] == ["me/given", "me/open"]
    assert [v.key for v in store.every(after="me/open").data] == ["me/own", "you/open"]
    assert store.by_key("me/own").owner == "me"


def test_pages_of_what_others_have(store: AdapterStore) -> None:
    for seed, owner in enumerate(("a", "b", "c", "d")):
        sharing = Sharing("public") if seed % 2 else Sharing("shared", ("me",))
        for name in ("x", "y"):
            upload(store, name, owner=owner, weights=weights(seed), sharing=sharing)
    upload(store, "z", owner="me", weights=weights(7))
    everything = [v.address("me") for v in store.visible("me", limit=100).data]
    assert everything == ["z", "a/x", "a/y", "b/x", "b/y", "c/x", "c/y", "d/x", "d/y"]
    for limit in (1, 2, 3, 8):
        seen: list[str] = []
        after = None
        while True:
            page = store.visible("me", limit=limit, after=after)
            seen += [v.address("me") for v in page.data]
            if not page.has_more:
                break
            after = f"{seen[-1]}@1"
        assert seen == everything


def test_generation_grows_with_every_change_of_what_may_be_used(store: AdapterStore) -> None:
    seen = [store.generation]

    def grew() -> bool:
        seen.append(store.generation)
        return seen[-1] > seen[-2]

    upload(store, "a", weights=weights(1))
    assert grew()
    upload(store, "a", weights=weights(2))
    assert grew()
    store.update("a", sharing=Sharing("public"))
    assert grew()
    store.resolve("a")
    store.visible_keys("me")
    assert not grew()
    store.delete("a")
    assert grew()


def test_sharing_is_checked_and_ends_with_the_name(store: AdapterStore) -> None:
    wrong = [
        Sharing("shared"), Sharing("public", ("you",)), Sharing("private", ("you",)), Sharing("shared", ("You",)),
        Sharing("shared", ("a", "b", "c", "d")), Sharing("secret"),  # type: ignore[arg-type]
        Sharing("shared", ("' OR 1=1",)),
    ]  # fmt: skip
    upload(store, "a", owner="me", weights=weights(1), sharing=Sharing("public"))
    for sharing in wrong:
        with pytest.raises(InvalidAdapter):
            store.update("a", sharing=sharing, owner="me")
        with pytest.raises(InvalidAdapter):
            upload(store, "b", owner="me", weights=weights(1), sharing=sharing)
    assert [v.name for v in store.visible("me").data] == ["a"]
    assert store.get("a", owner="me").visibility == "public"
    store.delete("a", owner="me")
    assert upload(store, "a", owner="me", weights=weights(1)).adapter.visibility == "private"


def test_quotas_count_for_each_and_hold_together(store: AdapterStore) -> None:
    size = upload(store, "a", owner="them", weights=weights(1)).adapter.bytes
    two = StoreQuota(adapters=2)
    upload(store, "a", owner="me", weights=weights(1), quota=two)
    upload(store, "a", owner="me", weights=weights(2), quota=two)  # a version is no name
    upload(store, "b", owner="me", weights=weights(1), quota=two)
    with pytest.raises(QuotaExceeded, match="quota is 2"):
        upload(store, "c", owner="me", weights=weights(1), quota=two)
    assert store.usage("me").adapters == 2
    assert store.usage("me").bytes == 2 * size  # equal content once, whoever else has it
    with pytest.raises(QuotaExceeded, match=f"quota of {3 * size - 1}"):
        upload(store, "a", owner="me", weights=weights(3), quota=StoreQuota(bytes=3 * size - 1))
    upload(store, "a", owner="me", weights=weights(3), quota=StoreQuota(bytes=3 * size))
    assert upload(store, "a", owner="me", weights=weights(3), quota=StoreQuota(adapters=0, bytes=0)).created is False
    store.delete("a", owner="me")
    assert store.usage("me").bytes == size


def test_quotas_cannot_be_raced_past(store: AdapterStore) -> None:
    errors: list[Exception] = []

    def work(seed: int) -> None:
        try:
            upload(store, f"a{seed}", owner="me", weights=weights(seed), quota=StoreQuota(adapters=3))
        except QuotaExceeded as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 5
    assert store.usage("me").adapters == 3


def test_a_full_store_says_the_same_of_content_that_others_have(tmp_path: Path) -> None:
    with_room = AdapterStore(tmp_path, BASE, StoreLimits(min_free_bytes=0))
    size = upload(with_room, "a", owner="them", weights=weights(1)).adapter.bytes
    with_room.close()
    full = AdapterStore(tmp_path, BASE, StoreLimits(min_free_bytes=0, max_total_bytes=size))
    messages = set()
    for seed in (1, 2):
        with pytest.raises(StoreFull) as caught:
            upload(full, "b", owner="me", weights=weights(seed))
        messages.add(str(caught.value))
    assert len(messages) == 1
    upload(full, "again", owner="them", weights=weights(1))
    full.close()


def test_a_base_named_like_a_tenants_adapter(store: AdapterStore) -> None:
    with pytest.raises(AdapterConflict):
        upload(store, "base", owner="team", weights=weights(1))
    upload(store, "base", owner="other", weights=weights(1))
