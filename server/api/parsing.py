"""An answer's text on its way to a message: what is content, what is reasoning, what is a call.

What to look for is a response template of transformers' (`transformers.utils.chat_parsing`): the marks around an
answer's parts, and how a call is written between them. transformers' own parser gives a call when it is whole, raises
where one turns out not to be one, and takes a mark inside a call's strings for its end. Here a call's arguments are
passed on as they come, what is no call stays text, and a call ends where its JSON does; on whole and correct answers
both say the same. Calls that are not plain JSON are read by transformers' parser.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import ResponseTemplateField, load_response_template

from loramux.server.api.answer_formats import REASONING, CallStyle, detect_style, detect_template, styles_first
from loramux.server.api.call_scanner import NAME, CallScanner

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CALLS_FIELD = "tool_calls"
BEFORE_CALL = " \t\r\n["
BETWEEN_CALLS = " \t\r\n,;[]}"
PATTERNS = ("open_pattern", "close_pattern")
MAX_BEGUN_CHARS = 1 << 16
PROBE_ARGUMENTS = '{"key": [1, "a"]}'


class Piece(NamedTuple):
    """What an answer grew by.

    `text` is content, reasoning, the name of call number `call`, or a part of its arguments. Content begins at
    character `start` of the answer.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    start: int = 0
    call: int = 0


@dataclass(frozen=True, slots=True)
class CallLayout:
    """Where a response template has a call's name and arguments: keys of its JSON, or, if None, elsewhere.

    Without `name_key` the name is in the group `name_group` of the mark that opens the call.
    """

    name_key: str | None
    arguments_key: str | None
    name_group: str = ""

    @classmethod
    def of(cls, calls: ResponseTemplateField) -> "CallLayout | None":
        """The layout of calls that are plain JSON; None for others."""
        if calls.content != "json" or calls.content_args or not isinstance(calls.transform, dict):
            return None
        function = calls.transform.get("function")
        if function == "{content}":
            return cls("name", "arguments")
        if not isinstance(function, dict):
            return None
        name, arguments = (_path(function.get(key)) for key in ("name", "arguments"))
        if calls.transform_each:
            return cls(name, arguments) if name and arguments else None
        if name and arguments == "content":
            return cls(None, None, name)
        inside = [path.removeprefix("content.") for path in (name, arguments) if path and path.startswith("content.")]
        return cls(*inside) if len(inside) == 2 and not any("." in key for key in inside) else None


def _path(placeholder: Any) -> str:
    """What a placeholder of a transform stands for: `{content.name}` is `content.name`."""
    found = re.fullmatch(r"\{([\w.]+)\}", placeholder) if isinstance(placeholder, str) else None
    return found[1] if found else ""


