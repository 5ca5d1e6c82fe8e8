"""The API's hold on the engine process: starts it, talks to it, restarts it when it dies."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.protocol import (
    AdapterLoadError,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineState,
    EngineStats,
    QueueFullError,
    StepEvent,
)
from loramux.server.engine.transport import (
    ClientEnd,
    Command,
    Report,
    decode_event,
    decode_info,
    decode_output,
    decode_stats,
    encode_request,
)

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000
RESTART_FIRST_SECONDS = 0.5
RESTART_MAX_SECONDS = 15.0
EXIT_SECONDS = 5.0
MAX_DIRECTORY_CHARS = 80


class ProcessEngineClient:
    """An `EngineClient` whose engine is a child process.

    If the process dies, every request in flight gets `EngineDeadError`, `state` is "dead", and a new process is
    started after a pause that doubles with every death in a row. A process that says it cannot start (the model is
    not supported, does not fit) is not restarted; `wait_ready` raises its message.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._state: EngineState = "starting"
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._events: deque[StepEvent] = deque(maxlen=MAX_EVENTS)
        self._queues: dict[str, asyncio.Queue[EngineOutput | EngineError]] = {}
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._call_ids = itertools.count()
        self._end: ClientEnd | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._failure: str | None = None
        self._pinned: set[str] = set()
        self._was_ready = False
        self._directory = _socket_directory()

    @property
    def state(self) -> EngineState:
        """See `EngineClient.state`."""
        return self._state

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient.info`."""
        if self._info is None:
            raise EngineDeadError("the engine is not ready yet")
        return self._info

    @property
    def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return self._stats

    @property
    def pid(self) -> int | None:
        """The engine process's id while there is one."""
        return self._process.pid if self._process is not None else None

    def drain_events(self) -> list[StepEvent]:
        """See `EngineClient.drain_events`."""
        events = list(self._events)
        self._events.clear()
        return events

    async def start(self) -> None:
        """See `EngineClient.start`."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self, timeout: float | None = None) -> None:
        """See `EngineClient.wait_ready`."""
        async with asyncio.timeout(timeout):
            while self._state != "ready":
                if self._failure is not None:
                    raise EngineError(self._failure, retryable=False)
                self._changed.clear()
                await self._changed.wait()

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        """See `EngineClient.stop`."""
        self._set_state("draining")
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    while self._queues:
                        self._changed.clear()
                        await self._changed.wait()
            await self._end_process()
            if self._supervisor is not None:
                self._supervisor.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._supervisor
                self._supervisor = None
        finally:
            self._fail_all("the server is shutting down")
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _end_process(self) -> None:
        """Tells a ready engine to stop and waits for it; kills one that is still loading, or that does not end."""
        process = self._process
        if process is None:
            return
        try:
            if self._end is None:
                raise TimeoutError
            await self._end.send(Command.STOP)
            await asyncio.wait_for(process.wait(), EXIT_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `EngineClient.generate`."""
        end = self._require_end()
        bound = self.info.max_num_seqs + self._config.max_queue
        if len(self._queues) >= bound:
            raise QueueFullError(f"{len(self._queues)} requests are running or waiting, the bound is {bound}")
        if request.request_id in self._queues:
            raise EngineError(f"request id {request.request_id} is in use", retryable=False)
        queue: asyncio.Queue[EngineOutput | EngineError] = asyncio.Queue()
        self._queues[request.request_id] = queue
        finished = False
        try:
            await end.send(Command.ADD, encode_request(request))
            while not finished:
                item = await queue.get()
                if isinstance(item, EngineError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._queues.pop(request.request_id, None)
            self._changed.set()
            if not finished and self._end is end:
                await end.send(Command.ABORT, [request.request_id])

    async def forget_adapter(self, digest: str) -> None:
        """See `EngineClient.forget_adapter`; nothing to do while there is no engine."""
        self._pinned.discard(digest)
        if self._end is not None:
            await self._end.send(Command.FORGET, digest)

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        """See `EngineClient.pin_adapter`; pins are repeated when the engine is restarted."""
        end = self._require_end()
        call = next(self._call_ids)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        try:
            await end.send(Command.PIN, call, digest, pinned)
            await future
        finally:
            self._calls.pop(call, None)
        (self._pinned.add if pinned else self._pinned.discard)(digest)

    def _require_end(self) -> ClientEnd:
        if self._state == "draining":
            raise EngineDeadError("the server is shutting down")
        if self._state != "ready" or self._end is None:
            raise EngineDeadError(f"the engine is {self._state}")
        return self._end

    async def _supervise(self) -> None:
        pause = RESTART_FIRST_SECONDS
        for generation in itertools.count():
            try:
                was_ready = await self._run_once(generation)
            except Exception as error:
                logger.exception("the engine process cannot be run")
                self._failure = f"the engine process cannot be run: {error}"
                self._set_state("dead")
                return
            if self._state == "draining" or self._failure is not None:
                return
            pause = RESTART_FIRST_SECONDS if was_ready else min(2 * pause, RESTART_MAX_SECONDS)
            logger.error("the engine process ended; a new one starts in %.1f s", pause)
            await asyncio.sleep(pause)

    async def _run_once(self, generation: int) -> bool:
        """One engine process from start to end; whether it became ready."""
        urls = [f"ipc://{self._directory}/{kind}-{generation}" for kind in ("commands", "reports")]
        end = ClientEnd(*urls)
        was_ready = False
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "loramux.server.engine.process", *urls,
                stdin=asyncio.subprocess.PIPE, start_new_session=True, env=_environment(),
            )  # fmt: skip
            stdin = self._process.stdin
            if stdin is None:
                raise RuntimeError("the engine process has no standard input")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stdin.write(json.dumps(self._config.to_dict()).encode() + b"\n")
                await stdin.drain()
            reader = asyncio.create_task(self._read(end))
            try:
                ended = asyncio.create_task(self._process.wait())
                await asyncio.wait({ended, reader}, return_when=asyncio.FIRST_COMPLETED)
                was_ready = self._end is end
                if not ended.done():  # the reader failed: without it no request would ever be answered
                    self._process.kill()
                await ended
                await asyncio.sleep(0.05)  # what the process sent before it ended is still on its way
                if reader.done() and reader.exception() is not None:
                    logger.error("the engine's reports could not be read", exc_info=reader.exception())
            finally:
                reader.cancel()
                await asyncio.wait({reader})
        finally:
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            self._process = None
            self._end = None
            end.close()
            if self._state != "draining":
                self._set_state("dead")
            self._stats = EngineStats()
            self._fail_all("the engine process ended while it served this request")
        return was_ready

    async def _read(self, end: ClientEnd) -> None:
        while True:
            kind, *content = await end.receive()
            if kind == Report.STEP:
                self._take_step(content)
            elif kind == Report.STATS:
                self._stats = decode_stats(content[0])
            elif kind == Report.READY:
                self._info = decode_info(content[0])
                self._end = end
                self._was_ready = True
                for digest in list(self._pinned):
                    await end.send(Command.PIN, next(self._call_ids), digest, True)
                if self._state != "draining":
                    self._set_state("ready")
            elif kind == Report.FAILED:
                if self._was_ready:  # it could start before, so it may again: the supervisor goes on trying
                    logger.error("the engine cannot start: %s", content[0])
                else:
                    self._failure = content[0]
                self._set_state("dead")
            elif kind == Report.PINNED:
                call, error = content
                future = self._calls.get(call)
                if future is not None and not future.done():
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(AdapterLoadError(error))

    def _take_step(self, content: list[Any]) -> None:
        outputs, event = content
        self._events.append(decode_event(event))
        for raw in outputs:
            output = decode_output(raw)
            queue = self._queues.get(output.request_id)
            if queue is None:
                continue
            if output.finish_reason is not None:  # it no longer counts as running, however slowly it is read
                del self._queues[output.request_id]
                self._changed.set()
            if output.finish_reason == "error":
                message = output.error or "the engine refused the request"
                is_load = output.error_kind == "adapter"
                queue.put_nowait(AdapterLoadError(message) if is_load else EngineError(message, retryable=False))
            else:
                queue.put_nowait(output)

    def _fail_all(self, message: str) -> None:
        for queue in self._queues.values():
            queue.put_nowait(EngineDeadError(message))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(message))

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._changed.set()


def _socket_directory() -> Path:
    """A private directory whose path is short enough for Unix sockets, in the temporary folder or else in /tmp."""
    directory = Path(tempfile.mkdtemp(prefix="loramux-"))
    if len(str(directory)) <= MAX_DIRECTORY_CHARS:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="loramux-", dir="/tmp"))


def _environment() -> dict[str, str]:
    """The engine's environment: the API's, without the tokenizers' fork warning."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
