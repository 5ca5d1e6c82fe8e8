"""Runs `dense_interpreted_checks.py` under TRITON_INTERPRET=1, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("dense_interpreted_checks.py")


def test_dense_kernels_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)]
    run = subprocess.run(command, cwd=CHECKS.parents[2], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
