"""Log lines: one record is one line, in either format, whatever is in it."""

import io
import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from loramux.server.observability.logs import (
    MAX_ERROR_CHARS,
    JsonFormatter,
    TextFormatter,
    error_text,
    printable,
    trace_lines,
)

HOSTILE = 'a\nFAKE INFO\r\x1b[2J\x00\x7f\x85\u2028\u202e\ud800é"=b'


def record(message: str, *args: Any, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("loramux.x", logging.INFO, "f", 1, message, args, None)
    made.fields = fields
    return made


def test_text() -> None:
    line = TextFormatter("api").format(record("took %d", 3, status=200, seconds=0.123456789, path="/a b", none=None))
    stamp, rest = line.split(" ", 1)
    assert stamp.endswith("Z")
    assert rest == 'INFO api loramux.x took 3 status=200 seconds=0.123457 path="/a b"'


def test_json() -> None:
    values = json.loads(JsonFormatter("engine").format(record("took %d", 3, status=200, seconds=0.1234567, none=None)))
    assert values.pop("time").endswith("Z")
    assert values == {
        "level": "info", "process": "engine", "logger": "loramux.x", "message": "took 3", "status": 200,
        "seconds": 0.123457,
    }  # fmt: skip


@pytest.mark.parametrize("formatter", [TextFormatter("api"), JsonFormatter("api")])
def test_nothing_can_start_a_line_or_steer_a_terminal(formatter: logging.Formatter) -> None:
    line = formatter.format(record(f"m {HOSTILE} %s", HOSTILE, path=HOSTILE))
    assert line.isprintable()
    line.encode()
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["path"] == HOSTILE


def test_printable_keeps_what_people_write() -> None:
    assert printable("größe 大 👍") == "größe 大 👍"
    assert printable("a\nb\t") == "a\\nb\\t"


def failing(message: str) -> BaseException:
    try:
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise RuntimeError(message) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("formatter", [TextFormatter("api"), JsonFormatter("api")])
def test_errors(formatter: logging.Formatter) -> None:
    error = failing(HOSTILE + "x" * 10_000)
    made = record("failed")
    made.exc_info = (type(error), error, error.__traceback__)
    text = formatter.format(made)
    assert "ValueError: the cause" in text
    assert "RuntimeError: a\\nFAKE" in text.replace("\\\\n", "\\n")
    assert text.index("the cause") < text.rindex("FAKE")
    assert "in failing" in text
    assert len(text) < 10_000
    head, *rest = text.split("\n")
    assert head.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert bool(rest) == isinstance(formatter, TextFormatter)


def test_errors_that_quote_their_input_are_named_only() -> None:
    class Body(BaseModel):
        number: int

    with pytest.raises(ValidationError) as caught:
        Body(number="the-prompt")  # type: ignore[arg-type]
    text = error_text(caught.value)
    assert "ValidationError" in text
    assert "the-prompt" not in text


def test_groups_and_loops() -> None:
    loop = ValueError("a")
    loop.__cause__ = RuntimeError("b")
    loop.__cause__.__context__ = loop
    assert trace_lines(loop) == ["RuntimeError: b", "ValueError: a"]
    lines = trace_lines(ExceptionGroup("both", [KeyError("x"), TypeError("y" * 1000)]))
    assert lines[0] == "KeyError: 'x'"
    assert len(lines[1]) < MAX_ERROR_CHARS + 50
    assert lines[2] == "ExceptionGroup: both (2 sub-exceptions)"


def test_one_format_for_everything_that_a_process_writes() -> None:
    program = (
        "import logging, sys, warnings\n"
        "import transformers.utils.logging as library\n"
        "from loramux.server.observability.logs import configure\n"
        "configure('info', 'json', process='engine')\n"
        "library.get_logger('transformers.models').warning('from a library')\n"
        "warnings.warn('from a warning')\n"
        "logging.getLogger('loramux').debug('not shown')\n"
        "logging.getLogger('httpx').info('not shown')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["process"] for line in lines] == ["engine"] * 2
    assert "from a library" in lines[0]["message"]
    assert "from a warning" in lines[1]["message"]
    assert "from a" not in "".join(line for line in done.stderr.splitlines() if not line.startswith("{"))


def test_formatters_write_to_any_stream() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter("api"))
    handler.handle(record("one"))
    assert stream.getvalue().count("\n") == 1
