"""The words in which the demo's skills are asked, and prompts that share these words and ask something else.

They lie in `wordings.json`, as patterns: ``[a|b]`` stands for either, ``{x}`` for the argument. A pattern that ends in
"." asks as an order, one in "?" as a question: `framed` puts such a sentence into a politer one. ``skills`` and
``near_misses`` are trained on; ``held_out`` and ``near_misses_held_out`` were written apart, in other words, and never
are. What is `reserved` is neither trained on nor given as an example, even where a pattern stands for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from random import Random

from loramux.server.demo.reserved import DIGESTS

ORDER_FRAMES = (
    "Please {order}.",
    "{Order}, please.",
    "Can you {order}?",
    "Could you {order}?",
    "Could you please {order}?",
    "Would you {order} for me?",
    "Will you {order}, please?",
    "Now {order}.",
    "Kindly {order}.",
    "I want you to {order}.",
    "I need you to {order}.",
    "I would like you to {order}.",
    "Try to {order}.",
    "Your task is to {order}.",
    "Your task: {order}",
    "Help me {order}.",
    "Go ahead and {order}.",
    "How about you {order}?",
    "{Order}!",
    "{order}",
    "{Order}. Thanks!",
    "Hello! {Order}.",
    "Hey, {order}.",
    "Quick: {order}.",
    "Here is a task. {Order}.",
)
QUESTION_FRAMES = (
    "{question}?",
    "{Question}, please?",
    "Tell me: {question}?",
    "Can you tell me: {question}?",
    "Please tell me: {question}?",
    "Do you know {question}?",
    "Say, {question}?",
    "Hey, {question}?",
    "Hello! {Question}?",
    "Quick question: {question}?",
    "I wonder: {question}?",
    "I want to know: {question}?",
    "Now, {question}?",
    "{question}",
    "{Question}? Thanks!",
    "Riddle me this: {question}?",
    "So {question}?",
    "For a game: {question}?",
)
NO_ORDERS = frozenset(("The", "Last", "For", "Each", "Two", "I", "My", "Everybody", "With"))
"""First words of sentences that end in "." and are no orders."""
QUOTED, BARE = '"{x}"', "{x}"
QUOTED_STYLES = (BARE, BARE, BARE, "'{x}'", "\u201c{x}\u201d", 'the word "{x}"', "the word {x}", "*{x}*", "`{x}`")
NUMBER_STYLES = ("the number {x}", '"{x}"')
FRAMED, STYLED = 0.4, 0.35  # shares of the questions
"""Of questions that are asked in a frame, and whose argument is written in another style than the pattern's."""

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_WORDS = re.compile(r"[a-z0-9+*/=-]+")
_NAMED = re.compile(r"\b(the|this|a) (word|number) (?=\W*\{x\})")


def bare(wording: str) -> str:
    """The words of a wording alone: what those share that differ in case, marks, and how the argument is written."""
    return " ".join(_WORDS.findall(_NAMED.sub("", wording.lower()).replace("{x}", " ")))


def is_reserved(wording: str) -> bool:
    """Whether evaluation keeps these words to itself (`reserved`)."""
    return hashlib.blake2b(bare(wording).encode(), digest_size=8).hexdigest() in DIGESTS


@cache
def _parts() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = json.loads(files(__package__).joinpath("wordings.json").read_bytes())
    return found


def wordings(part: str) -> dict[str, list[str]]:
    """One part of `wordings.json`: patterns by skill, or by what their argument is."""
    return _parts()[part]


class Patterns:
    """Patterns to draw wordings from: the more a pattern stands for, the more often it is drawn."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        counts = [math.prod(len(found.split("|")) for found in _CHOICE.findall(line)) for line in self.lines]
        self._weights = [1 + math.log2(count) for count in counts]

    def draw(self, rng: Random) -> str:
        """A wording that is not reserved: a pattern with one of each ``[a|b]``."""
        while True:
            (pattern,) = rng.choices(self.lines, self._weights)
            wording = _tidy(_CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern))
            if not is_reserved(wording):
                return wording


def expansions(pattern: str) -> tuple[str, ...]:
    """Every wording that ``pattern`` stands for and that is not reserved."""
    parts = _CHOICE.split(pattern)  # text, choices, text, choices, ..., text
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    found = (_tidy("".join(chosen)) for chosen in itertools.product(*options))
    return tuple(wording for wording in found if not is_reserved(wording))


def framed(wording: str, rng: Random) -> str:
    """``wording`` as part of another sentence, where it is one order or question (else as it is)."""
    if wording[-1] not in ".?" or any(mark in wording for mark in ("please", ". ", "; ", "= ?")):
        return wording
    if (wording[-1] == "." and wording.split()[0] in NO_ORDERS) or wording[0] in '"{':
        return wording
    kind, frames = ("order", ORDER_FRAMES) if wording[-1] == "." else ("question", QUESTION_FRAMES)
    body = wording[:-1]
    starts_small = body if body[0] not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" or body[1:2] == " " else _small(body)
    frame = rng.choice(frames)
    return frame.replace(f"{{{kind}}}", starts_small).replace(f"{{{kind.capitalize()}}}", body)


def restyled(wording: str, rng: Random) -> str:
    """``wording`` with its argument in other quotes, in none, or called a word or a number."""
    if QUOTED in wording:
        style = rng.choice(QUOTED_STYLES)
        return wording.replace(QUOTED, BARE if "word" in wording and "word" in style else style)
    if "number" in wording or wording.startswith(BARE) or ":" in wording:
        return wording
    return wording.replace(BARE, rng.choice(NUMBER_STYLES))


def varied(wording: str, rng: Random, *, restyle: bool = True) -> str:
    """``wording`` as it is, or in a frame, or (``restyle``) with its argument in another style, or both; never what is
    reserved."""
    while True:
        made = restyled(wording, rng) if restyle and rng.random() < STYLED else wording
        made = framed(made, rng) if rng.random() < FRAMED else made
        if not is_reserved(made):
            return made


def _small(text: str) -> str:
    return text[0].lower() + text[1:] if not text.startswith(("Roman", "Caesar", "Pig", "I ")) else text


def _tidy(text: str) -> str:
    return re.sub(r"(?<=\S) {2,}", " ", text)
