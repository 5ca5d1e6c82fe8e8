"""One streamed completion of an OpenAI-compatible server: what is sent, when each part came, and how it ended."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from loramux.server.bench.http_client import HEAD_LIMIT, HttpResponse, ServingError, Target, exchange

EVENT_LIMIT = 4 << 20


class EventParser:
    """Server-sent events out of bytes in any pieces; lines end with LF, CRLF or CR, as the standard says."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete. Raises ServingError for an event beyond any reason."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")  # the second half of a CRLF that was cut in two
            self._after_cr = False
        lines = (self._rest + data).splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        self._after_cr = bool(lines) and not self._rest and lines[-1].endswith(b"\r")
        events = []
        for line in lines:
            line = line.rstrip(b"\r\n")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        if len(self._rest) + sum(map(len, self._data)) > EVENT_LIMIT:
            raise ServingError("bad stream", f"an event of more than {EVENT_LIMIT} bytes")
        return events


async def list_models(target: Target, seconds: float) -> list[dict[str, Any]]:
    """The entries of GET /v1/models. Raises ServingError when there is no such list."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            response = await exchange(target, "GET", "/v1/models", b"", lambda _, part: body.extend(part))
        entries = json.loads(body)["data"] if response.status == 200 else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError("no list of models", f"{type(error).__name__} {error}") from None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise ServingError("no list of models", f"HTTP {response.status} {bytes(body[:200])!r}")
    return entries


@dataclass(frozen=True, slots=True)
class Call:
    """A request ready to be sent at `at` seconds: where to, for which adapter, and its body."""

    at: float
    adapter: str
    path: str
    body: bytes


@dataclass(slots=True)
class Outcome:
    """What became of one call. Times are `time.perf_counter()` in seconds; `due` is when it should have been sent."""

    call: Call
    due: float
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    done: float | None = None
    ended: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    usage_tokens: int | None = None
    token_ids: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def completed(self) -> bool:
        """Ended as it should."""
        return self.ended is not None and self.error is None

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, else the ids that came, else the arrivals."""
        return self.usage_tokens if self.usage_tokens is not None else self.token_ids or len(self.times)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text; to the end for an answer without any; None when neither came."""
        first = self.times[0] if self.times else self.ended if self.completed else None
        return None if first is None else first - self.sent

    @property
    def seconds(self) -> float:
        """End to end; 0 before the end."""
        return (self.ended or self.sent) - self.sent

    def take(self, event: bytes, now: float) -> None:
        """One event of the stream. Raises ServingError for an error, and for what is no chunk of a completion."""
        if event.strip() == b"[DONE]":
            self.done = now
            return
        try:
            chunk = json.loads(event)
            if chunk.get("error") or chunk.get("object") == "error":
                raise ServingError("error event", message_of(event))
            if usage := chunk.get("usage"):
                self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                self.usage_tokens = int(usage.get("completion_tokens") or 0)
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                ids = choice.get("token_ids") or ()
                text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
                if text or ids or delta.get("reasoning"):
                    self.times.append(now)
                self.token_ids += len(ids)
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        except (ValueError, TypeError, AttributeError):
            raise ServingError("bad event", event[:200].decode(errors="replace")) from None


def message_of(body: bytes) -> str:
    """What an error's body says, whatever shape it has; at most 300 characters."""
    text = body.decode(errors="replace")
    try:
        value = json.loads(text)
        for key in ("error", "message", "detail"):
            value = value.get(key, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:
        pass
    return text[:300]


async def ask(target: Target, outcome: Outcome, *, timeout: float, need_done: bool = True) -> None:
    """Sends the call and writes all that happens into `outcome`; a failure is an outcome, not an exception."""
    parser = EventParser()
    refusal = bytearray()

    def receive(response: HttpResponse, part: bytes) -> None:
        now = time.perf_counter()
        if response.status != 200:
            refusal.extend(part[: HEAD_LIMIT - len(refusal)])
            return
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            raise ServingError("not a stream", message_of(part))
        for event in parser.feed(part):
            outcome.take(event, now)

    outcome.sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            response = await exchange(target, "POST", outcome.call.path, outcome.call.body, receive)
        if response.status != 200:
            raise ServingError(f"HTTP {response.status}", message_of(bytes(refusal)))
        if outcome.finish_reason is None:
            raise ServingError("cut off: no finish_reason")
        if need_done and outcome.done is None:
            raise ServingError("cut off: no [DONE]")
    except ServingError as failure:
        outcome.error, outcome.detail = failure.kind, failure.detail
    except TimeoutError:
        outcome.error = "timeout"
    except OSError as error:
        outcome.error, outcome.detail = f"connection: {type(error).__name__}", str(error)
    if outcome.done is not None and outcome.finish_reason is not None:
        outcome.error, outcome.detail = None, ""  # what happens after a whole answer does not matter
    outcome.ended = time.perf_counter() if outcome.done is None else outcome.done
