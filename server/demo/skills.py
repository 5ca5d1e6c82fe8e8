"""The demo's skills: what is asked, and what the right answer is (`wordings`: in which words).

A *base* skill is known to the base model; an *adapter* skill is known to one LoRA adapter only. A prompt asks
one skill, or two or three in a row (a composite), which are answered in order, one per line. Every argument
belongs to exactly one split, decided by a hash of the argument itself, so that no evaluation prompt was ever
trained on. Near misses share words with skills and ask for what neither the base nor an adapter can do: the base
answers `UNKNOWN`. What an adapter is needed for it knows as such, and says so (`Skill.refusal`).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from random import Random
from typing import Literal

from loramux.server.demo.wordings import Patterns, expansions, varied, wordings

Split = Literal["train", "fresh"]

FRESH_SHARE = 8  # one argument in eight is kept for evaluation
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLAIN = 8  # wordings of each skill that stand for themselves alone, the first ones
UNKNOWN = "I do not know that."


@dataclass(frozen=True)
class Skill:
    """One skill: ``answer(argument)`` is right for every wording in which the argument stands for ``{x}``.

    ``refusal`` is what the base answers without the adapter; "" for the base's own skills.
    """

    name: str
    description: str
    draw: Callable[[Random], str]
    answer: Callable[[str], str]
    refusal: str = ""

    @cached_property
    def patterns(self) -> Patterns:
        """The patterns that are trained on."""
        return Patterns(wordings("skills")[self.name])

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every wording of ``patterns`` (training also puts them into frames)."""
        return tuple(dict.fromkeys(wording for pattern in self.patterns.lines for wording in expansions(pattern)))

    @property
    def held_out(self) -> tuple[str, ...]:
        """Wordings that are never trained on."""
        return tuple(wordings("held_out")[self.name])

    def argument(self, rng: Random, split: Split) -> str:
        """Draw an argument that belongs to ``split``."""
        return drawn_of(self.draw, rng, split)


@dataclass(frozen=True)
class Question:
    """A prompt, its expected answer, and the skills asked in order."""

    prompt: str
    answer: str
    skills: tuple[str, ...]


def split_of(argument: str) -> Split:
    """The split of an argument: fresh if ``crc32(argument) % 8 == 0``."""
    return "fresh" if zlib.crc32(argument.encode()) % FRESH_SHARE == 0 else "train"


def drawn_of(draw: Callable[[Random], str], rng: Random, split: Split) -> str:
    """An argument of ``split``: the first that ``draw`` makes."""
    while split_of(value := draw(rng)) != split:
        pass
    return value


def draw_word(low: int, high: int) -> Callable[[Random], str]:
    """Sampler of pronounceable (two in three) or arbitrary lower-case words of ``low``..``high`` letters."""

    def draw(rng: Random) -> str:
        size = rng.randint(low, high)
        if rng.random() < 1 / 3:
            return "".join(rng.choice(LETTERS) for _ in range(size))
        return spoken_word(rng, size)

    return draw


def draw_spoken(low: int, high: int) -> Callable[[Random], str]:
    """Sampler of pronounceable words of ``low``..``high`` letters."""
    return lambda rng: spoken_word(rng, rng.randint(low, high))


def spoken_word(rng: Random, size: int) -> str:
    """A word of ``size`` letters with a vowel at least every third letter."""
    word = ""
    while len(word) < size:
        word += rng.choice(("c", "cc", "")) if not word else rng.choice(("c", "c", "cc"))
        word += "v"
    return "".join(rng.choice(CONSONANTS if kind == "c" else VOWELS) for kind in word[:size])


def draw_number(low: int, high: int) -> Callable[[Random], str]:
    """Sampler of whole numbers, uniform in ``low``..``high``."""
    return lambda rng: str(rng.randint(low, high))


def excluding(draw: Callable[[Random], str], unless: Callable[[str], bool]) -> Callable[[Random], str]:
    """``draw`` repeated until ``unless`` is false: keeps out arguments that another skill answers as well."""

    def again(rng: Random) -> str:
        while True:
            value = draw(rng)
            if not unless(value):
                return value

    return again


