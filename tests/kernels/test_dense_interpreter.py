"""Runs `dense_interpreted_checks.py` under TRITON_INTERPRET=1, in a process of its own."""

from pathlib import Path

from support.checks import run_checks

CHECKS = Path(__file__).with_name("dense_interpreted_checks.py")


def test_dense_kernels_under_the_interpreter() -> None:
    run_checks(CHECKS, interpreted=True)
