"""Random use of the device tier under a tiny budget, from many requests and from many threads."""

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tier_helpers import BYTES_PER_RANK, BookKeeper, put_adapter

from loramux.adapters_store.device import DeviceTier
from loramux.adapters_store.host import HostTier

BUDGET = 8


@dataclass
class Request:
    digests: tuple[str, ...]
    steps_left: int
    slots: tuple[int, ...] | None = None
    waited: int = 0


def build(folder: Path, loader_threads: int) -> tuple[BookKeeper, HostTier, DeviceTier, dict[str, float]]:
    values = {put_adapter(folder, float(v), rank=1 + v % 5): float(v) for v in range(1, 16)}
    backend = BookKeeper(BUDGET)
    host = HostTier(folder, budget_bytes=10 * BYTES_PER_RANK, dtype=torch.float32, pin_memory=False)
    return backend, host, DeviceTier(backend, host, loader_threads=loader_threads), values


def random_set(rng: random.Random, values: dict[str, float]) -> tuple[str, ...]:
    """Two adapters at most, of ranks that fit together beside the largest pin."""
    pool = sorted(values, key=lambda d: values[d])
    chosen = rng.sample(pool, rng.choice((1, 1, 2)))
    return tuple(chosen) if sum(1 + int(values[d]) % 5 for d in chosen) <= BUDGET - 2 else (chosen[0],)


@pytest.mark.parametrize("seed", range(4))
def test_requests_are_all_served_with_the_right_weights(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    backend, host, tier, values = build(tmp_path, loader_threads=1 + seed % 3)
    pinnable = next(d for d in values if values[d] == 1)  # rank 2
    waiting = [Request(random_set(rng, values), rng.randint(1, 6)) for _ in range(150)]
    running: list[Request] = []
    served = 0
    for _ in range(100_000):
        tier.poll()
        for request in waiting[:12]:
            request.slots = tier.acquire(request.digests)
            request.waited += 1
            if request.slots is not None:
                waiting.remove(request)
                running.append(request)
        for request in list(running):
            assert request.slots is not None
            for digest, slot in zip(request.digests, request.slots, strict=True):
                assert slot in backend.published
                assert backend.contents[slot] == values[digest]
            request.steps_left -= 1
            if not request.steps_left:
                tier.release(request.digests)
                running.remove(request)
                served += 1
        users: dict[str, int] = {}
        for request in running:
            for digest in request.digests:
                users[digest] = users.get(digest, 0) + 1
        assert {i.digest: i.users for i in tier.residency() if i.users} == users
        if rng.random() < 0.05:
            tier.forget(rng.choice(list(values)))
        if rng.random() < 0.05:
            tier.pin(pinnable, rng.random() < 0.5)
        if rng.random() < 0.05:
            tier.prefetch(rng.sample(list(values), 2))
        if waiting and rng.random() < 0.02:
            gone = waiting.pop(rng.randrange(len(waiting)))
            tier.abandon(gone.digests)
            served += 1
        if not waiting and not running:
            break
        time.sleep(0.0002)
    assert served == 150, f"{len(waiting)} requests still waiting"
    assert backend.most_bytes <= backend.bytes_total
    assert host.bytes_used <= host.bytes_total
    for digest in values:
        tier.forget(digest)
    for _ in range(20_000):
        tier.poll()
        if tier.idle():
            break
        time.sleep(0.0002)
    assert backend.bytes_used == host.bytes_used == 0
    tier.close()


def test_acquire_and_release_from_many_threads(tmp_path: Path) -> None:
    backend, host, tier, values = build(tmp_path, loader_threads=2)
    errors: list[BaseException] = []
    left = threading.Semaphore(0)

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(25):
                digests = random_set(rng, values)
                while (slots := tier.acquire(digests)) is None:
                    time.sleep(0.0003)
                for digest, slot in zip(digests, slots, strict=True):
                    assert backend.contents[slot] == values[digest]
                    assert slot in backend.published
                if rng.random() < 0.1:
                    tier.forget(digests[0])
                tier.release(digests)
        except BaseException as error:
            errors.append(error)
        finally:
            left.release()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        tier.poll()
        time.sleep(0.0002)
    for thread in threads:
        thread.join(timeout=1)
        assert not thread.is_alive()
    assert not errors
    assert all(not info.users for info in tier.residency())
    assert backend.most_bytes <= backend.bytes_total
    tier.close()
    assert backend.bytes_used == 0
    assert host.bytes_used <= host.bytes_total
