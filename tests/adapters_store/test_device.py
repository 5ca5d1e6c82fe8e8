import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tier_helpers import BYTES_PER_RANK, BookKeeper, put_adapter

from loramux.adapters_store.device import AdapterLoadFailure, DeviceTier, LoadEvent
from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.host import HostTier

Make = Callable[..., "Rig"]


class Rig:
    """A device tier over a budget of `ranks`, and the steps of an engine that only polls."""

    def __init__(self, folder: Path, ranks: int, host_ranks: int = 1000, max_slots: int = 1000, **options: int) -> None:
        self.folder = folder
        self.backend = BookKeeper(ranks, max_slots)
        self.host = HostTier(folder, budget_bytes=host_ranks * BYTES_PER_RANK, dtype=torch.float32, pin_memory=False)
        self.tier = DeviceTier(self.backend, self.host, **options)
        self.events: list[LoadEvent] = []

    def adapter(self, value: float, rank: int = 1, module: str = "m") -> str:
        return put_adapter(self.folder, value, rank, module)

    def poll(self, times: int = 1) -> None:
        for _ in range(times):
            self.events += self.tier.poll()
            time.sleep(0.0005)

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(20000):
            if condition():
                return
            self.poll()
        raise AssertionError("it never happened")

    def get(self, *digests: str) -> tuple[int, ...]:
        found: list[tuple[int, ...]] = []

        def ask() -> bool:
            slots = self.tier.acquire(digests)
            if slots is not None:
                found.append(slots)
            return slots is not None

        self.until(ask)
        return found[0]

    def resident(self) -> set[str]:
        return {info.digest for info in self.tier.residency() if info.device}

    def settle(self) -> None:
        """Polls until the loads that can start have ended."""
        for _ in range(30):
            self.poll()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    rigs: list[Rig] = []

    def build(ranks: int, **options: int) -> Rig:
        rigs.append(Rig(tmp_path, ranks, **options))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.backend.blocked.set()
        rig.tier.close()
        assert rig.backend.bytes_used == 0


def test_acquire_loads_in_the_background_and_returns_the_slots_in_order(make: Make) -> None:
    rig = make(10)
    a, b = rig.adapter(1.0), rig.adapter(2.0)
    assert rig.tier.acquire([b, a]) is None
    slots = rig.get(b, a)
    assert [rig.backend.contents[slot] for slot in slots] == [2.0, 1.0]
    assert set(slots) <= rig.backend.published
    assert {event.digest for event in rig.events} == {a, b}
    assert all(event.error is None and event.seconds >= 0 for event in rig.events)
    assert rig.tier.loads == 2
    assert rig.tier.load_seconds_sum == pytest.approx(sum(e.seconds for e in rig.events))
    assert rig.tier.acquire([a]) == (slots[1],)
    users = {info.digest: info.users for info in rig.tier.residency()}
    assert users == {a: 2, b: 1}
    rig.tier.release([a, a, b])
    with pytest.raises(KeyError):
        rig.tier.release([a])
    rig.poll()
    assert rig.tier.idle()


def test_nothing_is_published_before_the_copies_have_ended(make: Make) -> None:
    rig = make(10)
    a = rig.adapter(1.0)
    rig.backend.not_yet.update(range(10))
    rig.tier.acquire([a])
    rig.settle()
    assert rig.backend.contents
    assert rig.tier.acquire([a]) is None
    rig.backend.not_yet.clear()
    rig.get(a)


def test_the_least_recently_used_idle_adapter_leaves(make: Make) -> None:
    rig = make(2)
    a, b, c = (rig.adapter(v) for v in (1.0, 2.0, 3.0))
    for digest in (a, b):
        rig.get(digest)
        rig.tier.release([digest])
    rig.get(a)
    rig.get(c)
    assert rig.resident() == {a, c}
    assert rig.tier.evictions == 1
    assert rig.host.contains(b)


def test_a_set_is_all_or_nothing_and_keeps_its_first_members_until_it_is_complete(make: Make) -> None:
    rig = make(3)
    a, b, c, d = (rig.adapter(v) for v in (1.0, 2.0, 3.0, 4.0))
    rig.get(d)
    rig.get(a)
    rig.tier.release([a])
    assert rig.tier.acquire([a, b, c]) is None
    assert rig.tier.acquire([b, d]) is None  # a later want must not push out what the first one waits for
    rig.settle()
    assert {a, b} <= rig.resident()
    assert all(info.users == (info.digest == d) for info in rig.tier.residency() if info.device)
    rig.tier.release([d])
    rig.get(a, b, c)
    rig.tier.release([a, b, c])
    rig.get(b, d)


