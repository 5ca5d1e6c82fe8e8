"""The host tier: adapters in (pinned) host memory, an LRU cache by bytes over the blob directory."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loramux.adapters_store.canonical import read_canonical, read_header
from loramux.adapters_store.digests import blob_path
from loramux.kernels.lora.interface import ModuleWeights

Modules = Mapping[str, ModuleWeights]


@dataclass(slots=True)
class _Entry:
    modules: Modules
    bytes: int
    borrowers: int = 0
    kept: bool = True


class HostTier:
    """Adapters cast to the engine's dtype in host memory, at most `budget_bytes` of them; safe from any thread.

    An adapter that a load is using is never evicted. One that does not fit (larger than the budget, or everything
    else is in use) is served through: its memory lives as long as the borrower holds it and is not kept.
    """

    def __init__(self, blob_dir: Path, *, budget_bytes: int, dtype: torch.dtype, pin_memory: bool) -> None:
        self._blob_dir = blob_dir
        self._budget = budget_bytes
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._loading: dict[str, Future[None]] = {}
        self._dropped_while_loading: set[str] = set()
        self._bytes = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of the adapters kept, those being read included."""
        return self._bytes

    @property
    def bytes_total(self) -> int:
        """The budget in bytes."""
        return self._budget

    def contains(self, digest: str) -> bool:
        """Whether the adapter is in host memory now."""
        with self._lock:
            entry = self._entries.get(digest)
            return entry is not None and entry.kept

    def digests(self) -> list[str]:
        """The adapters in host memory, least recently used first."""
        with self._lock:
            return [digest for digest, entry in self._entries.items() if entry.kept]

    def get(self, digest: str) -> Modules:
        """The adapter's modules, read from its blob when absent.

        Raises `CanonicalError` for a missing or damaged blob, ValueError for something that is no digest.
        """
        with self.borrow(digest) as modules:
            return modules

    @contextmanager
    def borrow(self, digest: str) -> Iterator[Modules]:
        """Like `get`, and the adapter is not evicted inside the `with` block."""
        entry = self._take(digest)
        try:
            yield entry.modules
        finally:
            self._give_back(digest, entry)

    def drop(self, digest: str) -> None:
        """Frees the adapter now, or when its last borrower gives it back. Unknown digests are ignored."""
        with self._lock:
            if digest in self._loading:
                self._dropped_while_loading.add(digest)
            entry = self._entries.get(digest)
            if entry is None:
                return
            entry.kept = False
            if not entry.borrowers:
                self._remove(digest)

    def _take(self, digest: str) -> _Entry:
        while True:
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    self._entries.move_to_end(digest)
                    entry.borrowers += 1
                    return entry
                other = self._loading.get(digest)
                if other is None:
                    mine = self._loading[digest] = Future()
            if other is None:
                return self._load(digest, mine)
            other.result()  # the other load ended; look again (it may have been served through)

    def _load(self, digest: str, done: "Future[None]") -> _Entry:
        reserved = 0
        try:
            path = blob_path(self._blob_dir, digest)
            needed = read_header(path).bytes_as(self._dtype)
            reserved = self._reserve(needed)
            entry = _Entry(
                read_canonical(path, dtype=self._dtype, pin_memory=self._pin_memory), needed, 1, reserved == needed
            )
        except BaseException:
            with self._lock:
                self._bytes -= reserved
                self._end_load(digest, done)
            raise
        with self._lock:
            if reserved == needed:
                entry.kept = digest not in self._dropped_while_loading
                self._entries[digest] = entry
            self._end_load(digest, done)
        return entry

    def _end_load(self, digest: str, done: "Future[None]") -> None:
        self._dropped_while_loading.discard(digest)
        del self._loading[digest]
        done.set_result(None)

    def _reserve(self, needed: int) -> int:
        """Evicts until `needed` bytes fit and takes them; 0 when they cannot (an empty adapter needs none)."""
        with self._lock:
            idle = [(d, e.bytes) for d, e in self._entries.items() if not e.borrowers]
            if self._bytes - sum(size for _, size in idle) + needed > self._budget:
                return 0
            for digest, _ in idle:
                if self._bytes + needed <= self._budget:
                    break
                self._remove(digest)
            self._bytes += needed
            return needed

    def _give_back(self, digest: str, entry: _Entry) -> None:
        with self._lock:
            entry.borrowers -= 1
            if self._entries.get(digest) is entry and not entry.kept and not entry.borrowers:
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        self._bytes -= self._entries.pop(digest).bytes
