"""Every kernel variant compiles for cards that are not here: no spills, matrix units where there are any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(name: str, *options: str, timeout: float) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / f"{name}.py"), *options]
    ended = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_kernels_compile_for_cards() -> None:
    run("compile_checks", timeout=900)


def test_a_sample_of_what_a_search_tries_compiles() -> None:
    run("candidate_compile_checks", "-m", "not slow", timeout=300)


@pytest.mark.slow
def test_everything_that_a_search_tries_compiles() -> None:
    run("candidate_compile_checks", timeout=3600)
