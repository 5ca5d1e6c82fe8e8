"""Waiting for what happens elsewhere soon."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0
PAUSE_SECONDS = 0.005


def wait_for(condition: Callable[[], bool], what: str = "what was waited for did not happen") -> None:
    """Polls until the condition holds; the bound only ends a test that has failed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(PAUSE_SECONDS)
