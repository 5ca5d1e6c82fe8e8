"""The waiting queue: order within a flow, shares between tenants and adapter sets, nobody starves, nothing is lost."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.server.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    """A request: whose, with which adapters, and which of the flow's it is."""

    tenant: str
    adapters: str = ""
    number: int = 0


def make(*, decode_cost: float = 2.0) -> FairQueue[Item]:
    return FairQueue(lambda item: (item.tenant, item.adapters), decode_cost=decode_cost)


def fill(queue: FairQueue[Item], tenant: str, count: int, adapters: str = "") -> list[Item]:
    items = [Item(tenant, adapters, number) for number in range(count)]
    for item in items:
        queue.add(item)
    return items


def take(queue: FairQueue[Item], count: int, cost: float = 10.0, *, end: bool = True) -> list[Item]:
    taken = []
    for _ in range(count):
        item = queue.admit(cost)
        taken.append(item)
        if end:
            queue.end(item)
    return taken


def test_one_flow_is_first_come_first_served() -> None:
    queue = make()
    items = fill(queue, "a", 50)
    assert len(queue) == 50
    assert list(queue) == items
    assert take(queue, 50) == items
    assert queue.peek() is None
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.admit(1)


def test_a_flood_puts_at_most_one_request_before_anothers_first() -> None:
    queue = make()
    fill(queue, "flood", 10_000)
    take(queue, 64, end=False)
    for _ in range(200):
        queue.tick()
    for name in ("b", "c", "d"):
        fill(queue, name, 1)
    assert {item.tenant for item in take(queue, 4, end=False)} >= {"b", "c", "d"}


def test_tenants_share_equally_however_much_each_has_waiting() -> None:
    queue = make()
    fill(queue, "flood", 3000)
    fill(queue, "some", 300)
    fill(queue, "few", 100)
    counts = Counter(item.tenant for item in take(queue, 299))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = make()
    fill(queue, "long", 1000)
    fill(queue, "short", 1000)
    spent: Counter[str] = Counter()
    for _ in range(600):
        item = queue.peek()
        assert item is not None
        cost = 100 if item.tenant == "long" else 10
        queue.end(queue.admit(cost))
        spent[item.tenant] += cost
    assert abs(spent["long"] - spent["short"]) <= 110


def test_long_answers_count_as_they_grow() -> None:
    queue = make()
    fill(queue, "talker", 100)
    fill(queue, "brief", 100)
    first = take(queue, 2, end=False)
    assert {item.tenant for item in first} == {"talker", "brief"}
    queue.end(next(item for item in first if item.tenant == "brief"))
    for _ in range(100):
        queue.tick()  # the talker's answer grows: 200, as much as 20 prompts of the other
    assert {item.tenant for item in take(queue, 20)} == {"brief"}
    assert Counter(item.tenant for item in take(queue, 10))["talker"] >= 4


def test_a_tenants_many_adapters_are_one_share_and_share_it() -> None:
    queue = make()
    for i in range(50):
        fill(queue, "many", 20, f"adapter-{i}")
    fill(queue, "one", 1000)
    taken = take(queue, 200)
    assert abs(Counter(item.tenant for item in taken)["one"] - 100) <= 1
    of_many = Counter(item.adapters for item in taken if item.tenant == "many")
    assert len(of_many) == 50
    assert max(of_many.values()) - min(of_many.values()) <= 1


def test_a_flood_on_one_adapter_leaves_the_tenants_others_alone() -> None:
    queue = make()
    fill(queue, "a", 1000, "popular")
    take(queue, 10)
    (rare,) = fill(queue, "a", 1, "rare")
    assert rare in take(queue, 2)


def test_idle_time_earns_nothing() -> None:
    queue = make()
    fill(queue, "steady", 2000)
    take(queue, 1000)
    fill(queue, "returns", 1000)
    counts = Counter(item.tenant for item in take(queue, 100))
    assert abs(counts["returns"] - counts["steady"]) <= 1


def test_an_old_flow_is_not_starved_by_ever_new_ones() -> None:
    queue = make()
    fill(queue, "a", 5, "old")
    take(queue, 1)
    seen = 0
    for i in range(200):
        fill(queue, "a", 1, f"new-{i}")
        seen += take(queue, 1)[0].adapters == "old"
    assert seen == 4


# Adapters that are not there yet, preemption, leaving.


def test_a_flow_that_is_set_aside_waits_alone_and_comes_first_after() -> None:
    queue = make()
    loading = fill(queue, "a", 3, "cold")
    fill(queue, "a", 10, "warm")
    fill(queue, "b", 10)
    assert queue.peek() is loading[0]
    queue.set_aside()
    assert queue.set_aside_count == 3
    taken = take(queue, 6)
    assert not set(taken) & set(loading)
    assert len(queue) == 17
    late = Item("a", "cold", 3)
    queue.add(late)
    assert queue.set_aside_count == 4
    queue.resume()
    assert queue.set_aside_count == 0
    nexts = take(queue, 4)
    assert [item for item in nexts if item.tenant == "a"] == loading[:2]
    rest = take(queue, len(queue))
    assert [item for item in rest if item.adapters == "cold"] == [loading[2], late]


