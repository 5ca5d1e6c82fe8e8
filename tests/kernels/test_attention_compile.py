"""The attention kernels compile for cards that are not here: no spills, matrix units where there are any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("attention_compile_checks.py")


def run(*options: str, timeout: float) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS), *options]
    ended = subprocess.run(
        command, cwd=CHECKS.parents[2], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_attention_kernels_compile_for_cards() -> None:
    run("-m", "not slow", timeout=600)


@pytest.mark.slow
def test_every_shape_type_and_card_compiles() -> None:
    run(timeout=3600)
