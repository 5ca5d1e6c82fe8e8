"""`kill -9` at many lines of an operation: the next opening finds the state before it or after it, nothing between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters_store import store as store_module

POINTS = 32
OPERATIONS = ("new version", "new name", "same content", "share", "delete")
Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What was found after every kill, by operation; one process forks them all."""
    here = Path(__file__).parent
    folder = tmp_path_factory.mktemp("crash")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(store_module.__file__).parents[2]}:{here}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(here / "crash_worker.py"), str(folder), str(POINTS), *OPERATIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_leaves_the_state_before_or_after(killed: Runs, operation: str) -> None:
    runs = killed[operation]
    states = []
    for run in runs:
        assert run["stray"] == [], run
        assert run["uploads"] == 0
        assert run["usable"]
        assert all(status == "ready" for _, _, status in run["found"].values())
        found = {adapter: description for adapter, (_, description, _) in run["found"].items()}
        before = {"a@1": "old", "b@1": None}
        after = {
            "new version": {"a@1": "new", "a@2": "new", "b@1": None},
            "new name": {"a@1": "old", "b@1": None, "c@1": "new"},
            "same content": {"a@1": "new", "b@1": None},
            "share": {"a@1": "new", "b@1": None},
            "delete": {"b@1": None},
        }[operation]
        assert found in (before, after), run
        assert run["shared"] == (["a"] if operation == "share" and found == after else [])
        states.append(found == after)
    assert sum(run["killed"] for run in runs) >= POINTS - 1
    assert states == sorted(states)  # once it is done it stays done
    assert not states[0]
    assert states[-1]
