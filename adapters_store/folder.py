"""Adapters that already lie on this machine: their two files into an upload, without leaving the directories allowed.

What a client may name is the text of a path, so every way out is closed: `..`, absolute paths elsewhere, links that
lead out, and links that are put in place between the check and the reading.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.storage import CONFIG_FILE, WEIGHTS_FILE, Upload

COPY_BYTES = 1 << 20
MAX_PATH_CHARS = 4096


def copy_folder(folder: Path, upload: Upload) -> None:
    """Copies an adapter's files, wherever the operator keeps them. Blocks. Raises `AdapterNotFound`, and what the
    upload raises for files that are too large."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            descriptor = os.open(folder / file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            raise AdapterNotFound(f"there is no readable {file}", code="adapter_not_found", field="path") from None
        _copy(descriptor, upload, file)


def copy_from_root(path: str, roots: Sequence[Path], upload: Upload) -> None:
    """Copies the files of the directory `path`: absolute, or below one of `roots` (resolved directories). Blocks.

    Raises `AdapterNotFound`, with the same words whatever there is outside of the roots.
    """
    for root in roots:
        if (folder := _inside(root, path)) is None:
            continue
        files = [(file, _inside(root, os.path.join(folder, file))) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        for file, real in files:
            if real is None:
                raise _not_there()
            _copy(_open_below(root, real), upload, file)
        return
    raise _not_there()


def _not_there() -> AdapterNotFound:
    return AdapterNotFound(
        f"under --adapter-root there is no such directory with {CONFIG_FILE} and {WEIGHTS_FILE}",
        code="adapter_not_found", field="lora_path",
    )  # fmt: skip


def _inside(root: Path, path: str) -> str | None:
    """The real path of what exists under that name below the root, links followed; None for anything else."""
    if "\0" in path or len(path) > MAX_PATH_CHARS:
        return None
    try:
        real = os.path.realpath(os.path.join(root, path), strict=True)
    except (OSError, ValueError):
        return None
    return real if Path(real).is_relative_to(root) and real != str(root) else None


def _open_below(root: Path, real: str) -> int:
    """A descriptor of a file below the root, taken step by step without following links: none is left in `real`."""
    *folders, name = Path(real).relative_to(root).parts
    steps = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=steps)
            os.close(steps)
            steps = deeper
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=steps)
    except OSError:
        raise _not_there() from None
    finally:
        os.close(steps)


def _copy(descriptor: int, upload: Upload, file: str) -> None:
    """The open file into the upload. Only a regular one: a pipe or a device would never end."""
    with os.fdopen(descriptor, "rb") as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise _not_there()
        sink = upload.open_file(file)
        while piece := source.read(COPY_BYTES):
            sink.write(piece)
        sink.close()
