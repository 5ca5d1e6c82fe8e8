"""Tools: which a prompt offers, and the grammar that holds an answer to calling them.

A call is written in the model's own style (`answer_formats`), so the grammar is made of that style's strings, the
functions' names and their parameters' schemas, in llguidance's variant of Lark. Reasoning comes before, as the model's
format has it, and is not constrained.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from loramux.server.api.answer_formats import CallStyle
from loramux.server.api.errors import bad_request
from loramux.server.api.parsing import AnswerFormat
from loramux.server.api.schemas.chat import ChatRequest, FunctionSpec
from loramux.server.engine.grammars import WHITESPACE
from loramux.server.engine.protocol import Constraint

MAX_CALLS = 32
ANY_TEXT = "/(?s:.*)/"
GAP = r"/\n{0,2}/"
JSON_PIECES = re.compile(r'"[^"]*"|: |, |\{')
AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How arguments are spaced where the grammar decides: as `tojson` writes earlier calls into the prompt."""


def offered_tools(body: ChatRequest, format: AnswerFormat | None) -> list[dict[str, Any]] | None:
    """The tools that the prompt shows to the model; None for none, which is what `tool_choice: "none"` means.

    Raises a 400 when calls of this model could not be told from text.
    """
    if not body.tools or body.choice == "none":
        return None
    if format is None or format.calls is None:
        raise bad_request(
            "How this model writes calls is not known: start the server with --response-template FILE, or with a "
            "--chat-template that renders tools in a known way.", "tools", "unsupported_parameter",
        )  # fmt: skip
    return [tool.for_template() for tool in body.tools]


