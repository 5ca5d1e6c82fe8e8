"""The API's hold on the engine process: starts it, talks to it, restarts it when it dies."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.protocol import (
    AdapterLoadError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineState,
    EngineStats,
    QueueFullError,
    QueueTimeoutError,
    RequestRefusedError,
    StepEvent,
)
from loramux.server.engine.sockets import SocketDirectory, remove_stale
from loramux.server.engine.transport import (
    ClientEnd,
    ColumnDecoder,
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
STEP_TIMEOUT_SECONDS = 120.0
FIRST_STEP_FACTOR = 5
WATCHES_PER_TIMEOUT = 20


@dataclass(slots=True)
class _Stream:
    """A request's outputs on their way to it, and what the first of them said for all.

    `waiting` are its prompt's tokens until its first output is there, then 0.
    """

    waiting: int
    queue: asyncio.Queue[EngineOutput | EngineError] = field(default_factory=asyncio.Queue)
    cached_tokens: int = 0
    scheduled_at: float | None = None


class _Limits:
    """How long one request may take, from now on: to its first output, and in all (seconds; None is any time)."""

    def __init__(self, first: float | None, whole: float | None) -> None:
        self._first, self._whole = first, whole
        self._start = asyncio.get_running_loop().time()

    async def next(self, stream: _Stream) -> EngineOutput | EngineError:
        """The stream's next output. Raises `QueueTimeoutError` or `DeadlineError` if there is none in time."""
        first = self._first if stream.waiting else None
        seconds = min((limit for limit in (first, self._whole) if limit is not None), default=None)
        if seconds is None or not stream.queue.empty():
            return await stream.queue.get()
        try:
            async with asyncio.timeout_at(self._start + seconds):
                return await stream.queue.get()
        except TimeoutError:
            if seconds == first:
                raise QueueTimeoutError(f"no token after {seconds:g} s") from None
            raise DeadlineError(f"not done after {seconds:g} s") from None


