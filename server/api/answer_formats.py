"""How models mark their reasoning and their calls: known ways of writing, and the response template made of them.

A response template is transformers' own description of an answer's parts (`transformers.utils.chat_parsing`). A model
whose tokenizer has one is read by it, as one that the server was started with; for others the chat template shows
which of the ways below the model was trained on, since it writes earlier calls and reasoning in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ID_CHARS = 24


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """A way of marking reasoning: `sign` occurs in the chat template of a model that writes so, `opening` and `closing`
    are what it writes, and `fields` of a response template read it."""

    sign: str
    opening: str
    closing: str
    fields: Mapping[str, Any]

    @staticmethod
    def between(opening: str, closing: str) -> "ReasoningStyle":
        """Reasoning between two marks that serve nothing else."""
        return ReasoningStyle(closing, opening, closing, {"reasoning_content": {"open": opening, "close": closing}})


_HARMONY_TURN = r"(?:<\|start\|>assistant)?"
REASONING = (
    ReasoningStyle.between("<think>", "</think>"),
    ReasoningStyle.between("[THINK]", "[/THINK]"),
    ReasoningStyle(
        # gpt-oss: an answer is messages in channels; all that is not analysis is for the user
        "<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>", "<|end|>",
        {
            "reasoning_content": {
                "open_pattern": _HARMONY_TURN + r"<\|channel\|>analysis<\|message\|>",
                "close_pattern": r"<\|end\|>|(?=<\|start\|>|<\|channel\|>)",
            },
            "message": {
                "open_pattern": _HARMONY_TURN + r"<\|channel\|>(?:final|commentary)<\|message\|>",
                "close_pattern": r"<\|(?:end|return)\|>|(?=<\|start\|>|<\|channel\|>)",
            },
        },
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CallStyle:
    """A way of writing calls: `opening (begin NAME middle ARGUMENTS end)* closing`, calls parted by `separator`.

    `marks` all occur in the chat template of a model that writes so; the first begins every call, or the calls, and if
    it is empty nothing does but the answer's beginning. `field` reads them: the field `tool_calls` of a response
    template. Without a `separator` an answer has one call. `id_chars` and `id_prefix` shape the calls' ids. ARGUMENTS
    is a JSON object, or, with `is_markup`, one `<parameter=KEY>` element for each argument.
    """

    name: str
    marks: tuple[str, ...]
    field: Mapping[str, Any]
    begin: str
    middle: str
    end: str
    opening: str = ""
    closing: str = ""
    separator: str | None = None
    is_markup: bool = False
    id_prefix: str = "call_"
    id_chars: int = ID_CHARS

    @property
    def mark(self) -> str:
        """What a call, or the first one, begins with; empty where only the answer's beginning tells."""
        return self.marks[0]

    def write(self, name: str, arguments: str) -> str:
        """One call in this style."""
        return self.opening + self.begin + name + self.middle + arguments + self.end + self.closing


_JSON_CALL = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}
_NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

