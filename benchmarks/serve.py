"""S-LoRA's workload over HTTP against any OpenAI-compatible server, with a report per adapter.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --adapters 'lora-{i}' --num-adapters 100 --alpha 0.3 \\
        --rate 10 --duration 300 --ignore-eos --out result.json

The trace is that of `workload.py` (NumPy); the client is the standard library's. Names for `--adapters`: what the
server lists (vLLM, loramux), 'base:lora-{i}' (SGLang), an adapter id (LoRAX, with `--base "" --done-optional` where its
streams end without [DONE]). Measured per request, in seconds, on a fresh connection each:

    TTFT = first text - send        E2E = [DONE] - send        TPOT = (last text - first text) / (tokens - 1)
    ITL  = gaps between arrivals that carry text (a server that sends several tokens at once has fewer, longer ones)

Tokens are the server's own count (`usage`), else the token ids or the arrivals. A request has failed when its status is
not 200, its stream carries an error, or it ends without a finish_reason or [DONE]. The SLO is S-LoRA's: the share of
all ended requests, failed ones included, whose TTFT is below `--slo-ttft`. Cold requests are the first of their
adapter, joined ones were sent before any of that adapter had an answer, warm ones after. Jain's index over adapters,
(sum x)^2 / (n sum x^2), is given for x = output tokens and for x = mean tokens per second of a request.
"""

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import json
import math
import re
import resource
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from report import environment, publish, table
from workload import MIXES, Request, Workload, generate, prompt_ids, prompt_words

HEAD_LIMIT = 64 << 10
EVENT_LIMIT = 4 << 20
READ_BYTES = 64 << 10
WARMUP_CONCURRENCY = 8
LATE_SECONDS = 0.1
PLAIN = re.compile(r"[\x21-\x7e]+")


