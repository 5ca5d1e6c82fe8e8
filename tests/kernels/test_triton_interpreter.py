"""Runs the `*_interpreted_checks.py` of the LoRA kernels under TRITON_INTERPRET=1, in a process of their own."""

from pathlib import Path

from support.checks import run_checks

HERE = Path(__file__).parent
CHECKS = [HERE / f"{name}interpreted_checks.py" for name in ("", "fold_", "work_")]


def test_triton_backend_under_the_interpreter() -> None:
    run_checks(*CHECKS, interpreted=True, timeout=900)
