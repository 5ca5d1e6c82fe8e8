"""Runs the `*_interpreted_checks.py` of the LoRA kernels under TRITON_INTERPRET=1, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHECKS = [str(HERE / f"{name}interpreted_checks.py") for name in ("", "fold_", "work_")]


def test_triton_backend_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *CHECKS]
    run = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
