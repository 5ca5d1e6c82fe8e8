"""How the card's benchmarks measure: deadlines, events around replayed graphs, cold caches, shares of floors.

Device times are medians over repeats with CUDA events; before each one the L2 cache is overwritten. Work is replayed
from a captured graph where it can be captured, so that launches from Python do not count, and `eager` otherwise. On a
CPU the same functions take wall time, so that every path of the benchmark runs without a card.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loramux.kernels.cost import Cost, Peaks

LEAST_REPEATS = 3
L2_FACTOR = 4
DEFAULT_L2_BYTES = 64 << 20
Result = dict[str, Any]


class OutOfTimeError(Exception):
    """The section's time is over."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a section has to end, in seconds of `time.perf_counter()`."""

    at: float

    @property
    def left(self) -> float:
        """Seconds until then, 0 afterwards."""
        return max(self.at - time.perf_counter(), 0.0)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.left <= 0

    def part(self, share: float) -> "Deadline":
        """A deadline after this share of the seconds that are left."""
        return Deadline(time.perf_counter() + share * self.left)

    def check(self) -> None:
        """Raises OutOfTimeError when it is over."""
        if self.passed:
            raise OutOfTimeError


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and least seconds of `repeats` runs; `graph` says whether they were replays of a captured graph."""

    seconds: float
    least: float
    repeats: int
    graph: bool


@dataclass(slots=True)
class Bench:
    """What every section is given. `dtype` is that of weights and activations; `peaks` is None where none are claimed.

    `lora` is the LoRA backend's implementation. `small` runs everything at toy sizes.
    """

    device: torch.device
    small: bool
    dtype: torch.dtype
    folder: Path
    peaks: Peaks | None = None
    warmup: int = 3
    repeats: int = 30
    _flush: torch.Tensor | None = field(default=None, init=False)

    @property
    def cuda(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def synchronize(self) -> None:
        """Waits for the card."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives back the device memory of what nobody holds any more, cycles of objects included."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Free device memory; on a CPU an amount that toy sizes fit."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 30

    def flush(self) -> None:
        """Overwrites the L2 cache."""
        if not self.cuda:
            return
        if self._flush is None:
            size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or DEFAULT_L2_BYTES
            self._flush = torch.empty(L2_FACTOR * size, dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one run from a cold L2 cache."""
        if not self.cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush()
        begin.record()
        work()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    def time(self, work: Callable[[], object], *, seconds: float = 0.5, graph: bool = True) -> Timing:
        """Runs the work often enough to tell its median, for about `seconds` at most after warming up."""
        for _ in range(self.warmup):
            work()
        self.synchronize()
        captured = self._capture(work) if graph and self.cuda else None
        run = work if captured is None else captured.replay
        self.once(run)
        taken: list[float] = []
        until = time.perf_counter() + seconds
        while len(taken) < self.repeats and (len(taken) < LEAST_REPEATS or time.perf_counter() < until):
            taken.append(self.once(run))
        return Timing(statistics.median(taken), min(taken), len(taken), captured is not None)

    def _capture(self, work: Callable[[], object]) -> "torch.cuda.CUDAGraph | None":
        """The work as a graph; None when it cannot be captured (it synchronises, say)."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own stream in place
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def floor(self, *costs: Cost) -> float | None:
        """Least seconds of operations one after the other; None where no ceiling is claimed."""
        return None if self.peaks is None else sum(cost.floor(self.peaks) for cost in costs)

    def bandwidth_share(self, seconds: float, *costs: Cost) -> float | None:
        """(bytes / seconds) / (the copy bandwidth of this run)."""
        return None if self.peaks is None else sum(c.bytes for c in costs) / seconds / self.peaks.bandwidth


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None where either is missing or b is 0."""
    return None if a is None or not b else a / b


def us(seconds: float | None) -> str:
    """Microseconds for a table."""
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def ms(seconds: float | None) -> str:
    """Milliseconds for a table."""
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def percent(share: float | None) -> str:
    """A share for a table."""
    return "-" if share is None else f"{share:.0%}"


def times(value: float | None) -> str:
    """A ratio for a table."""
    return "-" if value is None else f"{value:.2f}x"


def error(value: float | None) -> str:
    """A relative error for a table."""
    return "-" if value is None else f"{value:.1e}"


def unusable(device: str, small: bool) -> str | None:
    """Why this machine or this choice cannot be run, or None."""
    if device == "cpu":
        return None if small else "--device cpu tries the script at toy sizes and needs --small; it measures no card"
    if not torch.cuda.is_available():
        return (
            "no CUDA card is visible to torch, and these benchmarks measure one; run them where torch sees a card, or "
            "try the script itself with --device cpu --small"
        )
    return None


def make_bench(device: str, small: bool, folder: Path) -> Bench:
    """bfloat16 on a card; float32 and one thread on a CPU, where shapes are small enough for Triton's interpreter."""
    if device == "cpu":
        torch.set_num_threads(1)
        return Bench(torch.device("cpu"), small, torch.float32, folder, warmup=1, repeats=1)
    return Bench(torch.device("cuda", torch.cuda.current_device()), small, torch.bfloat16, folder)