class AnswerFormat:
    """How one model writes its answers: a response template, and the style of its calls where it is a known one.

    Raises ValueError for a response template that is none.
    """

    def __init__(self, template: Mapping[str, Any], styles: Iterable[CallStyle]) -> None:
        """The first of the `styles` that the template reads is the model's."""
        self.template = load_response_template(_without_leading_space(template))
        fields = self.template.fields
        self.calls = fields.get(CALLS_FIELD)
        if self.calls is not None and self.calls.open_re is None:
            raise ValueError(f"the field {CALLS_FIELD} has no mark that opens it")
        self.layout = None if self.calls is None else CallLayout.of(self.calls)
        self.reasoning = next((name for name in REASONING_FIELDS if name in fields), None)
        self._delimiters = {name: _delimiters(raw) for name, raw in template["fields"].items()}
        self.style = next((style for style in styles if self._reads(style)), None)

    @classmethod
    def find(
        cls, chat_template: str, generation_prompt: str, given: Mapping[str, Any] | None = None
    ) -> "AnswerFormat | None":
        """The format that was `given`, or the one that a chat template implies, if it implies one."""
        template = detect_template(chat_template, generation_prompt) if given is None else given
        return None if template is None else cls(template, styles_first(detect_style(chat_template)))

    def _reads(self, style: CallStyle) -> bool:
        """Whether what is written in this style is read as it was meant."""
        arguments = {"key": "a"} if style.is_markup else json.loads(PROBE_ARGUMENTS)
        text = style.write("probe", "<parameter=key>\na\n</parameter>\n" if style.is_markup else PROBE_ARGUMENTS)
        reader = self.reader("", [{"type": "function", "function": {"name": "probe"}}])
        reader.feed(text)
        reader.finish()
        return [(call.name, json.loads(call.arguments)) for call in reader.calls] == [("probe", arguments)]

    def reasoning_marks(self) -> tuple[str, str] | None:
        """The marks around reasoning, where they are plain strings, or patterns of a known way."""
        if self.reasoning is None:
            return None
        found = self.template.fields[self.reasoning]
        if found.open_literals and found.close_literals:
            return found.open_literals[0], found.close_literals[0]
        known = (
            (way.opening, way.closing)
            for way in REASONING
            if found.open_re is not None
            and found.close_re is not None
            and found.open_re.fullmatch(way.opening)
            and found.close_re.fullmatch(way.closing)
        )
        return next(known, None)

    def mentions(self, token: str, *, calls: bool = True) -> bool:
        """Whether the token may be a part of one of the marks, those of calls or the others, so that it must not be
        left out of the text."""
        return any(
            token in delimiter
            for name, delimiters in self._delimiters.items()
            if calls or name != CALLS_FIELD
            for delimiter in delimiters
        )

    def begun(self, prompt: str) -> str:
        """What of the answer a prompt has already: its text behind the last mark of an answer's beginning.

        Nothing where there is no such mark, and no more than the last `MAX_BEGUN_CHARS` characters.
        """
        ends = [match.end() for match in self.template.start_anchor_re.finditer(prompt)]
        return prompt[max(ends[-1], len(prompt) - MAX_BEGUN_CHARS) :] if ends else ""

    def reader(self, begun: str = "", tools: Sequence[Mapping[str, Any]] | None = None) -> "Reader":
        """A reader of one answer that has `begun` so. Calls are looked for only where there are `tools`."""
        return Reader(self, begun, tools)


