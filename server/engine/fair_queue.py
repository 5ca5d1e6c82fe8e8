"""The waiting requests, in an order that is fair to tenants, and within a tenant to its adapter sets.

Two levels of start-time fair queueing (Goyal, Vin and Cheng, 1996) over counters of service that was really given
(Sheng et al., "Fairness in Serving Large Language Models", 2024): how long an answer becomes is not known when it
starts, so service is counted as it happens. A flow (a tenant; an adapter set of a tenant) has a counter

    c = prompt tokens computed for it + decode_cost * (its sequences that run, summed over steps)

and the waiting flow with the least counter comes next. A flow that begins to wait starts at its level's clock v,
c := max(c, v): idle time earns nothing. v is the counter of the flow served last, plus the cost of what was served over
the number of flows that waited for it, so that it passes every counter in the end, also where each request is a new
flow: nobody starves. Whatever one flow has waiting, another's first request has at most one of its own before it.

Within a flow requests keep their order. A flow whose adapters are being loaded is set aside and keeps its counter: it
is among the first once they are there. Preempted sequences come before all others.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
FlowKey = tuple[str, Hashable]

DECODE_COST = 2.0
SWEEP_ABOVE = 64


class _Account:
    """Service given to a flow or a tenant: `spent` as of the step `at`, and `running` sequences that cost since."""

    __slots__ = ("at", "is_queued", "number", "running", "spent", "waiting_count")

    def __init__(self, spent: float, at: int, number: int) -> None:
        self.spent = spent
        self.at = at
        self.number = number  # breaks ties in order of appearance
        self.running = 0
        self.is_queued = False
        self.waiting_count = 0

    def counter(self, step: int, decode_cost: float) -> float:
        """c at this step."""
        return self.spent + self.running * decode_cost * (step - self.at)

    def settle(self, step: int, decode_cost: float) -> None:
        """Makes `spent` the counter as of this step, before `running` changes."""
        self.spent, self.at = self.counter(step, decode_cost), step

    @property
    def is_ready(self) -> bool:
        """Whether something waits that may be taken."""
        return self.waiting_count > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting_count and not self.running


class _Flow(_Account, Generic[T]):
    """One adapter set of one tenant."""

    __slots__ = ("is_aside", "waiting")

    def __init__(self, spent: float, at: int, number: int) -> None:
        super().__init__(spent, at, number)
        self.waiting: OrderedDict[T, None] = OrderedDict()
        self.is_aside = False

    @property
    def is_ready(self) -> bool:
        """See `_Account.is_ready`."""
        return bool(self.waiting) and not self.is_aside


_A = TypeVar("_A", bound=_Account)


class _Level(Generic[_A]):
    """The flows of one level by counter, least first. Counters only grow, so an entry that is too low is put right
    when it comes to the top; an account that is not ready leaves then."""

    __slots__ = ("clock", "heap")

    def __init__(self) -> None:
        self.clock = 0.0
        self.heap: list[tuple[float, int, _A]] = []

    def put(self, account: _A, step: int, decode_cost: float) -> None:
        """Lines up a ready account, unless it is in the line."""
        if not account.is_queued:
            account.is_queued = True
            heapq.heappush(self.heap, (account.counter(step, decode_cost), account.number, account))

    def first(self, step: int, decode_cost: float) -> _A | None:
        """The ready account with the least counter."""
        while self.heap:
            stored, number, account = self.heap[0]
            if not account.is_ready:
                heapq.heappop(self.heap)
                account.is_queued = False
                continue
            counter = account.counter(step, decode_cost)
            if counter <= stored:
                return account
            heapq.heapreplace(self.heap, (counter, number, account))
        return None

    def served(self, counter: float, cost: float) -> None:
        """Moves the clock: something of an account at `counter` was served at this cost."""
        self.clock = max(self.clock, counter) + cost / max(1, len(self.heap))


class _Tenant(_Account, Generic[T]):
    """One tenant; `waiting_count` are its requests that are not set aside."""

    __slots__ = ("flows", "level")

    def __init__(self, spent: float, at: int, number: int) -> None:
        super().__init__(spent, at, number)
        self.flows: dict[Hashable, _Flow[T]] = {}
        self.level: _Level[_Flow[T]] = _Level()


class FairQueue(Generic[T]):
    """Requests that wait, and what those that run cost their flows. Used by one thread.

    `flow_of(item)` is (tenant, adapter set); it must not change while the queue knows the item, which it does from
    `add` to `end`, `drop` or `remove`.
    """

    def __init__(self, flow_of: Callable[[T], FlowKey], *, decode_cost: float = DECODE_COST) -> None:
        self._flow_of = flow_of
        self._decode_cost = decode_cost
        self._tenants: dict[str, _Tenant[T]] = {}
        self._level: _Level[_Tenant[T]] = _Level()
        self._front: OrderedDict[T, None] = OrderedDict()
        self._front_aside: OrderedDict[T, None] = OrderedDict()
        self._aside: list[tuple[_Tenant[T], _Flow[T]]] = []
        self._size = 0
        self._running = 0
        self._step = 0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Items that wait, those that are set aside included."""
        return self._size

    def __iter__(self) -> Iterator[T]:
        """Every item that waits: preempted ones first, the rest by tenant and flow."""
        yield from self._front_aside
        yield from self._front
        for tenant in self._tenants.values():
            for flow in tenant.flows.values():
                yield from flow.waiting

    @property
    def set_aside_count(self) -> int:
        """Items that wait and are set aside."""
        return len(self._front_aside) + sum(len(flow.waiting) for _, flow in self._aside)

    # Coming.

    def add(self, item: T) -> None:
        """A new item, behind those of its flow."""
        tenant, flow = self._find(item)
        if not flow.waiting:
            flow.settle(self._step, self._decode_cost)
            flow.spent = max(flow.spent, tenant.level.clock)
        if not tenant.waiting_count:
            tenant.settle(self._step, self._decode_cost)
            tenant.spent = max(tenant.spent, self._level.clock)
        flow.waiting[item] = None
        flow.waiting_count += 1
        self._size += 1
        if not flow.is_aside:
            tenant.waiting_count += 1
            self._line_up(tenant, flow)

    def put_back(self, item: T) -> None:
        """A preempted item, which ran until now: it comes before all that wait, the last one put back first."""
        self._stop(item)
        self._front[item] = None
        self._front.move_to_end(item, last=False)
        self._size += 1

    # Going.

    def peek(self) -> T | None:
        """The item whose turn it is; None when nothing waits that is not set aside."""
        if self._front:
            return next(iter(self._front))
        tenant = self._level.first(self._step, self._decode_cost)
        if tenant is None:
            return None
        flow = tenant.level.first(self._step, self._decode_cost)
        return None if flow is None else next(iter(flow.waiting))

    def set_aside(self) -> None:
        """The flow of the item whose turn it is waits for its adapters, until `resume`. A preempted item does alone."""
        item = self._next()
        if item in self._front:
            del self._front[item]
            self._front_aside[item] = None
            return
        tenant, flow = self._find(item)
        flow.is_aside = True
        tenant.waiting_count -= len(flow.waiting)
        self._aside.append((tenant, flow))

    def resume(self) -> None:
        """What was set aside has its turns again."""
        for item in reversed(self._front_aside):
            self._front[item] = None
            self._front.move_to_end(item, last=False)
        self._front_aside.clear()
        for tenant, flow in self._aside:
            flow.is_aside = False
            tenant.waiting_count += len(flow.waiting)
            if flow.waiting:
                self._line_up(tenant, flow)
        self._aside.clear()

    def admit(self, cost: float) -> T:
        """Takes out the item whose turn it is; it runs from now on. `cost`: the prompt tokens to compute for it."""
        item = self._next()
        tenant, flow = self._find(item)
        accounts: tuple[tuple[_Account, _Level[_Tenant[T]] | _Level[_Flow[T]]], ...]
        accounts = ((tenant, self._level), (flow, tenant.level))
        is_new = item not in self._front
        for account, level in accounts:
            account.settle(self._step, self._decode_cost)
            if is_new:
                level.served(account.spent, cost)
            account.spent += cost
            account.running += 1
        self._running += 1
        self._take_out(item, tenant, flow)
        return item

    def drop(self) -> T:
        """Takes out the item whose turn it is; it will never run."""
        item = self._next()
        self.remove(item)
        return item

    def remove(self, item: T) -> bool:
        """Takes out an item, wherever it waits; False for one that does not wait."""
        tenant, flow = self._find(item)
        if item not in flow.waiting and item not in self._front and item not in self._front_aside:
            self._sweep(tenant)
            return False
        self._take_out(item, tenant, flow)
        self._sweep(tenant)
        return True

    def end(self, item: T) -> None:
        """An item that ran has ended."""
        self._sweep(self._stop(item))

    def tick(self) -> None:
        """A step begins: each item that runs costs its flow a token more."""
        self._step += 1

    def upcoming(self, count: int) -> list[T]:
        """Up to `count` items that are not set aside and whose turn is near: the front, then the flows' first ones in
        the order of tenants' and flows' counters, a first one of every tenant before a second of any."""
        found = list(itertools.islice(self._front, count))
        lines = []
        for tenant in heapq.nsmallest(count, (t for t in self._tenants.values() if t.is_ready), key=self._counter):
            flows = (flow for flow in tenant.flows.values() if flow.is_ready)
            lines.append([next(iter(flow.waiting)) for flow in heapq.nsmallest(count, flows, key=self._counter)])
        for turn in itertools.zip_longest(*lines):
            found += [item for item in turn if item is not None]
        return found[:count]

    # Inside.

    def _counter(self, account: _Account) -> tuple[float, int]:
        return account.counter(self._step, self._decode_cost), account.number

    def _next(self) -> T:
        item = self.peek()
        if item is None:
            raise IndexError("nothing waits that is not set aside")
        return item

    def _find(self, item: T) -> tuple[_Tenant[T], _Flow[T]]:
        """The item's tenant and flow, made when they are new."""
        name, key = self._flow_of(item)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._level.clock, self._step, next(self._numbers))
        flow = tenant.flows.get(key)
        if flow is None:
            flow = tenant.flows[key] = _Flow(tenant.level.clock, self._step, next(self._numbers))
        return tenant, flow

    def _line_up(self, tenant: _Tenant[T], flow: _Flow[T]) -> None:
        tenant.level.put(flow, self._step, self._decode_cost)
        self._level.put(tenant, self._step, self._decode_cost)

    def _take_out(self, item: T, tenant: _Tenant[T], flow: _Flow[T]) -> None:
        self._size -= 1
        for line in (self._front, self._front_aside):
            if item in line:
                del line[item]
                return
        del flow.waiting[item]
        flow.waiting_count -= 1
        tenant.waiting_count -= not flow.is_aside

    def _stop(self, item: T) -> _Tenant[T]:
        tenant, flow = self._find(item)
        for account in (tenant, flow):
            account.settle(self._step, self._decode_cost)
            account.running -= 1
        self._running -= 1
        return tenant

    def _sweep(self, tenant: _Tenant[T]) -> None:
        """Forgets flows whose past no longer counts: all of them once nothing waits or runs; else, when there are many,
        the idle ones that their level's clock has passed."""
        if not self._size and not self._running:
            self._tenants.clear()
            self._level = _Level()
            self._aside.clear()
            return
        if len(tenant.flows) > SWEEP_ABOVE and len(tenant.flows) > 2 * len(tenant.level.heap):
            clock = tenant.level.clock
            tenant.flows = {k: f for k, f in tenant.flows.items() if not f.is_idle or f.is_queued or f.spent > clock}