def test_when_all_is_set_aside_nothing_has_its_turn() -> None:
    queue = make()
    fill(queue, "a", 2, "x")
    fill(queue, "b", 2, "y")
    for _ in range(2):
        queue.set_aside()
    assert queue.peek() is None
    assert queue.set_aside_count == len(queue) == 4
    assert queue.upcoming(8) == []
    with pytest.raises(IndexError):
        queue.set_aside()
    queue.resume()
    assert len(take(queue, 4)) == 4


def test_preempted_items_come_first_the_last_one_put_back_before() -> None:
    queue = make()
    items = fill(queue, "a", 4)
    fill(queue, "b", 4)
    running = take(queue, 4, end=False)
    for item in reversed(running[2:]):
        queue.put_back(item)
    assert take(queue, 2, end=False) == running[2:]
    queue.put_back(running[0])
    queue.set_aside()
    assert queue.set_aside_count == 1
    assert queue.peek() is not running[0]
    queue.resume()
    assert queue.peek() is running[0]
    assert queue.remove(running[0])
    assert not queue.remove(running[0])
    assert set(take(queue, len(queue))) & set(items) <= set(items)


def test_leaving_from_anywhere() -> None:
    queue = make()
    items = fill(queue, "a", 6)
    other = fill(queue, "b", 1)[0]
    assert queue.remove(items[3])
    assert not queue.remove(items[3])
    assert not queue.remove(Item("nobody"))
    queue.set_aside()
    assert queue.remove(items[0])
    assert queue.drop() is other
    queue.resume()
    assert queue.drop() is items[1]
    assert take(queue, 3) == [items[2], items[4], items[5]]


def test_upcoming_is_what_is_taken_next() -> None:
    queue = make()
    for tenant in "abc":
        for adapters in "xy":
            fill(queue, tenant, 3, adapters)
    preempted = take(queue, 1, end=False)[0]
    queue.put_back(preempted)
    assert queue.upcoming(0) == []
    assert queue.upcoming(4)[0] is preempted
    assert {item.tenant for item in queue.upcoming(4)[1:]} == set("abc")
    queue.drop()
    near = queue.upcoming(3)
    assert len(near) == 3
    assert queue.peek() in near


def test_what_is_over_is_forgotten() -> None:
    queue = make()
    keeps = fill(queue, "a", 1, "stays")[0]
    assert queue.admit(1.0) is keeps
    for i in range(5000):
        fill(queue, "a", 1, f"set-{i}")
        queue.end(queue.admit(10.0))
    assert len(queue._tenants["a"].flows) < 200
    assert len(queue._tenants["a"].level.heap) < 200
    queue.end(keeps)
    assert not queue._tenants


Action = tuple[str, int, int]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "admit", "end", "preempt", "aside", "resume", "remove", "tick"]),
                          st.integers(0, 2), st.integers(0, 2)), max_size=80))  # fmt: skip
def test_nothing_is_lost_or_doubled(actions: list[Action]) -> None:
    """Against a plain account of what waits and what runs, with the order within each flow."""
    queue, rng = make(), random.Random(0)
    waiting: dict[Item, None] = {}
    preempted: set[Item] = set()
    running: list[Item] = []
    last: dict[tuple[str, str], int] = {}
    number = 0
    for kind, tenant, adapters in actions:
        if kind == "add":
            item = Item(f"t{tenant}", f"s{adapters}", number)
            number += 1
            queue.add(item)
            waiting[item] = None
        elif kind == "admit" and (expected := queue.peek()) is not None:
            item = queue.admit(float(adapters * 7 + 1))
            assert item is expected
            assert item in waiting
            del waiting[item]
            running.append(item)
            if item not in preempted:
                assert item.number > last.get((item.tenant, item.adapters), -1)
                last[item.tenant, item.adapters] = item.number
            preempted.discard(item)
        elif kind == "end" and running:
            queue.end(running.pop(rng.randrange(len(running))))
        elif kind == "preempt" and running:
            item = running.pop()
            queue.put_back(item)
            waiting[item] = None
            preempted.add(item)
            assert queue.peek() is item
        elif kind == "aside" and queue.peek() is not None:
            queue.set_aside()
        elif kind == "resume":
            queue.resume()
        elif kind == "remove" and waiting:
            item = rng.choice(list(waiting))
            assert queue.remove(item)
            del waiting[item]
            preempted.discard(item)
        elif kind == "tick":
            queue.tick()
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
        assert 0 <= queue.set_aside_count <= len(queue)
        assert (queue.peek() is None) == (queue.set_aside_count == len(queue))
        assert len(set(queue.upcoming(5))) == len(queue.upcoming(5))
    queue.resume()
    left = [queue.admit(1.0) for _ in range(len(queue))]
    assert set(left) == set(waiting)
    for item in (*left, *running):
        queue.end(item)
    assert not queue._tenants
