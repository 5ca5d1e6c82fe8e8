"""The sockets' directory: private, short, and cleaned up after owners that were killed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux.server.engine import sockets
from loramux.server.engine.sockets import LOCK, MAX_DIRECTORY_CHARS, PREFIX, SocketDirectory, remove_stale

OWNER = (
    "import os, signal\n"
    "from loramux.server.engine.sockets import SocketDirectory\n"
    "print(SocketDirectory().path, flush=True)\n"
    "signal.pause()\n"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, with a short path."""
    tmp_path_factory.getbasetemp()  # which would be made in the folder that is patched in
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sockets, "FALLBACK", folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_private_and_removed(temporary: Path) -> None:
    directory = SocketDirectory()
    assert directory.path.parent == temporary
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert remove_stale() == 0
    directory.close()
    directory.close()
    assert list(temporary.iterdir()) == []


def test_a_long_temporary_folder_is_not_used(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * MAX_DIRECTORY_CHARS)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = SocketDirectory()
    assert directory.path.parent == temporary
    directory.close()


def test_after_a_kill(temporary: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        path = Path(owner.stdout.readline().strip())
        (path / "commands-0").touch()
        assert remove_stale() == 0
        assert path.is_dir()
        owner.kill()
        owner.wait()
    assert remove_stale() == 1
    assert not path.exists()


def test_what_is_not_ours_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked, linked, other = (temporary / f"{PREFIX}{name}" for name in ("new", "link", "file"))
    unlocked.mkdir()
    target = temporary / "target"
    target.mkdir()
    (target / LOCK).touch()
    linked.symlink_to(target)
    other.touch()
    assert remove_stale() == 0
    (unlocked / LOCK).symlink_to(target / LOCK)
    assert remove_stale() == 0
    (unlocked / LOCK).unlink()
    (unlocked / LOCK).touch()
    with monkeypatch.context() as stranger:
        stranger.setattr(os, "getuid", lambda: 12345)
        assert remove_stale() == 0
    assert remove_stale() == 1  # by now nobody holds it
