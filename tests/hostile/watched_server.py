"""`loramux serve` whose event loop is watched: `python watched_server.py serve FLAGS...` writes each stall to the file
that `WATCH_FILE` names, as a line of JSON.

A stall is the lateness of a timer, or the processor time that this process used meanwhile if that is less: a machine
that is busy with something else makes no stalls.
"""

import asyncio
import gc
import json
import os
import socket
import sys
import time
from pathlib import Path

from loramux.server import cli
from loramux.server.api import serve

BEAT_SECONDS = 0.005
REPORTED_SECONDS = 0.02


class Watch:
    """Notes how late the loop's timers are, and how much of that was the garbage collector."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._collected = 0.0
        self._began = 0.0

    def collector(self, phase: str, info: dict[str, int]) -> None:
        """Called by the garbage collector, before and after."""
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._began

    async def run(self) -> None:
        """Watches until it is cancelled."""
        gc.callbacks.append(self.collector)
        with self._file.open("a") as out:
            while True:
                wall, used, self._collected = time.perf_counter(), time.process_time(), 0.0
                await asyncio.sleep(BEAT_SECONDS)
                late = time.perf_counter() - wall - BEAT_SECONDS
                stall = min(late, time.process_time() - used)
                if stall > REPORTED_SECONDS:
                    told = {"at": time.time(), "stall": stall, "late": late, "collector": self._collected}
                    out.write(json.dumps(told) + "\n")
                    out.flush()


class WatchedServer(serve.Server):
    """The server with a watch on its loop."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.startup`."""
        await super().startup(sockets)
        self._watch = asyncio.create_task(Watch(Path(os.environ["WATCH_FILE"])).run())


if __name__ == "__main__":
    serve.Server = WatchedServer  # type: ignore[misc]
    sys.exit(cli.main())