def test_a_large_adapter_gets_its_turn_while_small_ones_stay_popular(make: Make) -> None:
    rig = make(4)
    small = [rig.adapter(float(v)) for v in range(1, 5)]
    large = rig.adapter(9.0, rank=3)
    holders = {digest: rig.get(digest) for digest in small}
    assert rig.tier.acquire([large]) is None
    rig.settle()
    refused = 0
    for step in range(200):  # every small adapter is released and asked for again, as under steady traffic
        digest = small[step % 4]
        if digest in holders:
            rig.tier.release([digest])
            del holders[digest]
        slots = rig.tier.acquire([digest])
        if slots is not None:
            holders[digest] = slots
        else:
            refused += 1
        rig.poll()
        if rig.tier.acquire([large]) is not None:
            break
    else:
        raise AssertionError("the large adapter starved")
    assert refused
    rig.tier.release([large])
    for digest in small:
        if digest not in holders:
            rig.get(digest)


def test_wants_are_served_in_the_order_they_came(make: Make) -> None:
    rig = make(1)
    first = rig.adapter(0.0)
    rig.get(first)
    queue = [rig.adapter(float(v)) for v in range(1, 7)]
    for digest in queue:
        assert rig.tier.acquire([digest]) is None
    rig.tier.release([first])
    served = []
    while len(served) < len(queue):
        rig.poll()
        for digest in reversed(queue):
            if digest not in served and rig.tier.acquire([digest]) is not None:
                served.append(digest)
                rig.tier.release([digest])
    assert served == queue


def test_abandoned_and_unrepeated_wants_stop_blocking(make: Make) -> None:
    rig = make(2, patience_polls=60)
    a, b = rig.adapter(1.0), rig.adapter(2.0)
    large = rig.adapter(3.0, rank=2)
    rig.get(a)
    assert rig.tier.acquire([large]) is None
    rig.settle()
    assert rig.tier.acquire([large]) is None
    assert rig.tier.acquire([a]) is None  # closed to new users
    rig.tier.abandon([large])
    rig.get(a)
    rig.tier.release([a, a])
    rig.get(a)
    assert rig.tier.acquire([large]) is None
    for _ in range(120):
        rig.poll()
        rig.tier.acquire([b])
    assert b in rig.resident()
    rig.get(b)


@pytest.mark.parametrize("reason", ["missing", "damaged", "too large", "unknown module", "copy fails", "no digest"])
def test_what_can_never_be_served_is_raised_once_and_leaves_nothing(make: Make, reason: str) -> None:
    rig = make(4)
    good = rig.adapter(5.0)
    digest = rig.adapter(1.0, rank=5 if reason == "too large" else 1, module="n" if reason == "unknown module" else "m")
    path = blob_path(rig.folder, digest)
    if reason == "missing":
        path.unlink()
    if reason == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    if reason == "copy fails":
        rig.backend.fill_error = RuntimeError("out of memory")
    if reason == "no digest":
        digest = "sha256:zz"
    assert rig.tier.acquire([digest]) is None
    assert rig.tier.acquire([good, digest]) is None
    rig.until(lambda: bool(rig.events) and any(e.error for e in rig.events))
    with pytest.raises(AdapterLoadFailure) as failure:
        rig.tier.acquire([good, digest])
    assert failure.value.digest == digest
    expected = {
        "missing": "cannot be read",
        "damaged": "truncated",
        "too large": "the adapters need 480 bytes of the device's 384",
        "unknown module": "'n'",
        "copy fails": "out of memory",
        "no digest": "not a sha256 digest",
    }
    assert expected[reason] in failure.value.message
    assert str(rig.folder) not in failure.value.message
    rig.backend.fill_error = None
    rig.get(good)
    assert rig.resident() == {good}
    assert rig.backend.bytes_used == BYTES_PER_RANK
    rig.poll()
    assert rig.tier.idle()


def test_a_set_larger_than_the_device_fails_but_its_members_do_not(make: Make) -> None:
    rig = make(4)
    a, b = rig.adapter(1.0, rank=3), rig.adapter(2.0, rank=2)
    assert rig.tier.acquire([a, b]) is None
    with pytest.raises(AdapterLoadFailure, match="need 480 bytes"):
        rig.get(a, b)
    for digest in (a, b):
        rig.get(digest)
        rig.tier.release([digest])