class ProcessEngineClient:
    """An `EngineClient` whose engine is a child process.

    If the process dies, every request in flight gets `EngineDeadError`, `state` is "dead", and a new process is
    started after a pause that doubles with every death in a row. A process that says it cannot start (the model is
    not supported, does not fit) is not restarted; `wait_ready` raises its message.

    A ready engine reports several times a second while it works and every second while it is idle. One that is silent
    for `step_timeout_seconds` hangs in a step: it is killed, and what follows is the same. Until its first step is done
    it may take `FIRST_STEP_FACTOR` times as long, because kernels are compiled in it.

    A request is refused while as many as the configuration says run or wait, and while others wait with so many tokens
    that its own would go beyond the bound: a long prompt is let in when nothing else waits. One that has no output
    after `queue_timeout_seconds`, or is not done after `request_timeout_seconds`, is given up (None: never).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        step_timeout_seconds: float = STEP_TIMEOUT_SECONDS,
        queue_timeout_seconds: float | None = None,
        request_timeout_seconds: float | None = None,
    ) -> None:
        self._config = config
        self._step_timeout = step_timeout_seconds
        self._queue_timeout = queue_timeout_seconds
        self._request_timeout = request_timeout_seconds
        self._waiting_tokens = 0
        self._silent = 0.0
        self._has_stepped = False
        self._restarts = {"died": 0, "stuck": 0}
        self._state: EngineState = "starting"
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._events: deque[StepEvent] = deque(maxlen=MAX_EVENTS)
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._call_ids = itertools.count()
        self._end: ClientEnd | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._failure: str | None = None
        self._pinned: set[str] = set()
        self._was_ready = False
        remove_stale()
        self._directory = SocketDirectory()

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

    @property
    def restarts(self) -> Mapping[str, int]:
        """How many engine processes that had been ready were replaced, by why they ended: `died`, `stuck`."""
        return self._restarts

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
                    while self._streams:
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
            self._directory.close()

    async def _end_process(self) -> None:
        """Tells a ready engine to stop and waits for it; kills one that is still loading, or that does not end."""
        process = self._process
        if process is None:
            return
        ended = asyncio.create_task(process.wait())
        if self._end is not None:  # in a task: an engine that has just died takes the socket with it
            telling = asyncio.create_task(self._end.send(Command.STOP))
            await asyncio.wait({ended}, timeout=EXIT_SECONDS)
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await ended

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `EngineClient.generate`."""
        end = self._require_end()
        bound = self.info.max_num_seqs + self._config.max_queue
        if len(self._streams) >= bound:
            raise QueueFullError(f"{len(self._streams)} requests are running or waiting, the bound is {bound}")
        tokens = len(request.prompt_token_ids)
        if self._waiting_tokens and self._waiting_tokens + tokens > self._config.max_queue_tokens:
            raise QueueFullError(
                f"prompts of {self._waiting_tokens} tokens wait, another {tokens} would go beyond the bound of "
                f"{self._config.max_queue_tokens}"
            )
        if request.request_id in self._streams:
            raise EngineError(f"request id {request.request_id} is in use", retryable=False)
        stream = self._streams[request.request_id] = _Stream(tokens)
        self._waiting_tokens += tokens
        limits = _Limits(self._queue_timeout, self._request_timeout)
        finished = False
        try:
            await end.send(Command.ADD, encode_request(request))
            while not finished:
                item = await limits.next(stream)
                self._has_begun(stream)
                if isinstance(item, EngineError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._streams.pop(request.request_id, None)
            self._has_begun(stream)
            self._changed.set()
            if not finished and self._end is end:
                await end.send(Command.ABORT, [request.request_id])

    def _has_begun(self, stream: _Stream) -> None:
        self._waiting_tokens -= stream.waiting
        stream.waiting = 0

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
        urls = [f"ipc://{self._directory.path}/{kind}-{generation}" for kind in ("commands", "reports")]
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
            watch = asyncio.create_task(self._until_stuck(end))
            try:
                ended = asyncio.create_task(self._process.wait())
                await asyncio.wait({ended, reader, watch}, return_when=asyncio.FIRST_COMPLETED)
                was_ready = self._end is end
                if was_ready and self._state != "draining":
                    self._restarts["stuck" if watch.done() else "died"] += 1
                if not ended.done():  # it is stuck, or the reader failed: no request would ever be answered
                    self._process.kill()
                await ended
                await asyncio.sleep(0.05)  # what the process sent before it ended is still on its way
                if reader.done() and reader.exception() is not None:
                    logger.error("the engine's reports could not be read", exc_info=reader.exception())
            finally:
                reader.cancel()
                watch.cancel()
                await asyncio.wait({reader, watch})
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

    async def _until_stuck(self, end: ClientEnd) -> None:
        """Returns when a ready engine has been silent for too long.

        Silence is counted in waits of this process, not read from a clock: if the API itself was stopped for a while
        (a suspended machine, a debugger), the reports that piled up meanwhile are read before the engine is judged.
        """
        wait = self._step_timeout / WATCHES_PER_TIMEOUT
        self._silent, self._has_stepped = 0.0, False
        while True:
            await asyncio.sleep(wait)
            if self._end is not end:  # it still loads
                continue
            self._silent += wait
            limit = self._step_timeout * (1 if self._has_stepped else FIRST_STEP_FACTOR)
            if self._silent >= limit:
                logger.error(
                    "the engine has not reported for %g s (--step-timeout-seconds): it hangs in a step and is killed",
                    limit,
                )
                return

    async def _read(self, end: ClientEnd) -> None:
        columns = ColumnDecoder()
        while True:
            kind, *content = await end.receive()
            self._silent = 0.0
            if kind == Report.STEP:
                self._has_stepped = True
                self._take_step(columns, content)
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

    def _take_step(self, columns: ColumnDecoder, content: list[Any]) -> None:
        request_ids, tokens, others, event = content
        self._events.append(decode_event(event))
        for request_id, token in columns.decode(request_ids, tokens):
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.queue.put_nowait(
                    EngineOutput(
                        request_id, (token,), cached_tokens=stream.cached_tokens, scheduled_at=stream.scheduled_at
                    )
                )
        for raw in others:
            self._take_output(decode_output(raw))

    def _take_output(self, output: EngineOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        stream.cached_tokens, stream.scheduled_at = output.cached_tokens, output.scheduled_at
        if output.finish_reason is not None:  # it no longer counts as running, however slowly it is read
            del self._streams[output.request_id]
            self._changed.set()
        if output.finish_reason == "error":
            message = output.error or "the engine refused the request"
            kinds = {"adapter": AdapterLoadError, "request": RequestRefusedError}
            kind = kinds.get(output.error_kind or "")
            stream.queue.put_nowait(EngineError(message, retryable=False) if kind is None else kind(message))
        else:
            stream.queue.put_nowait(output)

    def _fail_all(self, message: str) -> None:
        for stream in self._streams.values():
            stream.queue.put_nowait(EngineDeadError(message))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(message))

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._changed.set()


def _environment() -> dict[str, str]:
    """The engine's environment: the API's, without the tokenizers' fork warning."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
