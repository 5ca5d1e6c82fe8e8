"""Runs store operations in forked children and kills each with SIGKILL at another line of the store's code.

Usage: crash_worker.py FOLDER POINTS OPERATION... Prints, as JSON, what was found after each kill, by operation.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from store_helpers import BASE, lora, safetensors, upload

from loramux.adapters_store import store as store_module
from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.registry import Sharing
from loramux.adapters_store.store import AdapterStore

CODE = str(Path(store_module.__file__).resolve().parent)
FILES = {"store.py", "storage.py", "registry.py", "schema.py"}
LIMITS = StoreLimits(min_free_bytes=0)


def weights(seed: int) -> bytes:
    return safetensors(lora(seed=seed))


def prepare(root: Path) -> None:
    store = AdapterStore(root, BASE, LIMITS)
    upload(store, "a", weights=weights(1), description="old")
    upload(store, "b", weights=weights(2))
    store.close()


def operate(root: Path, operation: str) -> None:
    """Opens the store, which is part of what is killed, and changes it."""
    store = AdapterStore(root, BASE, LIMITS)
    if operation == "new version":
        upload(store, "a", weights=weights(3), description="new", piece=1 << 20)
    elif operation == "new name":
        upload(store, "c", weights=weights(3), description="new", piece=1 << 20)
    elif operation == "same content":
        upload(store, "a", weights=weights(1), description="new", piece=1 << 20)
    elif operation == "share":
        store.update("a", description="new", sharing=Sharing("shared", ("them", "others")))
    elif operation == "delete":
        store.delete("a")
    store.close()


class Killer:
    """Counts executed lines of the store's files and ends the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.lines = 0
        self._kill_at = kill_at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if os.path.basename(name) not in FILES or not os.path.realpath(name).startswith(CODE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def look(root: Path) -> dict[str, Any]:
    """What the next process finds; a damaged store raises."""
    store = AdapterStore(root, BASE, LIMITS)
    found = {v.id: [v.digest, v.description, v.status] for n in store.list().data for v in store.versions(n.name)}
    shared = [v.name for v in store.visible("them").data if v.shared_with == ("others", "them")]
    digests = {v[0] for v in found.values()}
    stray = {p.name for p in store.blob_dir.iterdir()} ^ {blob_path(root, str(d)).name for d in digests}
    uploads = len(list((root / "uploads").iterdir()))
    usable = upload(store, "after", weights=weights(4)).created
    store.close()
    return {"found": found, "shared": shared, "stray": sorted(stray), "uploads": uploads, "usable": usable}


def run(folder: Path, operation: str, points: int) -> list[dict[str, Any]]:
    prepared = folder / "prepared"
    if not prepared.exists():
        prepare(prepared)
    work = folder / operation.replace(" ", "-")
    shutil.copytree(prepared, work / "count")
    counter = Killer(None)
    sys.settrace(counter)
    operate(work / "count", operation)
    sys.settrace(None)
    results = []
    for point in range(points):
        root = work / f"root{point}"
        shutil.copytree(prepared, root)
        kill_at = 1 + point * (counter.lines - 1) // max(1, points - 1)
        child = os.fork()
        if not child:
            sys.settrace(Killer(kill_at))
            operate(root, operation)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        results.append({"line": kill_at, "killed": os.WIFSIGNALED(status), **look(root)})
        shutil.rmtree(root)
    return results


def main(folder: Path, points: int, operations: list[str]) -> None:
    json.dump({operation: run(folder, operation, points) for operation in operations}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
