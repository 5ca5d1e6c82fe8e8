"""One call in the JSON that a model writes, read character by character, so that its arguments can be passed on."""

import json
import re
from collections.abc import Callable, Generator

SPACE = " \t\r\n"
MAX_KEY_CHARS = 256
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

_Steps = Generator[None, str, None]
_Next = Generator[None, str, str]


class _NotACallError(Exception):
    """What was read is not, or no longer, a call."""


class CallScanner:
    """Reads `{"name": ..., "arguments": {...}}`, whatever its keys are called, in which order, and what else there is.

    With a `name` from elsewhere the object is the arguments themselves. It is a call (`is_call`) as soon as a name
    that `accepts` agrees to is there and the arguments have begun, or the object ends without any, which is `{}`. What
    follows is passed on as it is written: whether the arguments are JSON to their end is not known before they end.
    """

    def __init__(
        self, accepts: Callable[[str], bool], *, name: str | None = None, name_key: str = "", arguments_key: str = ""
    ) -> None:
        self.name = name
        self.is_complete = False
        self.has_failed = False
        self._accepts = accepts
        self._name_key, self._arguments_key = name_key, arguments_key
        self._has_arguments = False
        self._unread: list[str] = []
        self._steps: _Steps = self._keyed() if name is None else self._bare()
        next(self._steps)

    @property
    def is_call(self) -> bool:
        """Whether what was read so far is a call, whatever follows."""
        return self.name is not None and self._has_arguments

    def feed(self, text: str, start: int) -> int:
        """Reads on in `text` from `start`; where it stopped: at the end of the text, behind the object
        (`is_complete`), or at a character that has no place in a call (`has_failed`)."""
        for at in range(start, len(text)):
            try:
                self._steps.send(text[at])
            except StopIteration:
                self.is_complete = True
                return at + 1
            except _NotACallError:
                self.has_failed = True
                return at
        return len(text)

    def take(self) -> str:
        """The arguments' text since the last time; nothing before this is a call."""
        if not self.is_call:
            return ""
        text = "".join(self._unread)
        self._unread.clear()
        return text

    def _bare(self) -> _Steps:
        """The arguments alone."""
        yield from self._arguments((yield from _past_space()))

    def _keyed(self) -> _Steps:
        """An object with name and arguments in it."""
        _expect((yield from _past_space()), "{")
        char = yield from _past_space()
        while char != "}":
            _expect(char, '"')
            key = yield from _string()
            _expect((yield from _past_space()), ":")
            char = yield from _past_space()
            if key == self._name_key:
                _expect(char, '"')
                self.name = yield from _string()
                if not (NAME.fullmatch(self.name) and self._accepts(self.name)):
                    raise _NotACallError
                char = yield from _past_space()
            elif key == self._arguments_key and char != "n":  # null is no arguments
                yield from self._arguments(char)
                char = yield from _past_space()
            else:
                char = yield from _value(char)
            if char == ",":
                char = yield from _past_space()
            else:
                _expect(char, "}")
        if self.name is None:
            raise _NotACallError
        if not self._has_arguments:
            self._has_arguments = True
            self._unread.append("{}")

    def _arguments(self, char: str) -> _Steps:
        """An object that is kept as it is written."""
        _expect(char, "{")
        self._has_arguments = True
        yield from _composite(char, self._unread)


def _expect(char: str, wanted: str) -> None:
    if char != wanted:
        raise _NotACallError


def _past_space() -> _Next:
    """The next character that is not white space."""
    while (char := (yield)) in SPACE:
        pass
    return char


def _string() -> _Next:
    """The string whose opening quote has been read."""
    raw, escaped = ['"'], False
    while True:
        char = yield
        raw.append(char)
        if char == '"' and not escaped:
            break
        escaped = char == "\\" and not escaped
        if len(raw) > MAX_KEY_CHARS:
            raise _NotACallError
    try:
        return str(json.loads("".join(raw), strict=False))
    except ValueError:
        raise _NotACallError from None


def _composite(char: str, kept: list[str]) -> _Steps:
    """An object, a list or a string, from its first character to its last; all of them are put into `kept`."""
    depth, quoted, escaped = 0, False, False
    while True:
        kept.append(char)
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        if depth <= 0 and not quoted:
            return
        char = yield


def _value(char: str) -> _Next:
    """Passes over any value; the first character behind it that is not white space."""
    if char in '{["':
        yield from _composite(char, [])
        return (yield from _past_space())
    while char not in ",}":
        char = yield
    return char
