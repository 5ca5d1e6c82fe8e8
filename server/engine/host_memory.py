"""How the engine's process takes and returns host memory, and how much is left."""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt`."""
MMAP_BYTES = 32 << 20
"""The largest that glibc takes."""
TRIM_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Lets glibc's allocator keep what a step frees for the next one; whether it does now.

    Activations of a prefill are megabytes each. By default they are given back to the kernel when they are freed, and
    zeroed page by page when the next layer asks for as much: 5 to 10% of a small model's prefill on a CPU. Up to
    `TRIM_BYTES` stay with the process instead. Nothing is changed where the environment sets MALLOC_TRIM_THRESHOLD_
    or MALLOC_MMAP_THRESHOLD_, which is how to switch this off, and where the C library is another one.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # mallopt gives 1 for success. With a threshold set by hand, the other no longer follows what was freed.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES) == 1 and mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES) == 1)


def host_bytes_left() -> int:
    """Bytes that this process may still take: what the kernel calls available, within its control group's limit."""
    left = int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        available = next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")
        )
        left = int(available.split()[1]) * 1024
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            left = min(left, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        return left  # not Linux, or no such group: what is known
    return left
