"""Where the sockets between the API's and the engine's process lie: a private directory that ends with its owner.

A process that is killed cannot remove its directory. The next one does: the owner holds a lock on a file in it, which
the system gives back however the owner ends, in whatever container it ran.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "loramux-engine-"
LOCK = "owner.lock"
MAX_DIRECTORY_CHARS = 80
FALLBACK = Path("/tmp")


class SocketDirectory:
    """A directory of mode 0700 whose path is short enough for Unix sockets, locked as long as this object is open."""

    def __init__(self) -> None:
        """Makes it in the temporary folder, or in /tmp if that one's path is long."""
        directory = Path(tempfile.gettempdir())
        longest = len(str(directory)) + 1 + len(PREFIX) + 8
        parent = directory if longest <= MAX_DIRECTORY_CHARS else FALLBACK
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes the directory; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_stale() -> int:
    """Removes directories of this user whose owner is gone; returns how many. Others are left alone, and so is one
    without a lock file, which may be just being made."""
    removed = 0
    for parent in {Path(tempfile.gettempdir()), FALLBACK}:
        with contextlib.suppress(OSError):
            for directory in parent.glob(f"{PREFIX}*"):
                removed += _remove_if_stale(directory)
    if removed:
        logger.info("removed the sockets of %d servers that had been killed", removed)
    return removed


def _remove_if_stale(directory: Path) -> bool:
    """Whether the directory was stale, and is gone."""
    try:
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()
    finally:
        os.close(lock)