class ServingError(Exception):
    """Why a request counts as failed: a `kind` to group by, and what the server said."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Target:
    """A server: `address` is what is connected to, `host` what its certificate and the Host header say."""

    host: str
    port: int
    address: str
    prefix: str = ""
    api_key: str | None = None
    tls: ssl.SSLContext | None = None

    def head(self, method: str, path: str, length: int) -> bytes:
        """The request line and headers; the connection is not reused."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {name}:{self.port}", "Connection: close",
            "User-Agent: loramux-benchmark", "Accept: text/event-stream, application/json", "Accept-Encoding: identity",
        ]  # fmt: skip
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def find_target(url: str, *, api_key: str | None = None, allow_remote: bool = False) -> Target:
    """The server at `url`, with or without a trailing /v1.

    Raises ValueError for a URL that names no server, for one beyond this machine's loopback unless `allow_remote`,
    and when nothing listens there.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url} is not a server's address such as http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    if not all(PLAIN.fullmatch(text) for text in (parts.hostname, prefix or "/", api_key or "-")):
        raise ValueError("the URL and the key may hold printable ASCII characters only, and no spaces")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{parts.hostname} cannot be resolved: {error}") from None
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    remote = [a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    if remote and not allow_remote:
        raise ValueError(f"{parts.hostname} ({remote[0]}) is not this machine; --allow-remote loads it all the same")
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError:
            continue
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Target(parts.hostname, port, address, prefix, api_key, tls)
    raise ValueError(f"nothing listens at {parts.hostname}:{port}")


class HttpResponse:
    """One HTTP/1.1 response, parsed as its bytes come; bodies may be chunked, sized, or end with the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = bytearray()
        self._state: Callable[[bytearray], bool] = self._head
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes from the connection; returns the part of the body that they complete.

        Raises ServingError when they are not HTTP.
        """
        self._buffer += data
        body = bytearray()
        while not self.done and self._state(body):
            pass
        return bytes(body)

    def close(self) -> None:
        """The connection has ended. Raises ServingError when the response had not."""
        if self._state == self._until_close:
            self.done = True
        elif not self.done:
            raise ServingError("cut off: connection closed", "inside the body" if self.status else "before an answer")

    def _line(self) -> str | None:
        """The next line without its end, or None while it is incomplete."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ServingError("not HTTP", "a line without an end")
            return None
        line = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 2]
        return line

    def _head(self, body: bytearray) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ServingError("not HTTP", "headers without an end")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        match = re.match(r"HTTP/1\.[01] (\d{3})(?: |$)", first)
        if match is None:
            raise ServingError("not HTTP", first[:100])
        if match[1].startswith("1"):  # an interim response: the real one follows
            return True
        self.status = int(match[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if self.headers.get("transfer-encoding", "").lower().endswith("chunked"):
            self._state = self._chunk_size
        elif "content-length" in self.headers:
            if not re.fullmatch(r"\d{1,18}", self.headers["content-length"]):
                raise ServingError("not HTTP", "a Content-Length that is no length")
            self._left = int(self.headers["content-length"])
            self._state = self._sized
        else:
            self._state = self._until_close
        self.done = self.status in (204, 304) or (self._state == self._sized and self._left == 0)
        return True

    def _take(self, body: bytearray) -> bool:
        """Moves what there is of the `_left` bytes to the body; true when none is left."""
        part = self._buffer[: self._left]
        body += part
        del self._buffer[: len(part)]
        self._left -= len(part)
        return self._left == 0

    def _sized(self, body: bytearray) -> bool:
        self.done = self._take(body)
        return False

    def _until_close(self, body: bytearray) -> bool:
        self._left = len(self._buffer)
        self._take(body)
        return False

    def _chunk_size(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        size = line.partition(";")[0].strip()
        if not re.fullmatch(r"[0-9A-Fa-f]{1,15}", size):
            raise ServingError("not HTTP", "a chunk without a size")
        self._left = int(size, 16)
        self._state = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, body: bytearray) -> bool:
        if not self._take(body):
            return False
        self._state = self._chunk_end
        return True

    def _chunk_end(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        if line:
            raise ServingError("not HTTP", "a chunk longer than its size")
        self._state = self._chunk_size
        return True

    def _trailer(self, body: bytearray) -> bool:
        line = self._line()
        self.done = line == ""
        return line is not None


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


async def exchange(
    target: Target, method: str, path: str, body: bytes, receive: Callable[[HttpResponse, bytes], None]
) -> HttpResponse:
    """One request on a connection of its own; `receive` gets the body in pieces, as they arrive.

    Raises ServingError for an answer that is cut off or not HTTP, OSError from the connection.
    """
    name = target.host if target.tls else None
    reader, writer = await asyncio.open_connection(target.address, target.port, ssl=target.tls, server_hostname=name)
    try:
        writer.write(target.head(method, path, len(body)) + body)
        response = HttpResponse()
        while not response.done:
            data = await reader.read(READ_BYTES)
            if not data:
                response.close()
                break
            part = response.feed(data)
            if part:
                receive(response, part)
        return response
    finally:
        writer.close()


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


@dataclass(slots=True)
class Run:
    """The calls of a run and, once it is over (or interrupted), all that was measured."""

    calls: list[Call]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False


async def drive(
    target: Target,
    run: Run,
    *,
    concurrency: int,
    timeout: float,
    need_done: bool = True,
    stop_after: float = math.inf,
    show: Callable[[Run, float], None] | None = None,
) -> None:
    """Sends the run's calls when they are due, at most `concurrency` at once (0: no bound), and waits for the answers.

    None is sent later than `stop_after` seconds. `show` is called every second. What was measured is in `run` even when
    this is cancelled.
    """
    gate = asyncio.Semaphore(concurrency or max(len(run.calls), 1))
    start, cpu = time.perf_counter(), time.process_time()

    async def report(show: Callable[[Run, float], None]) -> None:
        while True:
            await asyncio.sleep(1)
            show(run, time.perf_counter() - start)

    reporter = asyncio.create_task(report(show)) if show else None
    try:
        async with asyncio.TaskGroup() as group:
            for call in run.calls:
                await asyncio.sleep(max(start + call.at - time.perf_counter(), 0))
                await gate.acquire()
                if time.perf_counter() - start > stop_after:
                    break
                outcome = Outcome(call, due=start + call.at)
                run.outcomes.append(outcome)
                task = group.create_task(ask(target, outcome, timeout=timeout, need_done=need_done))
                task.add_done_callback(lambda _: gate.release())
    finally:
        run.seconds, run.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        if reporter:
            reporter.cancel()


def progress(run: Run, seconds: float) -> None:
    """One line on standard error, rewritten in place on a terminal, every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and round(seconds) % 10:
        return
    done = sum(o.completed for o in run.outcomes)
    failed = sum(o.error is not None for o in run.outcomes)
    sent = len(run.outcomes)
    speed = sum(o.tokens for o in run.outcomes) / seconds
    line = f"{seconds:5.0f} s  sent {sent}/{len(run.calls)}  running {sent - done - failed}  done {done}  "
    line += f"failed {failed}  {speed:.0f} tok/s"
    sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
    sys.stderr.flush()


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile of sorted values, interpolated linearly."""
    position = (len(values) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """count, mean, p50, p90, p99 and max; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    points = {f"p{q}": percentile(ordered, q) for q in (50, 90, 99)}
    return {"count": len(ordered), "mean": math.fsum(ordered) / len(ordered), **points, "max": ordered[-1]}


def jain(values: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything; None without any."""
    squares = math.fsum(x * x for x in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else None


def gaps(outcomes: Iterable[Outcome]) -> list[float]:
    """All inter-token latencies."""
    return [b - a for o in outcomes for a, b in zip(o.times, o.times[1:], strict=False)]


def by_use(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes, in the order of sending, as cold, joined and warm uses of their adapter."""
    answered: dict[str, float] = {}
    for o in outcomes:
        if o.times:
            answered[o.call.adapter] = min(o.times[0], answered.get(o.call.adapter, math.inf))
    uses: dict[str, list[Outcome]] = {"cold": [], "joined": [], "warm": []}
    seen: set[str] = set()
    for o in outcomes:
        if o.call.adapter not in seen:
            uses["cold"].append(o)
        else:
            uses["warm" if o.sent >= answered.get(o.call.adapter, math.inf) else "joined"].append(o)
        seen.add(o.call.adapter)
    return uses


def describe(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One adapter's row: counts, tokens and latencies of its requests; failed ones have a speed of 0."""
    completed = [o for o in outcomes if o.completed]
    speeds = [o.tokens / o.seconds if o.completed and o.seconds > 0 else 0.0 for o in outcomes if o.ended is not None]
    return {
        "requests": len(outcomes), "completed": len(completed), "failed": sum(o.error is not None for o in outcomes),
        "output_tokens": sum(o.tokens for o in completed), "ttft_seconds": spread(ttfts(completed)),
        "itl_seconds": spread(gaps(completed)), "mean_tokens_per_second": math.fsum(speeds) / max(len(speeds), 1),
    }  # fmt: skip


def ttfts(outcomes: Iterable[Outcome]) -> list[float]:
    """The first-token latencies that there are."""
    return [o.ttft for o in outcomes if o.ttft is not None]


def summarise(run: Run, slo_ttft: float) -> dict[str, Any]:
    """Everything that is reported about a run; latencies are of completed requests, interrupted ones count nowhere."""
    ended = [o for o in run.outcomes if o.ended is not None]
    completed = [o for o in ended if o.completed]
    errors: dict[str, dict[str, Any]] = {}
    for o in ended:
        if o.error is not None:
            errors.setdefault(o.error, {"count": 0, "first": o.detail})["count"] += 1
    groups: dict[str, list[Outcome]] = {}
    for o in run.outcomes:
        groups.setdefault(o.call.adapter, []).append(o)
    adapters = {name: describe(group) for name, group in groups.items()}
    spoken = [o for o in completed if o.times and o.tokens > 1]
    seconds = run.seconds or math.inf
    tokens = sum(o.tokens for o in completed)
    attained = sum(o.ttft is not None and o.ttft < slo_ttft for o in completed)
    return {
        "interrupted": run.interrupted, "seconds": run.seconds, "errors": errors, "adapters": adapters,
        "requests": {
            "planned": len(run.calls), "sent": len(run.outcomes), "completed": len(completed),
            "failed": len(ended) - len(completed), "unfinished": len(run.outcomes) - len(ended),
            "without_text": sum(not o.times for o in completed),
            "without_usage": sum(o.usage_tokens is None for o in completed),
        },
        "prompt_tokens": sum(o.prompt_tokens for o in completed), "output_tokens": tokens,
        "requests_per_second": len(completed) / seconds, "output_tokens_per_second": tokens / seconds,
        "ttft_seconds": spread(ttfts(completed)),
        **{f"ttft_{use}_seconds": spread(ttfts(o for o in uses if o.completed))
           for use, uses in by_use(run.outcomes).items()},
        "itl_seconds": spread(gaps(completed)),
        "tpot_seconds": spread((o.times[-1] - o.times[0]) / (o.tokens - 1) for o in spoken),
        "e2e_seconds": spread(o.seconds for o in completed),
        "slo": {"ttft_seconds": slo_ttft, "attained": attained, "attainment": attained / len(ended) if ended else None},
        "fairness": {
            "jain_output_tokens": jain([row["output_tokens"] for row in adapters.values()]),
            "jain_tokens_per_second": jain([row["mean_tokens_per_second"] for row in adapters.values()]),
        },
        "client": {
            "send_lag_seconds": spread(max(o.sent - o.due, 0.0) for o in run.outcomes),
            "cpu_share": run.cpu_seconds / seconds,
        },
    }  # fmt: skip


def milliseconds(value: float | None) -> str:
    """For a table."""
    return "-" if value is None else f"{value * 1000:.1f}"


def tables(result: dict[str, Any], rows: int) -> str:
    """The summary as text: totals, latencies, errors, and the `rows` adapters with the most requests."""
    counts, slo, fairness = result["requests"], result["slo"], result["fairness"]
    attainment = "-" if slo["attainment"] is None else f"{slo['attainment']:.1%}"
    totals = [
        ["run", ""], ["seconds", f"{result['seconds']:.1f}"],
        ["requests completed / sent / planned", f"{counts['completed']} / {counts['sent']} / {counts['planned']}"],
        ["failed, unfinished", f"{counts['failed']}, {counts['unfinished']}"],
        ["requests/s", f"{result['requests_per_second']:.2f}"],
        ["output tokens/s", f"{result['output_tokens_per_second']:.1f}"],
        [f"TTFT below {slo['ttft_seconds']:g} s", attainment],
        *([f"Jain index, {key.removeprefix('jain_').replace('_', ' ')}", "-" if value is None else f"{value:.3f}"]
          for key, value in fairness.items()),
    ]  # fmt: skip
    points = ("mean", "p50", "p90", "p99", "max")
    latencies = [["ms", "count", *points]]
    for label, key in (
        ("TTFT", "ttft_seconds"), ("TTFT, cold", "ttft_cold_seconds"), ("TTFT, joined", "ttft_joined_seconds"),
        ("TTFT, warm", "ttft_warm_seconds"), ("ITL", "itl_seconds"), ("TPOT", "tpot_seconds"), ("E2E", "e2e_seconds"),
    ):  # fmt: skip
        values = result[key]
        latencies.append([label, str(values["count"]), *(milliseconds(values[p]) for p in points)])
    parts = [table(totals), table(latencies)]
    if result["errors"]:
        lines = [["error", "count"], *([kind, str(e["count"])] for kind, e in result["errors"].items())]
        parts.append(table(lines))
    ranked = sorted(result["adapters"].items(), key=lambda item: (-item[1]["requests"], item[0]))
    lines = [["adapter", "requests", "tokens", "TTFT mean ms", "TTFT p99 ms", "ITL mean ms", "errors"]]
    for name, row in ranked[:rows]:
        ttft, itl = row["ttft_seconds"], row["itl_seconds"]
        cells = [milliseconds(ttft["mean"]), milliseconds(ttft["p99"]), milliseconds(itl["mean"]), str(row["failed"])]
        lines.append([name, str(row["requests"]), str(row["output_tokens"]), *cells])
    text = table(lines)
    parts.append(text + (f"\n({len(ranked) - rows} more in the JSON)" if len(ranked) > rows else ""))
    return "\n\n".join(parts) + "\n\n"


def bounds(text: str) -> tuple[int, int]:
    """`low:high` as two integers."""
    low, _, high = text.partition(":")
    return int(low), int(high)


def names_in(models: Sequence[dict[str, Any]], base: str | None) -> tuple[str, list[str]]:
    """The base's name and the adapters' in a list of models: adapters have a parent where the server says so.

    Raises ValueError when no base can be told.
    """
    roots = [m["id"] for m in models if m.get("parent") is None]
    if base is None:
        if not roots:
            raise ValueError("the server lists no base model; give it as --base")
        base = roots[0]
    children = [m["id"] for m in models if m.get("parent") is not None]
    return base, children or [name for name in roots if name != base]


def choose_names(args: argparse.Namespace, listed: Sequence[str]) -> list[str]:
    """The adapters of the run, as many as asked for. Raises ValueError when there are not as many."""
    pattern, wanted = args.adapters, args.num_adapters
    if pattern is not None and "{i}" in pattern:
        if wanted is None:
            raise ValueError("--adapters with {i} needs --num-adapters")
        return [pattern.replace("{i}", str(i)) for i in range(wanted)]
    if pattern is not None:
        try:
            found = [line.strip() for line in Path(pattern).read_text().splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f"--adapters is a pattern with {{i}} or a file of names: {error}") from None
    else:
        found = list(listed) if args.adapters_from_models else []
    if wanted is not None and wanted > len(found):
        raise ValueError(f"--num-adapters is {wanted}, but there are {len(found)} names (of --adapters or the server)")
    return found[:wanted]


def make_calls(args: argparse.Namespace, trace: Sequence[Request], base: str, names: Sequence[str]) -> list[Call]:
    """The trace's requests as bytes to send."""
    calls = []
    for request in trace:
        model = base if request.adapter is None else names[request.adapter]
        fields: dict[str, Any] = {
            "model": model, "max_tokens": request.output_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if args.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt_words(args.seed, request)}]
        elif args.prompt_tokens == "words":
            fields["prompt"] = prompt_words(args.seed, request)
        else:
            fields["prompt"] = prompt_ids(args.seed, request, *args.token_ids)
        if args.ignore_eos:
            fields["ignore_eos"] = True
        if args.return_token_ids:
            fields["return_token_ids"] = True
        fields.update(args.extra_body)
        body = json.dumps({key: value for key, value in fields.items() if value is not None}).encode()
        path = "/v1/chat/completions" if args.endpoint == "chat" else "/v1/completions"
        calls.append(Call(request.at, model, path, body))
    return calls


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with 2 and a message for those that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--api-key")
    add("--allow-remote", action="store_true", help="load a server that is not on this machine's loopback")
    add("--base", help="the base's name (default: the first of GET /v1/models without a parent)")
    add("--adapters", metavar="NAME-{i}|FILE", help="names with {i} from 0, or a file with one name per line")
    add("--adapters-from-models", action="store_true", help="the adapters that GET /v1/models lists")
    add("--num-adapters", type=int, help="how many of them (0: the base alone)")
    add("--mix", choices=MIXES, default="slora", help="who gets the requests (workload.py)")
    add("--alpha", type=float, default=1.0, help="skew of slora's mix: 1 uniform, smaller more skewed")
    add("--rate", type=float, default=2.0, help="requests per second; 0: as soon as --concurrency allows")
    add("--cv", type=float, default=1.0, help="burstiness of the gaps; 1 is Poisson")
    add("--concurrency", type=int, default=0, help="most requests in flight (0: no bound)")
    add("--requests", type=int, help="length of the trace (default: rate x duration)")
    add("--duration", type=float, help="seconds (default 60); beside --requests, none is sent later")
    add("--input", type=bounds, default=(8, 512), metavar="LOW:HIGH", help="prompt tokens, high excluded")
    add("--output", type=bounds, default=(8, 512), metavar="LOW:HIGH", help="answer tokens, high excluded")
    add("--seed", type=int, default=42)
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--prompt-tokens", choices=("ids", "words"), default="ids", help="chat always sends words")
    add("--token-ids", type=bounds, default=(100, 10000), metavar="LOW:HIGH", help="ids that prompts are made of")
    add("--ignore-eos", action="store_true", help="answers of exactly the drawn length, where the server knows how")
    add("--return-token-ids", action="store_true", help="exact arrivals even of tokens without text (vLLM, loramux)")
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields; null takes one away")
    add("--done-optional", action="store_true", help="a stream with a finish_reason is whole without [DONE]")
    add("--warmup", type=int, default=3, help="requests to the base before the measured ones")
    add("--slo-ttft", type=float, default=6.0, metavar="SECONDS", help="S-LoRA's bound")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take")
    add("--rows", type=int, default=20, help="adapters in the printed table")
    add("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    args.stop_after = math.inf if args.requests is None or args.duration is None else args.duration
    if args.requests is None:
        expected = args.rate * (60.0 if args.duration is None else args.duration)
        if not 1 <= expected < 2**32:
            parser.error("--rate times --duration gives no request; --rate 0 needs --requests")
        args.requests = int(expected)
    if not isinstance(args.extra_body, dict):
        parser.error("--extra-body must be a JSON object")
    if min(args.concurrency, args.warmup, args.rows, args.num_adapters or 0) < 0 or args.timeout <= 0:
        parser.error("--concurrency, --warmup, --rows and --num-adapters must not be negative, --timeout positive")
    if not 0 <= args.token_ids[0] < args.token_ids[1]:
        parser.error("--token-ids must be low:high with 0 <= low < high")
    if args.adapters is not None and args.adapters_from_models:
        parser.error("give --adapters or --adapters-from-models, not both")
    return args


def plan(args: argparse.Namespace) -> tuple[Target, str, list[Call], list[Call]]:
    """The server, the base's name, the warm-up's calls and the measured ones. Raises ValueError and ServingError."""
    shape = {"rate": args.rate, "cv": args.cv, "alpha": args.alpha, "input": args.input, "output": args.output}
    Workload(args.requests, 0, mix=args.mix, seed=args.seed, **shape)  # refused before anything is asked of the server
    target = find_target(args.url, api_key=args.api_key, allow_remote=args.allow_remote)
    base: str | None = args.base
    listed: list[str] = []
    if base is None or args.adapters_from_models:
        base, listed = names_in(asyncio.run(list_models(target, args.timeout)), base)
    names = choose_names(args, listed)
    calls = make_calls(
        args, generate(Workload(args.requests, len(names), mix=args.mix, seed=args.seed, **shape)), base, names
    )
    warmup: list[Call] = []
    if args.warmup:
        other = Workload(args.warmup, 0, seed=args.seed + 1, **{**shape, "rate": 0.0})
        options = argparse.Namespace(**{**vars(args), "seed": args.seed + 1})  # prompts that the run does not repeat
        warmup = make_calls(options, generate(other), base, names)
    return target, base, warmup, calls


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the workload and prints the report; 0 without failed requests, 1 with, 2 for options, 130 after Ctrl-C."""
    args = parse(argv)
    try:
        target, base, warmup, calls = plan(args)
    except (ValueError, ServingError) as error:
        sys.stderr.write(f"serve.py: {error}\n")
        return 2
    with contextlib.suppress(ValueError, OSError):  # a connection per request in flight
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options: dict[str, Any] = {"timeout": args.timeout, "need_done": not args.done_optional}
    first, run = Run(warmup), Run(calls)
    try:
        asyncio.run(drive(target, first, concurrency=args.concurrency or WARMUP_CONCURRENCY, **options))
        wrong = [o for o in first.outcomes if o.error is not None]
        if wrong:
            sys.stderr.write(f"warm-up: {len(wrong)} of {len(warmup)} failed: {wrong[0].error} {wrong[0].detail}\n")
            if len(wrong) == len(warmup):
                return 1
        gc.collect()
        gc.freeze()
        options |= {"concurrency": args.concurrency, "stop_after": args.stop_after, "show": progress}
        asyncio.run(drive(target, run, **options))
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        gc.unfreeze()
    result = summarise(run, args.slo_ttft)
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    sys.stdout.write(tables(result, args.rows))
    for note in notes(result, args.rate):
        sys.stderr.write(f"note: {note}\n")
    shown = {key: value for key, value in vars(args).items() if key not in ("api_key", "out", "rows", "stop_after")}
    publish(
        {"benchmark": "serve", "environment": environment(), "options": shown, "base": base, "measured": result},
        args.out,
    )
    return 130 if run.interrupted else int(result["requests"]["failed"] > 0)


def notes(result: dict[str, Any], rate: float) -> list[str]:
    """What a reader must know before believing the numbers of a run at `rate` requests per second (0: no schedule)."""
    counts, client = result["requests"], result["client"]
    late = client["send_lag_seconds"]["p99"] or 0.0
    found = []
    if late > LATE_SECONDS and rate > 0:
        found.append(f"requests left late (p99 {late:.2f} s), held by --concurrency or by a busy client")
    if client["cpu_share"] > 0.8:
        found.append(f"the client used {client['cpu_share']:.0%} of a core: latencies include its own queue")
    if counts["without_text"]:
        found.append(f"{counts['without_text']} answers had no text: TTFT is their end (see --return-token-ids)")
    if counts["without_usage"]:
        found.append(f"{counts['without_usage']} answers came without usage: tokens are arrivals or ids")
    return found


if __name__ == "__main__":
    sys.exit(main())