STYLES = (
    CallStyle(
        # Qwen 3.5 and Qwen3-Coder: an element for each argument, its text as it is
        "markup", ("<tool_call>", "<function="),
        {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True, "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": _NAMED_CALL,
        },
        begin="<tool_call>\n<function=", middle=">\n", end="</function>\n</tool_call>", separator="\n", is_markup=True,
    ),
    CallStyle(
        # Hermes 2 Pro, Qwen 2.5 and Qwen 3
        "hermes", ("<tool_call>",),
        {"open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json", "transform": _JSON_CALL},
        begin='<tool_call>\n{"name": "', middle='", "arguments": ', end="}\n</tool_call>", separator="\n",
    ),
    CallStyle(
        # Mistral's tokenizers from version 11 on; templates refuse ids that are not nine letters or digits
        "mistral-args", ("[TOOL_CALLS]", "[ARGS]"),
        {
            "open_pattern": r"\[TOOL_CALLS\]\s*(?P<name>[A-Za-z0-9_.:-]+)\s*(?:\[CALL_ID\][A-Za-z0-9]*)?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])", "repeats": True, "content": "json",
            "transform": _NAMED_CALL,
        },
        begin="[TOOL_CALLS]", middle="[ARGS]", end="", separator="", id_prefix="", id_chars=9,
    ),
    CallStyle(
        # Mistral's tokenizers up to version 7: one list of all calls
        "mistral", ("[TOOL_CALLS]",),
        {
            "open": "[TOOL_CALLS]", "content": "json", "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        opening="[TOOL_CALLS][", begin='{"name": "', middle='", "arguments": ', end="}", separator=", ", closing="]",
        id_prefix="", id_chars=9,
    ),
    CallStyle(
        # Llama 3.1 to 3.3: the answer is the call, and no mark says so
        "llama", ("", "<|start_header_id|>", "parameters"),
        {
            "open_pattern": r"\A\s*(?:<\|python_tag\|>\s*)?(?=\{)", "repeats": True, "content": "json",
            "transform": {
                "type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        },
        begin='{"name": "', middle='", "parameters": ', end="}",
    ),
)  # fmt: skip
"""The ways that are known, the more particular ones first."""


READ_ONLY: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...] = (
    (
        # GLM 4.5 to 4.7
        ("<tool_call>", "<arg_key>"),
        {
            "open_pattern": r"<tool_call>\s*(?P<name>[^\s<{]+)\s*(?=<arg_key>|</tool_call>)", "close": "</tool_call>",
            "repeats": True, "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            },
            "transform": _NAMED_CALL,
        },
    ),
    (
        # gpt-oss: a message whose recipient is the function, named before the channel or behind it
        ("<|channel|>commentary", "<|start|>assistant"),
        {
            "open_pattern": (
                r"(?:(?:<\|start\|>assistant)?<\|channel\|>(?:commentary|analysis)\s+|<\|start\|>assistant\s+)?"
                r"to=functions\.(?P<name>[A-Za-z0-9_.-]+)\s*(?:<\|channel\|>(?:commentary|analysis)\s*)?"
                r"(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>"
            ),
            "close": "<|call|>", "repeats": True, "content": "json", "transform": _NAMED_CALL,
        },
    ),
)  # fmt: skip
"""Marks in a chat template and how the calls are read, of models that no grammar can be made to write calls for."""


def detect_style(chat_template: str) -> CallStyle | None:
    """The way of writing calls that a chat template shows, if it is a known one."""
    if _read_only(chat_template) is not None:
        return None
    return next((style for style in STYLES if all(mark in chat_template for mark in style.marks)), None)


def _read_only(chat_template: str) -> Mapping[str, Any] | None:
    """The field that reads a model's calls where it takes more than a style to write them."""
    return next((field for marks, field in READ_ONLY if all(mark in chat_template for mark in marks)), None)


def detect_template(chat_template: str, generation_prompt: str) -> dict[str, Any] | None:
    """The response template that a chat template implies; None for one that marks neither reasoning nor calls.

    `generation_prompt` is what the chat template ends a prompt with: an answer begins behind it, or inside the
    reasoning that it opens.
    """
    style = detect_style(chat_template)
    calls = style.field if style is not None else _read_only(chat_template)
    reasoning = next((way for way in REASONING if way.sign in chat_template), None)
    if calls is None and reasoning is None:
        return None
    fields: dict[str, Any] = {}
    anchor = generation_prompt
    if reasoning is not None:
        fields.update(reasoning.fields)
        anchor = generation_prompt.split(reasoning.opening)[0]
    if calls is not None:
        fields["tool_calls"] = dict(calls)
    start = {"start_anchor": anchor} if anchor else {"start_anchor_pattern": r"\Z"}
    return {"defaults": {"role": "assistant"}, **start, "fields": {**fields, "content": {}}}


def styles_first(style: CallStyle | None) -> tuple[CallStyle, ...]:
    """All styles, this one before the others."""
    return STYLES if style is None else (style, *(other for other in STYLES if other is not style))
