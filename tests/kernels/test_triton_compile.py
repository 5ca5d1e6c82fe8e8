"""Every kernel variant compiles for cards that are not here: no spills, matrix units where there are any."""

from pathlib import Path

import pytest
from support.checks import run_checks

HERE = Path(__file__).parent
CANDIDATES = HERE / "candidate_compile_checks.py"


def test_kernels_compile_for_cards() -> None:
    run_checks(HERE / "compile_checks.py", interpreted=False, options=("-m", "not slow"), timeout=900)


@pytest.mark.slow
def test_kernels_compile_for_every_card() -> None:
    run_checks(HERE / "compile_checks.py", interpreted=False, timeout=900)


def test_a_sample_of_what_a_search_tries_compiles() -> None:
    run_checks(CANDIDATES, interpreted=False, options=("-m", "not slow"), timeout=300)


@pytest.mark.slow
def test_everything_that_a_search_tries_compiles() -> None:
    run_checks(CANDIDATES, interpreted=False, timeout=3600)
