"""The engine's own process: commands in, steps, reports out.

Started by the client as `python -m loramux.server.engine.process COMMANDS REPORTS` with the configuration as one line
of JSON on standard input. It ends when told to, or when standard input closes: an engine never outlives its API.
"""

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from loramux.adapters_store.device import AdapterLoadFailure
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.host_memory import keep_freed_memory
from loramux.server.engine.loading import UnsupportedModelError
from loramux.server.engine.protocol import EngineOutput, StepEvent
from loramux.server.engine.transport import (
    Command,
    EngineEnd,
    Report,
    decode_request,
    encode_info,
    encode_stats,
)
from loramux.server.observability import logs

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.25
IDLE_SECONDS = 1.0
LOAD_POLL_SECONDS = 0.001
EXIT_CANNOT_START = 2


class EngineLoop:
    """Drives one core from one end of the wire."""

    def __init__(self, core: EngineCore, end: EngineEnd) -> None:
        self._core = core
        self._end = end
        self._last_stats = 0.0
        self._stopping = False

    def run(self) -> None:
        """Runs until told to stop."""
        timeout = 0.0
        while not self._stopping:
            for message in self._end.receive(timeout):
                self._handle(message)
            if not self._core.has_work():
                self._send_stats()
                self._last_stats = 0.0  # the first step after a pause is told at once
                timeout = IDLE_SECONDS
                continue
            result = self._core.step()
            if not result.is_empty:
                column = result.column
                self._end.send_step(column.request_ids, column.tokens, result.others, result.event)
            if time.monotonic() - self._last_stats >= STATS_SECONDS:
                self._send_stats()
            timeout = LOAD_POLL_SECONDS if self._core.is_waiting_only() else 0.0

    def _send_stats(self) -> None:
        self._end.send(Report.STATS, encode_stats(self._core.stats()))
        self._last_stats = time.monotonic()

    def _handle(self, message: list[Any]) -> None:
        kind, *content = message
        if kind == Command.ADD:
            request = decode_request(content[0])
            try:
                self._core.add(request)
            except (ValueError, OverflowError) as error:
                refused = EngineOutput(
                    request.request_id, finish_reason="error", error=str(error), error_kind="request"
                )
                self._end.send_step((), np.zeros(0, dtype=np.int64), [refused], StepEvent())
        elif kind == Command.ABORT:
            for request_id in content[0]:
                self._core.abort(request_id)
        elif kind == Command.FORGET:
            self._core.forget_adapter(content[0])
        elif kind == Command.PIN:
            call, digest, pinned = content
            failed: str | None = None
            try:
                self._core.pin_adapter(digest, pinned)
            except AdapterLoadFailure as failure:
                failed = str(failure)
            self._end.send(Report.PINNED, call, failed)
        elif kind == Command.STOP:
            self._stopping = True


def _exit_with_parent() -> None:
    """Ends the process when standard input closes, which it does however the parent ends."""

    descriptor = sys.stdin.fileno()  # read unbuffered: a buffer's lock held here would break interpreter shutdown

    def watch() -> None:
        while os.read(descriptor, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _cannot_start(end: EngineEnd, message: str) -> int:
    """Says why, and gives the exit status."""
    end.send(Report.FAILED, message)
    end.close()
    return EXIT_CANNOT_START


def main(commands: str, reports: str) -> int:
    """The process's body; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by terminals and supervisors;
        signal.signal(number, signal.SIG_IGN)  # the API handles them: it drains, then tells the engine to stop
    keep_freed_memory()
    config = EngineConfig(**json.loads(sys.stdin.buffer.readline()))
    logs.configure(config.log_level, config.log_format, process="engine")
    _exit_with_parent()
    end = EngineEnd(commands, reports)
    try:
        core = EngineCore(config)
    except UnsupportedModelError as error:
        return _cannot_start(end, str(error))
    except Exception as error:
        logger.exception("the engine cannot start")
        return _cannot_start(end, f"{type(error).__name__}: {error}")
    core.constraints.prepare()
    gc.collect()
    gc.freeze()
    end.send(Report.READY, encode_info(core.info))
    try:
        EngineLoop(core, end).run()
    finally:
        core.close()
        gc.unfreeze()  # so that extension modules see their objects freed before they are unloaded
    end.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