def _without_leading_space(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template with `\\s*` left out where a mark's pattern begins with it.

    White space next to a mark belongs to it anyway, and looking for such a pattern behind n blanks takes n^2 steps.
    """
    fields = template.get("fields")
    if not isinstance(fields, Mapping):
        return dict(template)

    def trimmed(raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        return {key: value.removeprefix(r"\s*") if key in PATTERNS and isinstance(value, str) else value
                for key, value in raw.items()}  # fmt: skip

    return {**template, "fields": {name: trimmed(raw) for name, raw in fields.items()}}


def _delimiters(raw: Mapping[str, Any]) -> list[str]:
    """The marks of one field of a response template; of a pattern its text without escapes."""
    found: list[str] = []
    for key in ("open", "close"):
        literal = raw.get(key, ())
        found += [literal] if isinstance(literal, str) else literal
        found.append(raw.get(f"{key}_pattern", "").replace("\\", ""))
    return found


@dataclass(slots=True)
class Call:
    """A call as it was read: its `arguments` are what the model wrote, which is JSON if it was not cut off."""

    name: str
    parts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """The arguments' text so far."""
        return "".join(self.parts)


@dataclass(slots=True)
class _Region:
    """Calls that are being read: where their opening mark begins and ends, how far the text is read, and how far it is
    calls; `name` comes from the mark."""

    start: int
    begin: int
    name: str | None
    scanner: CallScanner | None = None
    read: int = 0
    done: int = 0
    calls: int = 0


@dataclass(slots=True)
class _Seam:
    """White space that marks took from between two texts of a kind, and where it was: before them, or behind them."""

    before: str = ""
    before_at: int = 0
    behind: str = ""
    behind_at: int = 0


class Reader:
    """Takes an answer piece by piece; how it is cut into pieces changes nothing in what is read from it.

    White space next to a mark belongs to the mark, but texts that a mark parts stay parted by the white space before
    it, or else by that behind it. What could be the beginning of a mark is held back until it is
    known, as is a call before it has a name and arguments. What the answer has `begun` with is not given again, and no
    call is looked for in it. `content`, `reasoning` and `calls` are what was read so
    far, `decided` the length of the text of which that is known.
    """

    def __init__(self, format: AnswerFormat, begun: str, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._format = format
        self._tools = None if tools is None else list(tools)
        self._known = frozenset(tool["function"]["name"] for tool in tools or ())
        self._fields = format.template.fields
        self._implicit = format.template.implicit
        self._opens = [found for name, found in self._fields.items() if found.open_re and name != CALLS_FIELD]
        self._text = ""
        self._at = 0
        self._no_call_before = 0
        self._region = self._implicit
        self._calls_region: _Region | None = None
        self._fresh = False
        self._held = ""
        self._seams = {"content": _Seam(), "reasoning": _Seam()}
        self._is_unclosed = False
        self._pieces: list[Piece] = []
        self._origin = len(begun)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[Call] = []
        self.feed(begun)
        if tools is not None and format.calls is not None:
            self._opens.append(format.calls)

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._region is not None and self._region == self._format.reasoning

    @property
    def decided(self) -> int:
        """How many characters of the answer are known to be content or not."""
        region = self._calls_region
        at = (region.start if region is not None and not region.calls else self._at) - len(self._held)
        seam = self._seams["content"]
        if seam.before or seam.behind:
            at = min(at, seam.before_at if seam.before else seam.behind_at)
        return max(0, at - self._origin)

    def feed(self, text: str) -> list[Piece]:
        """What the answer grew by, now that it goes on with this text."""
        self._text += text
        return self._advance(final=False)

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        pieces = self._advance(final=True)
        held, self._held = self._held, ""
        return pieces + self._grown(held, self._at - len(held))

    def _advance(self, *, final: bool) -> list[Piece]:
        self._pieces = []
        while self._read_calls(final=final) if self._calls_region else self._pass_mark(final=final):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _pass_mark(self, *, final: bool) -> bool:
        """Reads up to the next mark and past it; False when there is none yet."""
        found, hold = self._scan(final=final)
        if found is None:
            self._say(len(self._text) if final else hold)
            return False
        name, match = found
        self._say(match.start())
        if name == CALLS_FIELD:
            groups = match.groupdict()
            layout = self._format.layout
            called = groups.get(layout.name_group) if layout and layout.name_group else None
            self._calls_region = _Region(match.start(), match.end(), called, read=match.end())
        else:
            self._leave_mark(name)
        self._at = match.end()
        self._is_unclosed = False
        return True

    def _leave_mark(self, region: str | None) -> None:
        """A mark has ended; white space around it goes with it."""
        self._drop_held(self._at)
        self._region, self._fresh = region, True
        for seam in self._seams.values():
            seam.behind = ""

    def _drop_held(self, end: int) -> None:
        """The white space that was held back, up to `end`, belongs to a mark."""
        kind = self._kind()
        if self._held and kind is not None and self._texts(kind):
            seam = self._seams[kind]
            seam.before, seam.before_at = self._held, end - len(self._held)
        self._held = ""

    def _texts(self, kind: Literal["content", "reasoning"]) -> list[str]:
        """The texts of a kind so far."""
        return self._content if kind == "content" else self._reasoning

    def _scan(self, *, final: bool) -> tuple[tuple[str | None, Any] | None, int]:
        """The next mark with the region behind it, if one is complete; how far the text holds no beginning of one."""
        inside = self._region is not None and self._region != self._implicit
        current = self._fields[self._region] if self._region is not None else None
        watched: list[tuple[str | None, Any, bool, int]] = []
        if current is not None and current.close_re is not None:
            fixed = current.close_literals is not None and not current.close_literal_can_extend
            watched.append((self._implicit, current.close_re, fixed, self._at))
        if self._is_unclosed and self._format.calls is not None and self._format.calls.close_re is not None:
            fixed = self._format.calls.close_literals is not None
            watched.append((self._implicit, self._format.calls.close_re, fixed, self._at))
        for mark in () if inside else self._opens:
            start = max(self._at, self._no_call_before) if mark.name == CALLS_FIELD else self._at
            fixed = mark.open_literals is not None and not mark.open_literal_can_extend
            watched.append((mark.name, mark.open_re, fixed, start))
        hold, found = len(self._text), []
        for order, (name, pattern, fixed, start) in enumerate(watched):
            match = pattern.search(self._text, start, partial=not final)
            if match is None or (match.start() == match.end() and not inside and name == self._implicit):
                continue
            at_edge = match.end() == len(self._text) and not fixed
            if not final and (match.partial or at_edge or match.start() == match.end() == len(self._text)):
                hold = min(hold, match.start())
            else:
                found.append((match.start(), -match.end(), -order, name, match))
        if found:
            first = min(found, key=lambda item: item[:3])
            if first[0] < hold:
                return (first[3], first[4]), hold
        return None, hold

    def _kind(self) -> Literal["content", "reasoning"] | None:
        """What text in this region is; None for text that the template leaves out."""
        if self._region is None:
            return None
        return "reasoning" if self._region == self._format.reasoning else "content"

    def _say(self, end: int) -> None:
        """Passes text on up to `end`, but for white space that a mark may follow."""
        text, self._at = self._text[self._at : end], max(self._at, end)
        kind = self._kind()
        if kind is None:
            return
        if self._fresh:
            seam, stripped = self._seams[kind], text.lstrip()
            if not seam.behind:
                seam.behind_at = self._at - len(text)
            seam.behind += text[: len(text) - len(stripped)]
            text, self._fresh = stripped, not stripped
            if text and self._texts(kind):
                before = seam.before, seam.before_at
                self._pieces += self._grown(*(before if seam.before else (seam.behind, seam.behind_at)))
            if text:
                self._seams[kind] = _Seam()
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._pieces += self._grown(shown, self._at - len(text))

    def _grown(self, text: str, start: int) -> list[Piece]:
        """The text as a piece, if there is any that was not begun with."""
        kind, start = self._kind(), start - self._origin
        if start < 0:
            text, start = text[-start:], 0
        if not text or kind is None:
            return []
        self._texts(kind).append(text)
        return [Piece(kind, text, start)]

    def _accepts(self, name: str) -> bool:
        """Whether a call may have this name: any, if a mark says that it is a call."""
        region = self._calls_region
        marked = region is not None and bool(self._text[region.start : region.begin].strip())
        return marked or name in self._known

    def _read_calls(self, *, final: bool) -> bool:
        """Reads on in calls; False when they go on behind the text that there is."""
        region = self._calls_region
        assert region is not None
        if self._format.layout is None:
            return self._read_at_once(region, final=final)
        if region.scanner is None:
            return self._between_calls(region, final=final)
        return self._in_call(region, region.scanner, final=final)

    def _between_calls(self, region: _Region, *, final: bool) -> bool:
        """Looks for the next call, or for the mark behind the last."""
        calls, layout = self._format.calls, self._format.layout
        assert calls is not None
        assert layout is not None
        closing = None
        if calls.close_re is not None and region.calls:
            closing = calls.close_re.search(self._text, region.read, partial=not final)
        skipped = BETWEEN_CALLS if region.calls else BEFORE_CALL
        at = region.read
        limit = closing.start() if closing else len(self._text)
        while at < limit and self._text[at] in skipped:
            at += 1
        if closing and at == limit:
            waits = closing.partial or (closing.end() == len(self._text) and calls.close_literals is None)
            if waits and not final:
                return False
            if not closing.partial:
                return self._end_calls(closing.end(), closed=True)
        if at == len(self._text):
            if not final:
                return False
            return self._end_calls(at) if region.calls else self._not_a_call(region)
        if self._text[at] != "{" or (region.calls and layout.name_key is None):
            return self._end_calls(region.done) if region.calls else self._not_a_call(region)
        if layout.name_key is None:
            if not (region.name and NAME.fullmatch(region.name) and self._accepts(region.name)):
                return self._not_a_call(region)
            region.scanner = CallScanner(self._accepts, name=region.name)
        else:
            assert layout.arguments_key is not None
            region.scanner = CallScanner(
                self._accepts, name_key=layout.name_key, arguments_key=layout.arguments_key
            )  # fmt: skip
        region.read = at
        return True

    def _in_call(self, region: _Region, scanner: CallScanner, *, final: bool) -> bool:
        """Passes on what a call grew by, as soon as it is one."""
        was_call = scanner.is_call
        region.read = scanner.feed(self._text, region.read)
        ended = scanner.is_complete or scanner.has_failed or final
        if scanner.is_call:
            if not was_call:
                self._begin_call(region, scanner.name or "")
            self._grow_call(scanner.take())
        elif ended:
            return self._end_calls(region.done) if region.calls else self._not_a_call(region)
        if scanner.is_complete:
            region.done, region.scanner = region.read, None
            return True
        return self._end_calls(region.read) if ended else False

    def _read_at_once(self, region: _Region, *, final: bool) -> bool:
        """Reads calls that are not plain JSON, when they are whole, as transformers does."""
        calls = self._format.calls
        assert calls is not None
        end = len(self._text) if final and calls.close_re is None else 0
        if calls.close_re is not None:
            closing = calls.close_re.search(self._text, region.read, partial=not final)
            if closing is not None and not closing.partial:
                at_edge = closing.end() == len(self._text) and calls.close_literals is None
                end = closing.end() if final or not at_edge else 0
            elif not final:
                region.read = len(self._text) if closing is None else closing.start()
        if not end:
            return self._not_a_call(region) if final else False
        found = self._parsed(self._text[region.start : end])
        if not found or not all(NAME.fullmatch(name) and self._accepts(name) for name, _ in found):
            return self._not_a_call(region)
        for name, arguments in found:
            self._begin_call(region, name)
            self._grow_call(arguments)
        return self._end_calls(end, closed=True)

    def _parsed(self, text: str) -> list[tuple[str, str]]:
        """Names and arguments of what transformers reads as calls; none where it fails, whatever it says."""
        try:
            found = parse_response(text, self._format.template, prefix="", tools=self._tools).get(CALLS_FIELD)
            functions = [call["function"] for call in (found if isinstance(found, list) else [found])]
            return [(function["name"], _as_json(function["arguments"])) for function in functions]
        except (ValueError, LookupError, TypeError, AttributeError):
            return []

    def _begin_call(self, region: _Region, name: str) -> None:
        region.calls += 1
        self._drop_held(region.start)
        self.calls.append(Call(name))
        self._pieces.append(Piece("call", name, call=len(self.calls) - 1))

    def _grow_call(self, text: str) -> None:
        if text:
            self.calls[-1].parts.append(text)
            self._pieces.append(Piece("arguments", text, call=len(self.calls) - 1))

    def _not_a_call(self, region: _Region) -> bool:
        """What looked like the mark of a call is text like any other."""
        self._calls_region, self._at = None, region.start
        self._no_call_before = max(region.begin, region.start + 1)
        return True

    def _end_calls(self, end: int, *, closed: bool = False) -> bool:
        """What follows the calls is content again, but for their closing mark, if that is still to come."""
        self._calls_region, self._at = None, end
        self._leave_mark(self._implicit)
        self._is_unclosed = not closed
        return True


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