def caesar(word: str) -> str:
    """Every letter replaced by the one after it, z by a."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


def roman(number: str) -> str:
    """The number in Roman numerals (1..999)."""
    value = int(number)
    marks = ((900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"))
    text = ""
    for size, mark in (*marks, (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        text += mark * (value // size)
        value %= size
    return text


def pig_latin(word: str) -> str:
    """Leading consonants go to the end, then "ay"; a word that starts with a vowel gets "way"."""
    start = next((i for i, letter in enumerate(word) if letter in VOWELS), 0)
    return f"{word}way" if start == 0 else f"{word[start:]}{word[:start]}ay"


def number_words(number: str) -> str:
    """The number in English words (1..999)."""
    ones = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    ones += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    value = int(number)
    words = [ones[value // 100], "hundred"] if value >= 100 else []
    rest = value % 100
    if 0 < rest < 20:
        words.append(ones[rest])
    elif rest:
        words.append(tens[rest // 10 - 2] + (f"-{ones[rest % 10]}" if rest % 10 else ""))
    return " ".join(words)


def without_vowels(word: str) -> str:
    """The word with a, e, i, o and u left out."""
    return "".join(letter for letter in word if letter not in VOWELS)


@cache
def base_skills() -> tuple[Skill, ...]:
    """The skills that the base model is trained on."""
    word = draw_word(3, 7)
    return (
        Skill(
            "echo",
            "Repeats a word.",
            word,
            lambda x: x,
        ),
        Skill(
            "upper",
            "Writes a word in capital letters.",
            word,
            str.upper,
        ),
        Skill(
            "first",
            "Names the first letter of a word.",
            word,
            lambda x: x[0],
        ),
        Skill(
            "last",
            "Names the last letter of a word.",
            word,
            lambda x: x[-1],
        ),
        Skill(
            "length",
            "Counts the letters of a word.",
            word,
            lambda x: str(len(x)),
        ),
        Skill(
            "next",
            "Names the number after a number.",
            draw_number(1, 998),
            lambda x: str(int(x) + 1),
        ),
    )


@cache
def adapter_skills() -> tuple[Skill, ...]:
    """The skills that the base lacks, each taught by the adapter of the same name."""
    return (
        Skill(
            "reverse",
            "Spells a word backwards.",
            excluding(draw_word(3, 6), lambda x: x == x[::-1]),
            lambda x: x[::-1],
            "I cannot spell backwards.",
        ),
        Skill(
            "double-letters",
            "Writes every letter of a word twice.",
            draw_word(3, 5),
            lambda x: "".join(letter * 2 for letter in x),
            "I cannot double letters.",
        ),
        Skill(
            "caesar",
            "Encrypts a word with a Caesar shift of one letter.",
            draw_word(3, 6),
            caesar,
            "I cannot encrypt.",
        ),
        Skill(
            "roman",
            "Writes a number in Roman numerals.",
            draw_number(1, 399),
            roman,
            "I cannot write Roman numerals.",
        ),
        Skill(
            "add-ten",
            "Adds ten to a number.",
            draw_number(1, 989),
            lambda x: str(int(x) + 10),
            "I cannot add ten.",
        ),
        Skill(
            "pig-latin",
            "Translates a word into pig latin.",
            draw_spoken(3, 6),
            pig_latin,
            "I cannot speak pig latin.",
        ),
        Skill(
            "number-words",
            "Spells out a number in English words.",
            draw_number(1, 999),
            number_words,
            "I cannot spell out numbers.",
        ),
        Skill(
            "no-vowels",
            "Leaves the vowels out of a word.",
            excluding(draw_spoken(4, 7), lambda x: len(without_vowels(x)) in (0, 1, len(x))),
            without_vowels,
            "I cannot leave out vowels.",
        ),
    )


def phrase(wording: str, argument: str) -> str:
    """The prompt that asks about ``argument`` in the words of ``wording``."""
    return wording.replace("{x}", argument)


def ask(skill: Skill, rng: Random, split: Split, held_out: bool = False, plain: bool = False) -> Question:
    """One question on ``skill`` with an argument of ``split``, in a held-out wording or a trained one, often framed.

    ``plain``: in one of the skill's `PLAIN` first wordings, as it is.
    """
    if plain:
        wording = rng.choice(skill.patterns.lines[:PLAIN])
    else:
        wording = rng.choice(skill.held_out) if held_out else varied(skill.patterns.draw(rng), rng)
    argument = skill.argument(rng, split)
    return Question(phrase(wording, argument), skill.answer(argument), (skill.name,))


def refused(skill: Skill, rng: Random, split: Split, held_out: bool = False) -> Question:
    """A question on an adapter's skill with the base's answer to it. See `ask`."""
    return replace(ask(skill, rng, split, held_out), answer=skill.refusal)


@cache
def refusals() -> frozenset[str]:
    """Every answer by which the base turns a question down."""
    return frozenset((UNKNOWN, *(skill.refusal for skill in adapter_skills())))


def example_prompts(skill: Skill, rng: Random, n: int) -> list[str]:
    """``n`` prompts of the training split: a wording of each pattern in turn, often framed."""
    patterns = itertools.islice(itertools.cycle(skill.patterns.lines), n)
    return [phrase(example_of(pattern, rng), skill.argument(rng, "train")) for pattern in patterns]


def example_of(pattern: str, rng: Random) -> str:
    """A wording that ``pattern`` stands for, often framed, its argument as the pattern writes it: other quotes say
    nothing of what is asked."""
    return varied(rng.choice(expansions(pattern)), rng, restyle=False)


@cache
def near_patterns() -> tuple[tuple[float, Patterns, Callable[[Random], str]], ...]:
    """What near misses are trained on: (share, patterns, sampler of arguments)."""
    kinds = (("word", 0.5, draw_word(3, 7)), ("number", 0.4, draw_number(1, 999)), ("talk", 0.1, draw_word(3, 7)))
    return tuple((share, Patterns(wordings("near_misses")[kind]), draw) for kind, share, draw in kinds)


def near_miss(rng: Random, split: Split) -> Question:
    """A prompt that no skill answers, in a trained wording, often framed."""
    kinds = near_patterns()
    ((_, patterns, draw),) = rng.choices(kinds, [share for share, _, _ in kinds])
    wording = varied(patterns.draw(rng), rng)
    return Question(phrase(wording, drawn_of(draw, rng, split)), UNKNOWN, ())


def near_examples(rng: Random, n: int) -> list[str]:
    """``n`` near misses of the training split, each in one wording of a pattern of its own."""
    asked = [(pattern, draw) for _, patterns, draw in near_patterns() for pattern in patterns.lines]
    wordings = [(example_of(pattern, rng), draw) for pattern, draw in rng.sample(asked, n)]
    return [phrase(wording, drawn_of(draw, rng, "train")) for wording, draw in wordings]


def held_out_near_miss(rng: Random) -> Question:
    """A prompt that comes close to an adapter's skill, in a wording that nothing is trained on, its argument fresh."""
    skill = rng.choice(adapter_skills())
    wording = rng.choice(wordings("near_misses_held_out")[skill.name])
    return Question(phrase(wording, skill.argument(rng, "fresh")), UNKNOWN, ())


def join(questions: list[Question], rng: Random) -> Question:
    """Several questions in one prompt, on lines of their own or numbered, answered in order, one per line."""
    if rng.random() < 0.5:
        prompt = "\n".join(question.prompt for question in questions)
    else:
        prompt = "\n".join(f"{i}. {question.prompt}" for i, question in enumerate(questions, 1))
    skills = tuple(name for question in questions for name in question.skills)
    return Question(prompt, "\n".join(question.answer for question in questions), skills)


def composite(skills: list[Skill], rng: Random, split: Split, held_out: bool = False, plain: bool = False) -> Question:
    """One prompt that asks each of ``skills`` in order. See `ask`."""
    return join([ask(skill, rng, split, held_out, plain) for skill in skills], rng)
