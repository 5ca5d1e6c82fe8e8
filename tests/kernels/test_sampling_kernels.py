"""The sampling kernels under the interpreter and compiled for cards that are not here, each in a process of its own."""

from pathlib import Path

import pytest
from support.checks import run_checks

HERE = Path(__file__).parent


@pytest.mark.parametrize("how", ["interpreted", "compile"])
def test_sampling_kernels(how: str) -> None:
    run_checks(HERE / f"sampling_{how}_checks.py", interpreted=how == "interpreted")
