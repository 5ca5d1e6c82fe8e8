"""Runs `kernel_path_checks.py` under TRITON_INTERPRET=1, in a process of its own; and how graphs are sized."""

import os
import subprocess
import sys
from pathlib import Path

from loramux.server.engine.graphs import graph_sizes

CHECKS = Path(__file__).with_name("kernel_path_checks.py")


def test_the_engine_on_interpreted_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)]
    run = subprocess.run(command, cwd=CHECKS.parents[2], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


def test_graph_sizes_hold_every_batch_with_little_padding() -> None:
    for most in (1, 3, 64, 100, 256, 512):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes), reverse=True)
        assert sizes[0] == most
        for rows in range(4, most + 1):
            size = min(size for size in sizes if size >= rows)
            assert size <= rows + max(3, rows // 4)
