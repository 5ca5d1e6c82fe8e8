"""Constraints compiled by llguidance, within bounds: what the engine follows, and what the API checks beforehand.

llguidance (https://github.com/guidance-ai/llguidance) runs a lexer of derivatives of regular expressions under an
Earley parser, and is imported when it is first needed. Its own limits bound a step; compiling is bounded by neither
time nor memory (a schema of 42 bytes, `{"type": "integer", "multipleOf": 1000003}`, takes 9 s and 290 MB, a long chain
of rules overflows the stack), which is why the API compiles in a process of its own first: see `grammar_worker`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramux.server.engine.protocol import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WHITESPACE = r"[ \t\n\r]{0,64}"
"""Between the tokens of JSON, where a model that likes blanks would otherwise write nothing else."""
WORD_BITS = 32
MAX_MASK_SECONDS = 0.1
MAX_SLOW_SECONDS = 0.5
MAX_ERROR_CHARS = 400
MAX_LARK_CHARS = 3 << 16
_MAX_LEXER_STATES = 50_000
_MAX_ITEMS_IN_ROW = 20_000
_MAX_ITEMS_IN_STEP = 1_000_000


class ConstraintError(ValueError):
    """The constraint cannot be followed; the message says why."""


def make_tokenizer(definition: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "LLTokenizer":
    """llguidance's view of a tokenizer (the text of its `tokenizer.json`) for logits of `vocab_size` columns.

    Raises ConstraintError where the package, an end-of-sequence token or a tokenizer that it knows is missing.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise ConstraintError("structured output needs the package llguidance: pip install llguidance") from error
    if not eos_token_ids:
        raise ConstraintError("structured output needs a model with an end-of-sequence token, and this one has none")
    try:
        found = LLTokenizer(definition, eos_token=list(eos_token_ids))
        if found.vocab_size < vocab_size:
            found = LLTokenizer(definition, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:
        raise ConstraintError(f"this model's tokenizer cannot be constrained: {_cut(error)}") from error
    return found


def lark_of(grammar: str) -> str:
    """A grammar in llguidance's Lark as it is, one in GBNF (llama.cpp's, its first rule named `root`) converted to it.

    Raises ConstraintError where that fails.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark: str = any_to_lark(grammar)
    except Exception as error:
        raise ConstraintError(_cut(error)) from error
    if len(lark) > MAX_LARK_CHARS:
        raise ConstraintError(f"it has more than {MAX_LARK_CHARS} characters as Lark")
    return lark


def _grammar_of(constraint: Constraint) -> str:
    """llguidance's own form of a constraint. Raises ValueError for text that is no JSON."""
    from llguidance import LLMatcher

    makers: dict[str, Callable[[str], str]] = {
        "json_schema": _schema,
        "json_object": lambda text: _schema('{"type": "object"}'),
        "regex": LLMatcher.grammar_from_regex,
        "choice": lambda text: LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text)))),
        "lark": LLMatcher.grammar_from_lark,
    }
    return makers[constraint.kind](constraint.text)


def _schema(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(
        text, defaults={"whitespace_pattern": WHITESPACE}, overrides={"lenient": False}
    )


def _limits() -> "LLParserLimits":
    """llguidance's bounds on a step and on a matcher's memory (1-2 kB per lexer state).

    Items are what optional properties need: with its defaults an object of 100 fails in the middle of its first name,
    with these one of 1000 does not.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES, max_items_in_row=_MAX_ITEMS_IN_ROW, step_max_items=_MAX_ITEMS_IN_STEP,
        verbose_errors=False,
    )  # fmt: skip


@dataclass(slots=True)
class Matcher:
    """llguidance's state after the first tokens of an answer. Its masks have `words` 32-bit words, a bit per token.

    `slow_seconds` of processor time were lost with it by others: see `pace`.
    """

    inner: "LLMatcher"
    words: int
    slow_seconds: float = 0.0

    def copy(self) -> "Matcher":
        """One that goes its own way from here on."""
        return Matcher(self.inner.deep_copy(), self.words)

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole: nothing can follow, or its end was chosen. True for one that failed, too."""
        return self.inner.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it cannot go on."""
        if self.inner.is_error():
            return _cut(self.inner.get_error())
        return "it takes too long" if self.slow_seconds > MAX_SLOW_SECONDS else None


def compile_constraint(tokenizer: "LLTokenizer", constraint: Constraint) -> Matcher:
    """A matcher at the constraint's beginning, its first mask known. Bounds neither time nor memory.

    Raises ConstraintError for what llguidance does not support, and for a text that nothing can match.
    """
    from llguidance import LLMatcher

    try:
        inner = LLMatcher(tokenizer, _grammar_of(constraint), log_level=0, limits=_limits())
    except ValueError as error:
        raise ConstraintError(_cut(error)) from error
    matcher = Matcher(inner, -(-tokenizer.vocab_size // WORD_BITS))
    if matcher.error is not None:
        raise ConstraintError(matcher.error)
    began = time.thread_time()
    mask = inner.compute_bitmask()
    seconds = time.thread_time() - began
    if inner.get_error().startswith("NoExtension") or not any(mask):
        raise ConstraintError("no text can match it")
    if matcher.error is not None:
        raise ConstraintError(matcher.error)
    if seconds > MAX_MASK_SECONDS:
        raise ConstraintError("it is too complex: its first token alone takes too long to find")
    return matcher


def _cut(message: object) -> str:
    text = str(message).strip()
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."