def test_pinned_adapters_stay_and_what_does_not_fit_beside_them_fails(make: Make) -> None:
    rig = make(3)
    pinned, other = rig.adapter(1.0, rank=2), rig.adapter(2.0)
    large = rig.adapter(3.0, rank=2)
    rig.tier.pin(pinned, True)
    rig.until(lambda: pinned in rig.resident())
    rig.get(other)
    rig.tier.release([other])
    rig.tier.acquire([large])
    with pytest.raises(AdapterLoadFailure, match=r"pinned adapters hold 192"):
        rig.get(large)
    assert pinned in rig.resident()
    rig.tier.pin(pinned, False)
    rig.get(large)
    assert pinned not in rig.resident()


def test_pinning_what_cannot_be_loaded_is_reported(make: Make) -> None:
    rig = make(3)
    large = rig.adapter(3.0, rank=4)
    rig.tier.pin(large, True)
    rig.until(lambda: any(e.error for e in rig.events))
    with pytest.raises(AdapterLoadFailure):
        rig.tier.pin(large, True)
    assert not any(info.pinned for info in rig.tier.residency())


def test_a_pin_survives_pressure_before_it_is_resident(make: Make) -> None:
    rig = make(1, patience_polls=5)
    a, b = rig.adapter(1.0), rig.adapter(2.0)
    rig.get(a)
    rig.tier.pin(b, True)
    rig.settle()
    rig.tier.release([a])
    rig.until(lambda: b in rig.resident())
    assert rig.tier.idle()


def test_forget_frees_device_and_host_when_the_last_user_leaves(make: Make) -> None:
    rig = make(3)
    a = rig.adapter(1.0)
    rig.get(a)
    rig.tier.forget(a)
    rig.settle()
    assert a in rig.resident()
    assert rig.tier.idle()
    assert rig.tier.acquire([a]) is not None  # a request that was admitted before the deletion
    rig.tier.release([a])
    rig.settle()
    assert a in rig.resident()
    rig.tier.release([a])
    assert not rig.tier.idle()
    rig.poll()
    assert rig.tier.residency() == []
    assert rig.backend.bytes_used == rig.host.bytes_used == 0
    rig.get(a)  # the blob is there again or still
    rig.tier.release([a])
    rig.settle()
    assert a in rig.resident()


def test_forget_while_loading_frees_after_the_waiting_request(make: Make) -> None:
    rig = make(3)
    a = rig.adapter(1.0)
    rig.backend.blocked.clear()
    rig.tier.acquire([a])
    rig.settle()
    rig.tier.forget(a)
    rig.settle()
    rig.backend.blocked.set()
    rig.get(a)
    rig.tier.release([a])
    rig.poll()
    assert rig.tier.residency() == []


def test_prefetch_fetches_without_holding_and_gives_way_to_wants(make: Make) -> None:
    rig = make(2)
    a, b, c = (rig.adapter(v) for v in (1.0, 2.0, 3.0))
    large = rig.adapter(4.0, rank=9)
    rig.tier.prefetch([a, b, large])
    rig.until(rig.tier.idle)
    assert rig.resident() == {a, b}
    assert [e.digest for e in rig.events if e.error] == [large]
    rig.get(a)
    rig.get(b)
    rig.tier.prefetch([c])
    rig.until(rig.tier.idle)
    assert rig.resident() == {a, b}
    assert rig.host.contains(c)


def test_full_slots_are_full_memory(make: Make) -> None:
    rig = make(100, max_slots=2)
    a, b, c = (rig.adapter(v) for v in (1.0, 2.0, 3.0))
    rig.get(a)
    rig.get(b)
    assert rig.tier.acquire([c]) is None
    rig.settle()
    rig.tier.release([a])
    rig.get(c)
    assert rig.resident() == {b, c}


def test_a_slow_copy_does_not_hold_up_the_adapters_that_are_there(make: Make) -> None:
    rig = make(3)
    a, b = rig.adapter(1.0), rig.adapter(2.0)
    rig.get(a)
    rig.backend.blocked.clear()
    rig.tier.acquire([b])
    rig.settle()
    assert rig.tier.acquire([a]) is not None
    assert rig.tier.acquire([b]) is None
    rig.backend.blocked.set()
    rig.get(b)


def test_the_tiers_bring_no_database_and_no_http() -> None:
    program = (
        "import sys; import loramux.adapters_store.device;"
        "names = ('sqlite3', 'fastapi', 'starlette', 'transformers', 'loramux.adapters_store.registry');"
        "sys.exit(', '.join(n for n in names if n in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
