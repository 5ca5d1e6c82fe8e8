"""Multipart uploads, parsed as they arrive: files go straight to the store's sinks, small fields to memory.

Nothing is buffered whole. The parser and the sinks run in a thread, a bounded piece at a time, so that neither a slow
disk nor a large file stops the event loop.
"""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, get_args

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loramux.adapters_store.registry import Sharing, Visibility
from loramux.server.api.errors import bad_request
from loramux.server.api.state import in_thread

PIECE_BYTES = 1 << 20
OVERHEAD_BYTES = 1 << 20
MAX_PARTS = 16
MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 4096
FIELD_LIMITS = {
    "name": 256, "description": 16 << 10, "examples": 512 << 10, "visibility": 16, "shared_with": 32 << 10,
}  # fmt: skip
FILES = "files"


class Sink(Protocol):
    """Where a file's bytes go; the store's."""

    def write(self, data: bytes, /) -> object:
        """Takes the next bytes; raises `AdapterError` when there are too many."""

    def close(self) -> None:
        """The file is complete."""


OpenFile = Callable[[str], Sink]


@dataclass(slots=True)
class Form:
    """The small fields of an upload, as text, and how many files came with it."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The adapter's name. Raises a 400 when it is missing."""
        if "name" not in self.fields:
            raise bad_request("Missing form field: name", "name", "missing_required_parameter")
        return self.fields["name"]

    @property
    def description(self) -> str | None:
        """What the adapter is for, if the client says."""
        return self.fields.get("description")

    @property
    def examples(self) -> list[str] | None:
        """Example prompts: a JSON list of strings. Raises a 400 for anything else."""
        return self._strings("examples", "Sort: d a c")

    @property
    def sharing(self) -> Sharing | None:
        """Who may use the adapter, if the client says; see `sharing_of`."""
        return sharing_of(self.fields.get("visibility"), self._strings("shared_with", "another-team"))

    def _strings(self, name: str, example: str) -> list[str] | None:
        """A field that is a JSON list of strings. Raises a 400 for anything else."""
        text = self.fields.get(name)
        if text is None or not text.strip():
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise bad_request(
                f"{name} must be a JSON list of strings, such as {json.dumps([example])}.", name, "invalid_value"
            )
        return value


def sharing_of(visibility: str | None, shared_with: Sequence[str] | None) -> Sharing | None:
    """Who may use an adapter, from the two fields of an upload or a change; None for neither.

    `shared_with` alone is the visibility `shared`. Raises a 400 for a visibility that there is not; the store checks
    the rest.
    """
    if visibility is None:
        return None if shared_with is None else Sharing("shared", tuple(shared_with))
    for known in get_args(Visibility):
        if visibility == known:
            return Sharing(known, tuple(shared_with or ()))
    raise bad_request(f"visibility is one of {', '.join(get_args(Visibility))}.", "visibility", "invalid_value")


class UploadParser:
    """Feeds a multipart body to a form and to sinks. Not thread-safe; one thread at a time may use it."""

    def __init__(self, content_type: str, open_file: OpenFile) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise bad_request(
                "Send multipart/form-data: `curl -F name=NAME -F files=@adapter_config.json "
                "-F files=@adapter_model.safetensors`.", "content-type",
            )  # fmt: skip
        self.form = Form()
        self._open_file = open_file
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._field: str | None = None
        self._value = bytearray()
        self._sink: Sink | None = None
        self._complete = False
        callbacks: Any = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_data,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(
                boundary, callbacks,
                max_header_count=MAX_PART_HEADERS, max_header_size=MAX_PART_HEADER_BYTES,
            )  # fmt: skip
        except FormParserError:
            raise bad_request("The multipart boundary is too long.", "content-type") from None

    def feed(self, data: bytes) -> None:
        """Parses the next bytes. Raises a 400 for a malformed body, `AdapterError` for what the store refuses."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise bad_request("The multipart body is malformed.") from None

    def finish(self) -> Form:
        """The form, once all bytes are in. Raises a 400 when the body broke off."""
        if not self._complete:
            raise bad_request("The multipart body is incomplete.")
        if not self.form.files:
            raise bad_request(
                "No files: send adapter_config.json and adapter_model.safetensors as parts named `files`.", FILES,
                "missing_required_parameter",
            )  # fmt: skip
        return self.form

    def close(self) -> None:
        """Closes a file that is still open."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise bad_request(f"An upload has at most {MAX_PARTS} parts.")
        self._headers.clear()
        self._field = None
        self._value.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise bad_request("content-transfer-encoding is not supported.", name or None)
        if b"filename" in options:
            if name != FILES:
                raise bad_request("File parts must be named `files`.", name[:64] or None, "unknown_parameter")
            filename = options[b"filename"].decode("utf-8", "replace")
            self._sink = self._open_file(filename)
            self.form.files.append(filename)
        elif name not in FIELD_LIMITS:
            remedy = (
                "it needs a file name" if name == FILES else f"known fields are {', '.join(FIELD_LIMITS)} and {FILES}"
            )
            raise bad_request(
                f"Unrecognized form field {name[:64]!r}: {remedy}.", name[:64] or None, "unknown_parameter"
            )
        elif name in self.form.fields:
            raise bad_request(f"The form field {name} was sent twice.", name, "invalid_value")
        else:
            self._field = name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
        elif self._field is not None:
            if len(self._value) + end - start > FIELD_LIMITS[self._field]:
                raise bad_request(
                    f"{self._field} is longer than {FIELD_LIMITS[self._field]} bytes.", self._field, "invalid_value"
                )
            self._value += data[start:end]

    def _part_end(self) -> None:
        self.close()
        if self._field is not None:
            try:
                self.form.fields[self._field] = self._value.decode("utf-8")
            except UnicodeDecodeError:
                raise bad_request(f"{self._field} is not valid UTF-8.", self._field, "invalid_value") from None

    def _end(self) -> None:
        self._complete = True


async def receive_form(body: AsyncIterator[bytes], content_type: str, open_file: OpenFile, executor: Executor) -> Form:
    """Reads a multipart body to its end. Raises `APIError` or `AdapterError`, with no file left open.

    At most `PIECE_BYTES` plus one network read are in memory.
    """
    parser = UploadParser(content_type, open_file)
    pending = bytearray()
    try:
        async for chunk in body:
            pending += chunk
            if len(pending) >= PIECE_BYTES:
                await in_thread(executor, partial(parser.feed, bytes(pending)))
                pending.clear()
        if pending:
            await in_thread(executor, partial(parser.feed, bytes(pending)))
        return parser.finish()
    finally:
        await in_thread(executor, parser.close)