class AnswerGrammar:
    """Grammars for the answers of one model.

    `tokens` are the added tokens that marks are made of, by their text: the model writes a mark as such a token, and a
    grammar names it by its id, since no other text becomes it.
    """

    def __init__(self, format: AnswerFormat, tokens: Mapping[str, int]) -> None:
        self._format = format
        self._tokens = tokens
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def constraint(
        self, body: ChatRequest, *, offered: bool, is_reasoning: bool, given: Constraint | None
    ) -> Constraint | None:
        """What the whole answer is held to: by the choice of tools that are `offered`, by strict functions, and by what
        is `given` for its content. None where it is free.

        `is_reasoning` says that the prompt ends inside the model's reasoning. Raises a 400 for what has no grammar.
        """
        must = offered and body.choice != "auto"
        held = must or (
            offered
            and (
                given is not None
                or body.parallel_tool_calls is False
                or any(function.strict for function in body.callable_functions)
            )
        )
        if not held and (given is None or given.kind == "lark" or self._format.reasoning_marks() is None):
            return given
        lines: list[str] = []
        thought = self._thought(lines, is_reasoning=is_reasoning)
        if not held:
            answers = "answer"
        elif must:
            answers = "calls"
        else:
            answers = "free" if given is None else "calls | answer"
        if held:
            self._calls(lines, body, must=must or given is not None)
        if given is not None and "answer" in answers:
            lines.append(f"answer: {_answer(given)}")
        return Constraint("lark", "\n".join([f"start: {thought}({answers})", *lines, ""]))

    def _literal(self, text: str) -> str:
        """The text in Lark: strings, and added tokens by their ids."""
        parts = self._split.split(text) if self._split else [text]
        return " ".join(f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part)
                        for part in parts if part)  # fmt: skip

    def _up_to(self, lines: list[str], name: str, mark: str) -> str:
        """Any text and then this mark, at its first occurrence."""
        if mark in self._tokens:
            return f"{ANY_TEXT} {self._literal(mark)}"
        lines.append(f"{name}[lazy]: {ANY_TEXT} {json.dumps(mark)}")
        return name

    def _thought(self, lines: list[str], *, is_reasoning: bool) -> str:
        """Reasoning, which the prompt may have begun, and the model need not begin."""
        marks = self._format.reasoning_marks()
        if marks is None:
            return ""
        opening = "" if is_reasoning else self._literal(marks[0]) + " "
        lines.append(f"thought: {opening}{self._up_to(lines, 'inside', marks[1])} {GAP}")
        return "thought " if is_reasoning else "thought? "

    def _calls(self, lines: list[str], body: ChatRequest, *, must: bool) -> None:
        """The rule `calls`, or, if the model need not call, `free`: text with calls in it."""
        style = self._format.style
        if style is None:
            raise bad_request(
                "This model writes calls in a way that no grammar is known for: leave tool_choice, strict and "
                "parallel_tool_calls out, or start the server with a --chat-template of a known style.",
                "tool_choice", "unsupported_parameter",
            )  # fmt: skip
        names = []
        for number, function in enumerate(body.callable_functions):
            names.append(f"f{number}")
            exact = bool(function.strict) or body.choice != "auto"
            arguments = self._arguments(lines, number, style, function, exact=exact)
            lines.append(f"f{number}: {self._called(style, function.name)} {arguments}")
        lines.append(f"function: {' | '.join(names)}")
        single = style.separator is None or body.parallel_tool_calls is False or body.choice == "named"
        most = 1 if single else MAX_CALLS
        mark = self._literal(style.mark)
        if must:
            lines.append(f"calls: {self._run(style, mark, most)}")
        elif not style.mark:
            lines.append(f'free: {self._run(style, mark, most)} | /[^ \\t\\r\\n{{](?s:.*)/ | ""')
        else:
            # the text up to the mark is a part of what begins a call, so that the mark cannot be a part of the text
            begun = self._run(style, self._up_to(lines, "head", style.mark), 1 if not style.opening else most)
            repeats = most if not style.opening else 1
            lines.append(f"called: {begun}")
            lines.append(f"free: {ANY_TEXT} | called" if single else f"free: called{{0,{repeats}}} {ANY_TEXT}")

    def _called(self, style: CallStyle, name: str) -> str:
        """A call up to its arguments, but for a beginning that tells nothing of the function. One that begins like any
        JSON is in the pieces that llguidance reads JSON in, so that other JSON may begin in the same way."""
        if style.mark:
            return self._literal(name + style.middle)
        return " ".join(map(json.dumps, JSON_PIECES.findall(style.begin + name + style.middle)))

    def _run(self, style: CallStyle, mark: str, most: int) -> str:
        """Up to `most` calls, one after the other; `mark` is what begins the first of them."""
        again = self._literal(style.begin) if style.mark else ""
        if style.opening:
            first = f"{mark} {self._literal(style.opening.removeprefix(style.mark))} {again}"
        else:
            first = f"{mark} {self._literal(style.begin.removeprefix(style.mark))}" if style.mark else ""
        end = self._literal(style.end)
        more = f"({self._literal(style.separator or '')} {again} function {end}){{0,{most - 1}}}" if most > 1 else ""
        return f"{first} function {end} {more} {self._literal(style.closing)}"

    def _arguments(
        self, lines: list[str], number: int, style: CallStyle, function: FunctionSpec, *, exact: bool
    ) -> str:
        """A function's arguments: as its schema has them, or, if not `exact`, any."""
        if not style.is_markup:
            return _json({**function.schema_of_arguments, "type": "object"} if exact else {"type": "object"}, function)
        if function.strict:
            raise bad_request(
                f"This model writes arguments as markup, which cannot be held to the schema of {function.name!r}: "
                "leave `strict` out.", "tools", "unsupported_parameter",
            )  # fmt: skip
        return self._elements(lines, number, function)

    def _elements(self, lines: list[str], number: int, function: FunctionSpec) -> str:
        """An element for each property in its order. Values are JSON where the schema's type says so, else any text."""
        whole = function.schema_of_arguments
        shared: dict[str, Any] = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        properties, required = whole.get("properties"), whole.get("required")
        elements = []
        for place, (key, schema) in enumerate(properties.items() if isinstance(properties, dict) else ()):
            name = f"p{number}_{place}"
            kind = schema.get("type") if isinstance(schema, dict) else None
            if kind in ("integer", "number", "boolean", "array", "object"):
                value = _json({**schema, **shared}, function) + ' "\\n</parameter>\\n"'
            else:
                lines.append(f'{name}v[lazy]: {ANY_TEXT} "\\n</parameter>\\n"')
                value = f"{name}v"
            lines.append(f"{name}: {json.dumps(f'<parameter={key}>' + chr(10))} {value}")
            elements.append(name if isinstance(required, list) and key in required else f"{name}?")
        return " ".join(elements)


def _json(schema: Mapping[str, Any], function: FunctionSpec) -> str:
    """JSON that a schema holds for; of a function that is not strict, as far as the schema can be followed."""
    options = {**AS_TEMPLATES_WRITE, "lenient": not function.strict}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _answer(given: Constraint) -> str:
    """What the content is held to, as a part of a grammar. Raises a 400 for a grammar, which cannot be one."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": False}
    match given.kind:
        case "json_schema":
            return "%json " + json.dumps({**json.loads(given.text), "x-guidance": options})
        case "json_object":
            return "%json " + json.dumps({"type": "object", "x-guidance": options})
        case "choice":
            return " | ".join(map(json.dumps, json.loads(given.text)))
        case "regex":
            return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", given.text).replace("\n", r"\n") + "/"
        case "lark":
            raise bad_request(
                "A grammar describes the whole answer and goes without tools: leave them out, or set tool_choice "
                '"none".', "tools", "invalid_value",
            )  # fmt: skip
