"""What the engine's process does with freed memory, seen in processes of their own, and what is left."""

import os
import platform
import subprocess
import sys

import pytest

from loramux.server.engine.host_memory import TRIM_BYTES, host_bytes_left

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

SCRIPT = """
import ctypes, sys
from loramux.server.engine.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

kept = keep_freed_memory()
before, size = resident(), 8 << 20
parts = [libc.malloc(size) for _ in range(8)]
for part in parts:
    ctypes.memset(part, 1, size)
for part in parts:
    libc.free(part)
print(int(kept), resident() - before)
"""


def run(**environment: str) -> tuple[int, int]:
    """(what `keep_freed_memory` said, bytes that stay resident after 64 MiB in parts of 8 were freed)."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    kept, left = done.stdout.split()
    return int(kept), int(left)


@glibc
def test_freed_memory_stays_with_the_process() -> None:
    kept, left = run()
    assert kept == 1
    assert 60 << 20 < left < TRIM_BYTES


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_environment_has_the_last_word(name: str) -> None:
    kept, left = run(**{name: "131072"})
    assert kept == 0
    assert left < 16 << 20


def test_the_memory_that_is_left_is_known() -> None:
    assert 1 << 20 < host_bytes_left() < 1 << 50
