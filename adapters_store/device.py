"""The device tier: which adapters are in the backend's memory, who uses them, and what is fetched or evicted next.

The rules, in the order they bind:

1. An adapter with users, or on its way into its slot, is never evicted; a pinned one neither.
2. A set that was asked for and could not be served is a want; wants are served first come first served. The first
   one that does not fit keeps those behind it from taking memory, and the adapters that must leave for it are closed
   to new users until it fits: a large adapter gets its turn however popular the small ones are.
3. What an earlier want needs is not evicted for a later one. Of the rest the least recently used goes first.

Threads: any thread may call any method, but `poll` and `close` belong to the engine's thread: they alone call
`LoraBackend.reserve`, `publish` and `release`. Reading and `fill` happen on the loader's threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loramux.adapters_store.host import HostTier
from loramux.adapters_store.loader import Loader, Moving, Stage
from loramux.kernels.lora.interface import ArenaFullError, LoraBackend

PATIENCE_POLLS = 1000
ABANDONED_POLLS = 2

_Set = tuple[str, ...]


class AdapterLoadFailure(Exception):  # noqa: N818 - the name the engine knows it by
    """An adapter can never be served: its blob is missing or damaged, or it is too large. The message says which."""

    def __init__(self, digest: str, message: str) -> None:
        super().__init__(message)
        self.digest = digest
        self.message = message


@dataclass(frozen=True, slots=True)
class LoadEvent:
    """A load that ended: seconds of reading and copying (not of waiting for memory), or the reason it failed."""

    digest: str
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ResidencyInfo:
    """Where one adapter is, how many uses are held, and its bytes on the device (0 when it is not there)."""

    digest: str
    device: bool
    host: bool
    pinned: bool
    users: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Failure:
    digest: str
    message: str
    expires: int


class DeviceTier:
    """Adapters in the memory of `backend`, fetched through `host`; the rules are in the module's text.

    `acquire` is all or nothing, so no set waits while holding memory. Whoever got None asks again at a later step;
    a want that nobody repeats during `patience_polls` polls is dropped, and so is the message of a failed load.
    """

    def __init__(
        self,
        backend: LoraBackend,
        host: HostTier,
        *,
        loader_threads: int = 1,
        patience_polls: int = PATIENCE_POLLS,
    ) -> None:
        self._backend = backend
        self._host = host
        self._loader = Loader(backend, host, threads=loader_threads)
        self._read_ahead = loader_threads + 1
        self._patience = patience_polls
        self._lock = threading.RLock()
        self._resident: OrderedDict[str, Moving] = OrderedDict()  # least recently used first
        self._moving: dict[str, Moving] = {}
        self._wants: OrderedDict[_Set, int] = OrderedDict()  # set -> the poll at which it is dropped
        self._prefetches: OrderedDict[str, None] = OrderedDict()
        self._pinned: set[str] = set()
        self._forgotten: set[str] = set()
        self._leaving: set[str] = set()  # closed to new users until the first want fits
        self._failures: dict[_Set, _Failure] = {}
        self._events: list[LoadEvent] = []
        self._polls = 0
        self._loads = 0
        self._load_seconds = 0.0
        self._evictions = 0

    # What callers ask for.

    def acquire(self, digests: Sequence[str]) -> tuple[int, ...] | None:
        """Slots of the set in the given order with one use taken of each, or None with nothing held.

        None means that loads are under way: ask again after a later `poll`. Raises `AdapterLoadFailure` when the
        set can never be served. A digest named twice takes two uses and gives its slot twice.
        """
        with self._lock:
            wanted = tuple(sorted(set(digests)))
            self._raise_failure(wanted)
            if self._leaving.isdisjoint(digests) and all(d in self._resident for d in digests):
                self._wants.pop(wanted, None)
                return tuple(self._use(d) for d in digests)
            is_new = wanted not in self._wants
            self._wants[wanted] = self._polls + self._patience
            if is_new:
                self._read_next()
            return None

    def release(self, digests: Iterable[str]) -> None:
        """Gives back one use of each digest. KeyError for one that is not held."""
        with self._lock:
            for digest in digests:
                adapter = self._resident[digest]
                if not adapter.users:
                    raise KeyError(digest)
                adapter.users -= 1

    def abandon(self, digests: Iterable[str]) -> None:
        """The caller that waited for this set no longer does: its want ends unless another caller repeats it."""
        with self._lock:
            wanted = tuple(sorted(set(digests)))
            if wanted in self._wants:
                self._wants[wanted] = min(self._wants[wanted], self._polls + ABANDONED_POLLS)

    def prefetch(self, digests: Iterable[str]) -> None:
        """Fetches adapters while no want is waiting, evicting only what is idle; failures are reported by `poll`."""
        with self._lock:
            for digest in digests:
                if digest not in self._resident and (digest,) not in self._failures:
                    self._prefetches[digest] = None
            self._read_next()

    def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter is fetched as a want that is never dropped, and is not evicted.

        Raises `AdapterLoadFailure` when it is known already that it cannot be; else a later `poll` reports it and
        the pin ends.
        """
        with self._lock:
            if not pinned:
                self._pinned.discard(digest)
                return
            self._raise_failure((digest,))
            self._pinned.add(digest)
            self._want_pins()
            self._read_next()

    def forget(self, digest: str) -> None:
        """Frees the adapter from device and host memory as soon as nobody uses or awaits it; ends its pin."""
        with self._lock:
            self._pinned.discard(digest)
            self._prefetches.pop(digest, None)
            self._failures.pop((digest,), None)
            self._forgotten.add(digest)

    # What callers may look at.

    @property
    def bytes_used(self) -> int:
        """Device bytes of all reserved slots."""
        return self._backend.bytes_used

    @property
    def loads(self) -> int:
        """Loads published since the start."""
        return self._loads

    @property
    def load_seconds_sum(self) -> float:
        """Seconds of all published loads together."""
        return self._load_seconds

    @property
    def evictions(self) -> int:
        """Adapters removed from the device to make room (not those forgotten)."""
        return self._evictions

    def idle(self) -> bool:
        """Whether `poll` has nothing to do: nothing is being fetched, awaited, reported, or to be freed now."""
        with self._lock:
            freeable = any(d not in self._resident or not self._resident[d].users for d in self._forgotten)
            return not (self._wants or self._prefetches or self._moving or self._events or freeable)

    def residency(self) -> list[ResidencyInfo]:
        """Every adapter on the device, on its way there, pinned, or in host memory, sorted by digest."""
        with self._lock:
            on_host = set(self._host.digests())
            found = sorted(on_host | self._resident.keys() | self._moving.keys() | self._pinned)
            return [self._info(digest, digest in on_host) for digest in found]

    def _info(self, digest: str, host: bool) -> ResidencyInfo:
        adapter = self._resident.get(digest)
        users, size = (adapter.users, adapter.bytes) if adapter else (0, 0)
        return ResidencyInfo(digest, adapter is not None, host, digest in self._pinned, users, size)

    # The engine thread's part.

    def poll(self) -> list[LoadEvent]:
        """Publishes finished loads, frees what is forgotten, gives memory to wants in order; never waits for a load."""
        with self._lock:
            self._polls += 1
            self._take_reports()
            self._publish()
            self._drop_expired()
            self._free_forgotten()
            self._want_pins()
            self._give_memory()
            self._read_next()
            events, self._events = self._events, []
            return events

    def close(self) -> None:
        """Ends the loader's threads and frees every slot; the caller guarantees that no plan is in use."""
        self._loader.close()
        with self._lock:
            self._take_reports()
            for adapter in [*self._moving.values(), *self._resident.values()]:
                self._remove(adapter)
            for bookkeeping in (self._wants, self._prefetches, self._pinned, self._forgotten, self._leaving):
                bookkeeping.clear()

    def _take_reports(self) -> None:
        for report in self._loader.reports():
            adapter = report.adapter
            adapter.seconds += report.seconds
            adapter.stage = report.stage
            if report.error is not None:
                self._refuse(adapter, report.error)
            elif report.stage is Stage.READ:
                self._measure(adapter)

    def _measure(self, adapter: Moving) -> None:
        """Device bytes of an adapter that was read; refuses one that no amount of eviction could place."""
        try:
            adapter.bytes = self._backend.bytes_needed(adapter.ranks)
        except (KeyError, ValueError) as error:
            self._refuse(adapter, _why(error))
        else:
            if adapter.bytes > self._backend.bytes_total:
                self._refuse(adapter, self._too_large(adapter.bytes, 0))

    def _publish(self) -> None:
        for adapter in [a for a in self._moving.values() if a.stage is Stage.COPIED]:
            assert adapter.slot is not None
            if self._backend.filled(adapter.slot):
                self._backend.publish(adapter.slot)
                adapter.stage = Stage.RESIDENT
                adapter.give_back_host()
                self._resident[adapter.digest] = self._moving.pop(adapter.digest)
                self._prefetches.pop(adapter.digest, None)
                self._loads += 1
                self._load_seconds += adapter.seconds
                self._events.append(LoadEvent(adapter.digest, adapter.seconds))

    def _drop_expired(self) -> None:
        for wanted in [w for w, expires in self._wants.items() if expires <= self._polls]:
            del self._wants[wanted]
        for failed in [f for f, failure in self._failures.items() if failure.expires <= self._polls]:
            del self._failures[failed]
        for adapter in [a for a in self._moving.values() if a.stage is Stage.READ]:
            if not self._is_wanted(adapter.digest) and adapter.digest not in self._prefetches:
                self._remove(adapter)

    def _free_forgotten(self) -> None:
        for digest in list(self._forgotten):
            adapter = self._resident.get(digest)
            if digest in self._moving or (adapter and adapter.users) or self._is_wanted(digest):
                continue
            self._forgotten.discard(digest)
            if adapter and digest not in self._pinned:
                self._remove(adapter)
            self._host.drop(digest)

    def _want_pins(self) -> None:
        """A pin that is not resident is a want, and is none once it is."""
        for digest in self._pinned:
            if digest in self._resident:
                self._wants.pop((digest,), None)
            else:
                self._wants[(digest,)] = self._polls + self._patience

    def _read_next(self) -> None:
        """Starts reading what the next few fetches need, in order, so that disk and device work overlap."""
        upcoming = 0
        for digest in (*(d for wanted in self._wants for d in wanted), *self._prefetches):
            adapter = self._moving.get(digest)
            if digest in self._resident or (adapter and adapter.slot is not None):
                continue
            if adapter is None:
                self._moving[digest] = adapter = Moving(digest)
                self._loader.read(adapter)
            upcoming += 1
            if upcoming >= self._read_ahead:
                return

    # Memory, in order.

    def _give_memory(self) -> None:
        self._leaving = set()
        protected: set[str] = set()
        for wanted in list(self._wants):
            if wanted not in self._wants:
                continue  # a smaller set failed, and this one with it
            protected.update(wanted)
            for digest in wanted:
                adapter = self._moving.get(digest)
                if adapter is None or adapter.stage is not Stage.READ or self._place(adapter, protected):
                    continue
                if self._can_fit(wanted, adapter):
                    self._ask_to_leave(wanted, protected)
                    return
                break
        for digest in list(self._prefetches):
            adapter = self._moving.get(digest)
            if adapter is not None and adapter.stage is Stage.READ and not self._place(adapter, protected):
                self._prefetches.pop(digest, None)

    def _place(self, adapter: Moving, protected: set[str]) -> bool:
        """Takes memory for an adapter that is read, evicting idle ones outside `protected`, and starts the copy.

        False when there is no room now. An adapter that the backend refuses is failed; True, as nothing is to wait for.
        """
        while True:
            try:
                adapter.slot = self._backend.reserve(adapter.ranks)
                break
            except ArenaFullError:
                if not self._evict_one(protected):
                    return False
            except (KeyError, ValueError) as error:
                self._refuse(adapter, _why(error))
                return True
        adapter.stage = Stage.COPYING
        self._loader.copy(adapter)
        return True

    def _evict_one(self, protected: set[str]) -> bool:
        kept = protected | self._pinned
        idle = [a for a in self._resident.values() if not a.users and a.digest not in kept]
        if not idle:
            return False
        self._remove(next((a for a in idle if not self._is_wanted(a.digest)), idle[0]))
        self._evictions += 1
        return True

    def _can_fit(self, wanted: _Set, adapter: Moving) -> bool:
        """Whether the set fits once others leave; fails it when it does not fit beside the pinned adapters."""
        others = [a for a in self._placed() if a.digest not in wanted]
        pinned = sum(a.bytes for a in others if a.digest in self._pinned)
        needed = sum(a.bytes for d in wanted if (a := self._resident.get(d) or self._moving.get(d)))
        if needed + pinned <= self._backend.bytes_total and not all(a.digest in self._pinned for a in others):
            return True
        self._fail(wanted, adapter, self._too_large(needed, pinned))
        return False

    def _ask_to_leave(self, wanted: _Set, protected: set[str]) -> None:
        """Closes to new users as many adapters as the set still needs, the least recently used first."""
        missing = sum(a.bytes for d in wanted if (a := self._moving.get(d)) and a.slot is None)
        free = self._backend.bytes_total - self._backend.bytes_used
        for other in self._placed():
            if other.digest in protected | self._pinned:
                continue
            if free >= missing and self._leaving:
                break
            self._leaving.add(other.digest)
            free += other.bytes

    def _placed(self) -> list[Moving]:
        """Adapters that hold device memory, the least recently used first."""
        return [*self._resident.values(), *(a for a in self._moving.values() if a.slot is not None)]

    def _too_large(self, needed: int, pinned: int) -> str:
        beside = f", of which pinned adapters hold {pinned}" if pinned else ""
        return f"the adapters need {needed} bytes of the device's {self._backend.bytes_total} for adapters{beside}"

    # Small steps.

    def _use(self, digest: str) -> int:
        adapter = self._resident[digest]
        adapter.users += 1
        self._resident.move_to_end(digest)
        assert adapter.slot is not None
        return adapter.slot

    def _is_wanted(self, digest: str) -> bool:
        return any(digest in wanted for wanted in self._wants)

    def _raise_failure(self, wanted: _Set) -> None:
        for failed in (wanted, *((d,) for d in wanted)):
            if failed in self._failures:
                failure = self._failures.pop(failed)
                raise AdapterLoadFailure(failure.digest, failure.message)

    def _fail(self, failed: _Set, adapter: Moving, message: str) -> None:
        """Ends the wants that include the failed set, reports it, and keeps the reason for the next `acquire`."""
        self._failures[failed] = _Failure(adapter.digest, message, self._polls + self._patience)
        self._events.append(LoadEvent(adapter.digest, adapter.seconds, message))
        for wanted in [w for w in self._wants if set(failed) <= set(w)]:
            del self._wants[wanted]
        if len(failed) == 1:
            self._prefetches.pop(adapter.digest, None)
            self._pinned.discard(adapter.digest)

    def _refuse(self, adapter: Moving, message: str) -> None:
        self._remove(adapter)
        self._fail((adapter.digest,), adapter, message)

    def _remove(self, adapter: Moving) -> None:
        del (self._resident if adapter.stage is Stage.RESIDENT else self._moving)[adapter.digest]
        if adapter.slot is not None:
            self._backend.release(adapter.slot)
        adapter.give_back_host()


def _why(error: KeyError | ValueError) -> str:
    if isinstance(error, KeyError):
        return f"the engine has no place for adapter weights at {error.args[0]!r}"
    return str(error)
