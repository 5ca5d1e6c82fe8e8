"""The dense kernels compile for cards that are not here: no spills, matrix units where there are any."""

from pathlib import Path

import pytest
from support.checks import run_checks

CHECKS = Path(__file__).with_name("dense_compile_checks.py")


def test_dense_kernels_compile_for_cards() -> None:
    run_checks(CHECKS, interpreted=False, options=("-m", "not slow"))


@pytest.mark.slow
def test_dense_kernels_compile_for_every_card() -> None:
    run_checks(CHECKS, interpreted=False)
