"""The dense kernels compile for cards that are not here: no spills, matrix units where there are any."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("dense_compile_checks.py")


def test_dense_kernels_compile_for_cards() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)]
    run = subprocess.run(command, cwd=CHECKS.parents[2], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
