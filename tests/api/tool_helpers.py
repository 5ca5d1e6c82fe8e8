"""What the tests of tools and of reasoning share: two functions, and how an answer is read and followed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from api.harness import END, Bench, byte_tokenizer

from loramux.server.api.parsing import AnswerFormat, Piece
from loramux.server.engine.protocol import Constraint

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]


def read(format: AnswerFormat, parts: Sequence[str], *, prompt: str = "", tools: Any = TOOLS) -> tuple[Any, ...]:
    """What an answer is read as: content, reasoning, calls, and the pieces with neighbours of a kind as one."""
    reader = format.reader(format.begun(prompt), tools)
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish()
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and (last.kind, last.call) == (piece.kind, piece.call) and piece.kind != "call":
            joined[-1] = last._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return reader.content, reader.reasoning, [(call.name, call.arguments) for call in reader.calls], joined


def widen(bench: Bench) -> Bench:
    """Room for prompts with tools."""
    assert bench.engine.info_value is not None
    bench.engine.info_value = replace(bench.engine.info_value, max_model_len=8192)
    return bench


def matcher(constraint: Constraint | None, marks: Sequence[str]) -> Any:
    """What follows the constraint in the engine, at its beginning."""
    llguidance = pytest.importorskip("llguidance")
    assert constraint is not None
    assert constraint.kind == "lark"
    tokenizer = llguidance.LLTokenizer(byte_tokenizer(marks).to_str(), eos_token=END)
    found = llguidance.LLMatcher(tokenizer, constraint.text, log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def accepts(constraint: Constraint | None, text: str, marks: Sequence[str]) -> bool:
    """Whether a model may answer so."""
    follower = matcher(constraint, marks)
    ids = byte_tokenizer(marks).encode(text, add_special_tokens=False).ids
    return bool(follower.try_consume_tokens(ids) == len(ids) and follower.is_accepting())
