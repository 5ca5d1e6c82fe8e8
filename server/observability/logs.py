"""Log lines as text or JSON, the same in the API's and the engine's process.

A record is one line (an exception's frames follow it, indented), and nothing that a client sent can end it: control
characters are escaped. A record carries named values in `extra={"fields": {...}}`. The standard library is enough for
this, and it is all that the engine's process may use.
"""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")

MAX_ERROR_CHARS = 500
_CHATTY = ("httpx", "httpcore", "huggingface_hub", "filelock", "python_multipart", "opentelemetry")
_OWN_HANDLERS = ("transformers", "huggingface_hub")  # libraries that write to standard error by themselves
_PROGRESS_BARS = {
    "transformers.utils.logging": "disable_progress_bar",
    "huggingface_hub.utils": "disable_progress_bars",
}
_QUOTE_INPUT = frozenset({"pydantic", "pydantic_core", "fastapi"})  # their errors' texts repeat what a client sent
# control characters, line separators, and the marks that turn the direction of a line that a terminal shows
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = re.compile(r"[^\s\"=]+")


def printable(text: str) -> str:
    """The text with everything escaped that could start a line or steer a terminal."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error after what it came from, members of groups included; each once."""
    seen: set[int] = set()

    def walk(item: BaseException) -> Iterator[BaseException]:
        if id(item) in seen:
            return
        seen.add(id(item))
        before = item.__cause__ or (None if item.__suppress_context__ else item.__context__)
        if before is not None:
            yield from walk(before)
        if isinstance(item, BaseExceptionGroup):
            for member in item.exceptions:
                yield from walk(member)
        yield item

    yield from walk(error)


def error_text(error: BaseException) -> str:
    """`Type: message`, bounded; without the message where the library that made it puts its input there."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if any(base.__module__.partition(".")[0] in _QUOTE_INPUT for base in kind.__mro__):
        return f"{name} (its message is left out: it repeats its input)"
    message = str(error)
    return f"{name}: {message[:MAX_ERROR_CHARS]}" if message else name


def trace_lines(error: BaseException) -> list[str]:
    """The frames and messages of an error and of what caused it, without line ends or control characters."""
    lines: list[str] = []
    for item in _chain(error):
        for frame in traceback.extract_tb(item.__traceback__):
            lines.append(printable(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line or ''}"))
        lines.append(printable(error_text(item)))
    return lines


def _stamp(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def _shown(value: Any) -> str:
    """A value after `name=`: as it is when it is one plain word, else quoted."""
    text = printable(f"{value:.6g}" if isinstance(value, float) else str(value))
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time level process logger message name=value ...`; an exception's lines follow, indented."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        head = f"{_stamp(record)} {record.levelname} {self._process} {record.name} {printable(record.getMessage())}"
        fields = "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())
        error = record.exc_info[1] if record.exc_info else None
        trace = "".join(f"\n    {line}" for line in trace_lines(error)) if error is not None else ""
        return head + fields + trace


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time`, `level`, `process`, `logger`, `message`, the fields, and `error` if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record; JSON escapes what could end the line."""
        error = record.exc_info[1] if record.exc_info else None
        values: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            values[name] = round(value, 6) if isinstance(value, float) else value
        if error is not None:
            values["error"], values["trace"] = error_text(error), trace_lines(error)
        return json.dumps(values, ensure_ascii=True, default=str)


def configure(level: str, format: LogFormat, *, process: str, stream: TextIO | None = None) -> None:
    """Sends every record of this process to `stream` (standard error) in one format. Called once, at its start.

    `level` is one of `LEVELS`; libraries that talk much are heard from `warning` on. With `json` the libraries that are
    imported by now draw no progress bars, which are no records.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _OWN_HANDLERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    if format == "json":
        for module, function in _PROGRESS_BARS.items():
            if module in sys.modules:
                getattr(sys.modules[module], function)()
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
