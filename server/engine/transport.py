"""The wire between the API process and the engine process: ZeroMQ sockets carrying msgpack.

Nothing else knows ZeroMQ. Each side has one socket to send and one to receive, over Unix sockets in a private
directory. A message is a list whose first item says what it is; see `Command` and `Report`.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import astuple, fields
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zmq
import zmq.asyncio

from loramux.server.engine.protocol import (
    AdapterRef,
    AdapterResidency,
    Constraint,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    PoolingParams,
    SamplingParams,
    StepEvent,
)


class Command(IntEnum):
    """API -> engine."""

    ADD = 0  # request
    ABORT = 1  # request ids
    FORGET = 2  # digest
    PIN = 3  # call id, digest, pinned
    STOP = 4


class Report(IntEnum):
    """Engine -> API."""

    READY = 0  # info
    FAILED = 1  # message: the engine cannot start
    STEP = 2  # request ids or None, tokens, outputs, event; see `ColumnEncoder`
    STATS = 3  # stats
    PINNED = 4  # call id, error or None


def encode_request(request: EngineRequest) -> list[Any]:
    """The request as plain values."""
    adapters = [(a.digest, a.weight) for a in request.adapters]
    pooling = None if request.pooling is None else (request.pooling.layers, request.pooling.tokens)
    sampling = astuple(request.sampling)
    return [request.request_id, request.prompt_token_ids, sampling, adapters, request.salt, pooling, request.tenant]


def decode_request(raw: list[Any]) -> EngineRequest:
    """The inverse of `encode_request`."""
    request_id, prompt, sampling, adapters, salt, pooling, tenant = raw
    values = dict(zip((f.name for f in fields(SamplingParams)), sampling, strict=True))
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    values["logit_bias"] = tuple((token, bias) for token, bias in values["logit_bias"])
    if values["constraint"] is not None:
        values["constraint"] = Constraint(*values["constraint"])
    return EngineRequest(
        request_id,
        tuple(prompt),
        SamplingParams(**values),
        tuple(AdapterRef(d, w) for d, w in adapters),
        salt,
        None if pooling is None else PoolingParams(tuple(pooling[0]), pooling[1]),
        tenant,
    )


class ColumnEncoder:
    """One token for each of many requests, as plain values: whose they are is told when it changes.

    A column is (request ids, or None for those of the column before; the bytes of the tokens, int64 little-endian).
    """

    def __init__(self) -> None:
        self._told: tuple[str, ...] | None = None

    def encode(self, request_ids: tuple[str, ...], tokens: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        """The column; `request_ids` counts as unchanged when it is the same object."""
        told, self._told = self._told, request_ids
        return None if request_ids is told else request_ids, tokens.astype("<i8", copy=False).tobytes()


class ColumnDecoder:
    """The inverse of `ColumnEncoder`, column by column in the same order."""

    def __init__(self) -> None:
        self._request_ids: Seq[str] = ()

    def decode(self, request_ids: Seq[str] | None, tokens: bytes) -> Iterator[tuple[str, int]]:
        """(request id, token) of each. Raises ValueError when the numbers of the two differ."""
        if request_ids is not None:
            self._request_ids = request_ids
        return zip(self._request_ids, np.frombuffer(tokens, dtype="<i8").tolist(), strict=True)


def decode_output(raw: list[Any]) -> EngineOutput:
    """An output, which is a tuple and so packed as it is."""
    request_id, tokens, *rest = raw
    return EngineOutput(request_id, tuple(tokens), *rest)


def encode_event(event: StepEvent) -> tuple[Any, ...]:
    """The event as plain values."""
    return (event.scheduled_tokens, event.adapter_loads)


def decode_event(raw: list[Any]) -> StepEvent:
    """The inverse of `encode_event`."""
    return StepEvent(raw[0], tuple((digest, seconds) for digest, seconds in raw[1]))


def encode_stats(stats: EngineStats) -> tuple[Any, ...]:
    """The stats as plain values (`astuple` would copy every string of thousands of adapters)."""
    *counters, adapters = (getattr(stats, f.name) for f in fields(EngineStats))
    return (*counters, [(a.digest, a.device, a.host, a.pinned, a.users, a.bytes) for a in adapters])


def decode_stats(raw: list[Any]) -> EngineStats:
    """The inverse of `encode_stats`."""
    values = dict(zip((f.name for f in fields(EngineStats)), raw, strict=True))
    for name in ("running_adapters", "waiting_adapters"):
        values[name] = tuple(values[name])
    values["adapters"] = tuple(AdapterResidency(*a) for a in values["adapters"])
    return EngineStats(**values)


def encode_info(info: EngineInfo) -> tuple[Any, ...]:
    """The info as plain values."""
    return astuple(info)


def decode_info(raw: list[Any]) -> EngineInfo:
    """The inverse of `encode_info`."""
    values = dict(zip((f.name for f in fields(EngineInfo)), raw, strict=True))
    values["eos_token_ids"] = tuple(values["eos_token_ids"])
    return EngineInfo(**values)


class EngineEnd:
    """The engine's side: blocking, used from its one thread."""

    def __init__(self, commands: str, reports: str) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._reports = self._context.socket(zmq.PUSH)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)
        self._commands.connect(commands)
        self._reports.connect(reports)
        self._columns = ColumnEncoder()

    def receive(self, timeout_seconds: float) -> list[list[Any]]:
        """All commands that are there, waiting at most this long for the first."""
        found: list[list[Any]] = []
        while self._commands.poll(0 if found else int(timeout_seconds * 1000)):
            found.append(msgpack.unpackb(self._commands.recv(zmq.NOBLOCK)))
        return found

    def send(self, report: Report, *content: Any) -> None:
        """Sends a report; never blocks."""
        self._reports.send(msgpack.packb([int(report), *content]))

    def send_step(
        self, request_ids: tuple[str, ...], tokens: npt.NDArray[np.int64], others: Seq[EngineOutput], event: StepEvent
    ) -> None:
        """Sends what a step gave: a token for each of the requests, and outputs that say more than a token."""
        self.send(Report.STEP, *self._columns.encode(request_ids, tokens), others, encode_event(event))

    def close(self) -> None:
        """Sends what is queued (for at most a second) and closes the sockets."""
        self._commands.close(linger=0)
        self._reports.close(linger=1000)
        self._context.term()


class ClientEnd:
    """The API's side: one per engine process, on the event loop."""

    def __init__(self, commands: str, reports: str) -> None:
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._reports = self._context.socket(zmq.PULL)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)
        try:
            self._commands.bind(commands)
            self._reports.bind(reports)
        except zmq.ZMQError:
            self._context.destroy(linger=0)  # a context left to the garbage collector would block in its destructor
            raise

    async def send(self, command: Command, *content: Any) -> None:
        """Sends a command."""
        await self._commands.send(msgpack.packb([int(command), *content]))

    async def receive(self) -> list[Any]:
        """The next report."""
        message: list[Any] = msgpack.unpackb(await self._reports.recv())
        return message

    def close(self) -> None:
        """Closes the sockets and drops what was not sent."""
        self._context.destroy(linger=0)
