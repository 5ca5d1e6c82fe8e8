"""Kernel checks in a process of their own: Triton is interpreted or compiled from its import on, and not both."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_checks(*files: Path, interpreted: bool, options: tuple[str, ...] = (), timeout: float = 600) -> None:
    """Runs pytest over the files; AssertionError with what it wrote when anything in them fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files), *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stdout + run.stderr
