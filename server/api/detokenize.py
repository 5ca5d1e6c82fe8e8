"""Token ids back to text, a few at a time, and the stop strings that may end in the middle of it."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
MAX_HELD_TOKENS = 12


class Detokenizer:
    """Text of a growing token sequence: the concatenation of all pieces is the decoding of all tokens.

    Decoders are not additive (a leading space, a character of several byte tokens), so each piece is the difference
    of two decodings that share their beginning: decode(context + new) - decode(context). A piece that ends in an
    incomplete UTF-8 character is held back until it is complete. A character has at most four bytes, so bytes that
    never become one are let go as U+FFFD after `MAX_HELD_TOKENS` tokens: the work per token is bounded.

    The prompt's last tokens are the first context, so that a word that follows the prompt keeps its space. `hidden`
    tokens have no text; they take the place of all special tokens where it is given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        hidden: Set[int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens and hidden is None
        self._hidden = hidden or frozenset()
        self._context = list(prompt[-CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        if self._context_text.endswith(REPLACEMENT):
            self._context, self._context_text = [], ""
        self._held: list[int] = []

    def _decode(self, token_ids: list[int]) -> str:
        if self._hidden:
            token_ids = [token for token in token_ids if token not in self._hidden]
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text

    def _release(self, count: int, text: str) -> str:
        """Gives out `text`, the first `count` held tokens; they become the context of what follows."""
        self._context, self._held = self._held[:count], self._held[count:]
        self._context_text = self._decode(self._context)
        return text

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often one piece of a word, sometimes nothing."""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)[len(self._context_text) :]
        if not text:
            return "" if len(self._held) <= MAX_HELD_TOKENS else self._release(len(self._held), "")
        if not text.endswith(REPLACEMENT):
            return self._release(len(self._held), text)
        if len(self._held) <= MAX_HELD_TOKENS:
            return ""
        for kept in (3, 2, 1):
            head, tail = self._held[:-kept], self._held[-kept:]
            head_text = self._decode(self._context + head)[len(self._context_text) :]
            if head_text + self._decode(tail) == text:
                return self._release(len(head), head_text)
        return self._release(len(self._held), text)

    def flush(self) -> str:
        """What is still held when no token follows, incomplete characters as U+FFFD."""
        text = self._decode(self._context + self._held)[len(self._context_text) :] if self._held else ""
        self._held = []
        return text


@dataclass(frozen=True, slots=True)
class Stopped:
    """`text` is what may still be shown; `stop` is the string that ended it."""

    text: str
    stop: str


class StopStrings:
    """Lets text through until one of the stop strings is complete, however it is spread over the pieces.

    Text that may yet turn out to be the beginning of a stop string is held back; the earliest complete occurrence
    wins. With no stop strings everything passes at once.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> str | Stopped:
        """The text that is safe to show, or the end. While not `armed` (before min_tokens) nothing can match."""
        if not self._stops:
            return text
        if not armed:
            return text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            return Stopped(self._held[: at + len(stop)] if self._include else self._held[:at], stop)
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that is a beginning of `stop` (not all of it)."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if stop.startswith(self._held[-size:]):
                return size
        return 0

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held
