"""The demo's skills: what is asked, in which words, and what the right answer is.

A *base* skill is known to the base model; an *adapter* skill is known to one LoRA adapter only. A prompt asks
one skill, or two or three in a row (a composite), which are answered in order, one per line. Every argument
belongs to exactly one split, decided by a hash of the argument itself, so that no evaluation prompt was ever
trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "fresh"]

FRESH_SHARE = 8  # one argument in eight is kept for evaluation
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Skill:
    """One skill: ``answer(argument)`` is right for every wording in which the argument stands for ``{x}``.

    ``wordings`` are trained on, ``held_out`` never are.
    """

    name: str
    description: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    draw: Callable[[Random], str]
    answer: Callable[[str], str]
    base: bool

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


def base_skills() -> tuple[Skill, ...]:
    """The skills that the base model is trained on."""
    word = draw_word(3, 7)
    return (
        Skill(
            "echo",
            "Repeats a word.",
            (
                'Repeat the word "{x}".',
                'Say "{x}".',
                "Copy this word: {x}",
                'Echo "{x}" back to me.',
                'Type "{x}" again.',
                'Write the word "{x}" unchanged.',
                'Give me back "{x}".',
                'Say the word "{x}" once more.',
            ),
            ('Copy "{x}" for me.', 'Type the word "{x}" once more.', "Repeat this word: {x}"),
            word,
            lambda x: x,
            True,
        ),
        Skill(
            "upper",
            "Writes a word in capital letters.",
            (
                'Write "{x}" in capital letters.',
                'Uppercase "{x}".',
                'Put "{x}" in upper case.',
                'Capitalise every letter of "{x}".',
                'Shout the word "{x}".',
                'Make "{x}" all caps.',
                'Turn "{x}" into capitals.',
                "Convert to upper case: {x}",
            ),
            (
                'Turn "{x}" into big letters.',
                'Make "{x}" capitals.',
                'Make "{x}" capital letters.',
            ),
            word,
            str.upper,
            True,
        ),
        Skill(
            "first",
            "Names the first letter of a word.",
            (
                'What is the first letter of "{x}"?',
                'Which letter starts "{x}"?',
                'Give the first letter of "{x}".',
                'What letter does "{x}" begin with?',
                'Name the opening letter of "{x}".',
                '"{x}" starts with which letter?',
                'Tell me the initial of "{x}".',
                "First letter of this word: {x}",
            ),
            (
                'Give the opening letter of "{x}".',
                'Which letter does "{x}" begin with?',
                'Tell me the opening letter of "{x}".',
            ),
            word,
            lambda x: x[0],
            True,
        ),
        Skill(
            "last",
            "Names the last letter of a word.",
            (
                'What is the last letter of "{x}"?',
                'Which letter ends "{x}"?',
                'Give the last letter of "{x}".',
                'What letter does "{x}" end with?',
                'Name the final letter of "{x}".',
                '"{x}" ends with which letter?',
                'Tell me the closing letter of "{x}".',
                "Last letter of this word: {x}",
            ),
            (
                'Give the final letter of "{x}".',
                'Which letter does "{x}" end with?',
                'Tell me the final letter of "{x}".',
            ),
            word,
            lambda x: x[-1],
            True,
        ),
        Skill(
            "length",
            "Counts the letters of a word.",
            (
                'How many letters are in "{x}"?',
                'Count the letters of "{x}".',
                'How long is the word "{x}"?',
                'What is the length of "{x}"?',
                'Give the number of letters in "{x}".',
                'Letter count of "{x}"?',
                'How many letters does "{x}" have?',
                "Count the letters: {x}",
            ),
            (
                'How many letters has "{x}"?',
                'Give the length of "{x}".',
                'Count how many letters are in "{x}".',
            ),
            word,
            lambda x: str(len(x)),
            True,
        ),
        Skill(
            "next",
            "Names the number after a number.",
            (
                "What number comes after {x}?",
                "Which number follows {x}?",
                "Give the next number after {x}.",
                "Count one up from {x}.",
                "What comes right after {x}?",
                "Name the number after {x}.",
                "Which number is next after {x}?",
                "Next number: {x}",
            ),
            ("Which number comes after {x}?", "Give the number after {x}.", "What number is next after {x}?"),
            draw_number(1, 998),
            lambda x: str(int(x) + 1),
            True,
        ),
    )


def adapter_skills() -> tuple[Skill, ...]:
    """The skills that the base lacks, each taught by the adapter of the same name."""
    return (
        Skill(
            "reverse",
            "Spells a word backwards.",
            (
                'Reverse the word "{x}".',
                'Spell "{x}" backwards.',
                'Write "{x}" from back to front.',
                'What is "{x}" backwards?',
                'Read "{x}" from right to left.',
                'Flip the letters of "{x}" around.',
                'Give "{x}" in reverse.',
                "Reverse this: {x}",
            ),
            ('Write "{x}" backwards.', 'What is "{x}" in reverse?', 'Reverse the letters of "{x}".'),
            excluding(draw_word(3, 6), lambda x: x == x[::-1]),
            lambda x: x[::-1],
            False,
        ),
        Skill(
            "double-letters",
            "Writes every letter of a word twice.",
            (
                'Double every letter of "{x}".',
                'Write each letter of "{x}" twice.',
                'Stutter the word "{x}".',
                'Stretch "{x}" by doubling its letters.',
                'Duplicate the letters of "{x}".',
                'What is "{x}" with doubled letters?',
                'Put every letter of "{x}" two times.',
                "Double these letters: {x}",
            ),
            (
                'Double the letters of "{x}".',
                'Write every letter of "{x}" two times.',
                'Stretch "{x}" by writing each letter twice.',
            ),
            draw_word(3, 5),
            lambda x: "".join(letter * 2 for letter in x),
            False,
        ),
        Skill(
            "caesar",
            "Encrypts a word with a Caesar shift of one letter.",
            (
                'Caesar shift "{x}" by one.',
                'Encrypt "{x}" with a Caesar cipher.',
                'Encode "{x}" by moving each letter one ahead.',
                'Shift every letter of "{x}" by one.',
                'Put "{x}" into secret code.',
                'Cipher the word "{x}".',
                'What is "{x}" in Caesar code?',
                "Encrypt this word: {x}",
            ),
            (
                'Encrypt "{x}" by moving every letter by one.',
                'What is "{x}" in secret code?',
                'Shift "{x}" with a Caesar cipher.',
            ),
            draw_word(3, 6),
            caesar,
            False,
        ),
        Skill(
            "roman",
            "Writes a number in Roman numerals.",
            (
                "Write {x} in Roman numerals.",
                "What is {x} as a Roman numeral?",
                "Convert {x} to Roman numerals.",
                "How would a Roman write {x}?",
                "Give the Roman numeral for {x}.",
                "Turn {x} into Roman numerals.",
                "How did ancient Rome note {x}?",
                "Roman numeral of {x}",
            ),
            (
                "Give {x} in Roman numerals.",
                "What is the Roman numeral for {x}?",
                "Convert {x} into a Roman numeral.",
            ),
            draw_number(1, 399),
            roman,
            False,
        ),
        Skill(
            "add-ten",
            "Adds ten to a number.",
            (
                "What is {x} plus ten?",
                "Add ten to {x}.",
                "Give the sum of {x} and ten.",
                "How much is {x} plus ten?",
                "Calculate {x} + 10.",
                "What is ten more than {x}?",
                "Increase {x} by ten.",
                "{x} + 10 = ?",
            ),
            ("How much is {x} + 10?", "Calculate the sum of {x} and ten.", "Give ten more than {x}."),
            draw_number(1, 989),
            lambda x: str(int(x) + 10),
            False,
        ),
        Skill(
            "pig-latin",
            "Translates a word into pig latin.",
            (
                'Say "{x}" in pig latin.',
                'Translate "{x}" to pig latin.',
                'What is "{x}" in pig latin?',
                'How do you say "{x}" in igpay atinlay?',
                'Turn "{x}" into pig latin.',
                'Pig latin for "{x}", please.',
                'Convert "{x}" to igpay atinlay.',
                "In pig latin: {x}",
            ),
            (
                'Write "{x}" in pig latin.',
                'Turn "{x}" into igpay atinlay.',
                'Translate "{x}" into igpay atinlay.',
            ),
            draw_spoken(3, 6),
            pig_latin,
            False,
        ),
        Skill(
            "number-words",
            "Spells out a number in English words.",
            (
                "Write {x} in words.",
                "Spell out the number {x}.",
                "How do you say {x} in English?",
                "Write out {x} in full words.",
                "Put the number {x} into words.",
                "What is {x} in English words?",
                "Spell the number {x} for a cheque.",
                "In words: {x}",
            ),
            (
                "Put {x} into words.",
                "Say the number {x} in English.",
                "Write the number {x} in full words.",
            ),
            draw_number(1, 999),
            number_words,
            False,
        ),
        Skill(
            "no-vowels",
            "Leaves the vowels out of a word.",
            (
                'Remove the vowels from "{x}".',
                'Write "{x}" without vowels.',
                'Drop all vowels of "{x}".',
                'Which consonants are in "{x}"?',
                'Delete every vowel in "{x}".',
                'Strip the vowels out of "{x}".',
                'Keep only the consonants of "{x}".',
                "No vowels: {x}",
            ),
            (
                'Drop the vowels from "{x}".',
                'Give only the consonants of "{x}".',
                'Delete the vowels in "{x}".',
            ),
            excluding(draw_spoken(4, 7), lambda x: len(without_vowels(x)) in (0, 1, len(x))),
            without_vowels,
            False,
        ),
    )


def phrase(wording: str, argument: str) -> str:
    """The prompt that asks about ``argument`` in the words of ``wording``."""
    return wording.replace("{x}", argument)


def ask(skill: Skill, rng: Random, split: Split, held_out: bool = False) -> Question:
    """One question on ``skill`` with an argument of ``split``, in a trained or a held-out wording."""
    wording = rng.choice(skill.held_out if held_out else skill.wordings)
    argument = skill.argument(rng, split)
    return Question(phrase(wording, argument), skill.answer(argument), (skill.name,))


def join(questions: list[Question], rng: Random) -> Question:
    """Several questions in one prompt, on lines of their own or numbered, answered in order, one per line."""
    if rng.random() < 0.5:
        prompt = "\n".join(question.prompt for question in questions)
    else:
        prompt = "\n".join(f"{i}. {question.prompt}" for i, question in enumerate(questions, 1))
    skills = tuple(name for question in questions for name in question.skills)
    return Question(prompt, "\n".join(question.answer for question in questions), skills)


def composite(skills: list[Skill], rng: Random, split: Split, held_out: bool = False) -> Question:
    """One prompt that asks each of ``skills`` in order."""
    return join([ask(skill, rng, split, held_out) for skill in skills], rng)
