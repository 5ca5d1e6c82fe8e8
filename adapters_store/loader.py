"""The threads that move adapters: blob -> host memory -> the backend's memory, off the engine's thread."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum

from loramux.adapters_store.canonical import CanonicalError
from loramux.adapters_store.host import HostTier, Modules
from loramux.kernels.lora.interface import LoraBackend


class Stage(Enum):
    """How far an adapter has come on its way to the device."""

    READING = "reading"  # a loader thread brings it into host memory
    READ = "read"  # in host memory, borrowed there, waiting for device memory
    COPYING = "copying"  # has its slot, a loader thread copies it
    COPIED = "copied"  # all copies are issued; the backend says when they have ended
    RESIDENT = "resident"  # published


@dataclass(slots=True)
class Moving:
    """One adapter on the device or on its way. Only the owner's thread changes it, but for what a job fills in."""

    digest: str
    stage: Stage = Stage.READING
    modules: Modules = field(default_factory=dict)
    borrowed: ExitStack = field(default_factory=ExitStack)
    slot: int | None = None
    bytes: int = 0
    users: int = 0
    seconds: float = 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module; empty before it is read and after it is published."""
        return {module: weights.rank for module, weights in self.modules.items()}

    def give_back_host(self) -> None:
        """Ends the loan of the host copy."""
        self.modules = {}
        self.borrowed.close()


@dataclass(frozen=True, slots=True)
class Report:
    """A job that ended, after `seconds`; `error` is None when it succeeded."""

    adapter: Moving
    stage: Stage
    seconds: float
    error: str | None


class Loader:
    """A few daemon threads with a queue of jobs in and a queue of reports out."""

    def __init__(self, backend: LoraBackend, host: HostTier, *, threads: int) -> None:
        self._backend = backend
        self._host = host
        self._jobs: queue.SimpleQueue[Callable[[], Report] | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._fill_lock = threading.Lock()  # `LoraBackend.fill` is for one thread at a time
        self._threads = [
            threading.Thread(target=self._run, name=f"adapter-loader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, adapter: Moving) -> None:
        """Queues the reading of the adapter into host memory, where it stays borrowed."""
        self._jobs.put(lambda: self._timed(adapter, Stage.READ, self._read))

    def copy(self, adapter: Moving) -> None:
        """Queues the copy of the adapter's modules into its slot."""
        self._jobs.put(lambda: self._timed(adapter, Stage.COPIED, self._copy))

    def reports(self) -> list[Report]:
        """Jobs that ended since the last call; never blocks."""
        found: list[Report] = []
        while True:
            try:
                found.append(self._reports.get_nowait())
            except queue.Empty:
                return found

    def close(self) -> None:
        """Ends the threads after the jobs that are queued."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._reports.put(job())

    def _timed(self, adapter: Moving, stage: Stage, job: Callable[[Moving], None]) -> Report:
        started = time.monotonic()
        error: str | None = None
        try:
            job(adapter)
        except CanonicalError as reason:
            error = str(reason)
        except Exception as reason:  # the thread outlives whatever a file, the allocator or the device does
            error = f"the adapter could not be loaded: {type(reason).__name__}: {reason}"
        return Report(adapter, stage, time.monotonic() - started, error)

    def _read(self, adapter: Moving) -> None:
        adapter.modules = adapter.borrowed.enter_context(self._host.borrow(adapter.digest))

    def _copy(self, adapter: Moving) -> None:
        assert adapter.slot is not None
        with self._fill_lock:
            self._backend.fill(adapter.slot, adapter.modules)
