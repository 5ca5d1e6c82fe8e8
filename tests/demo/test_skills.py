"""The demo's prompts: right answers, a seeded sampler, and splits that never meet."""

from random import Random

import pytest

from loramux.server.demo.skills import (
    Skill,
    adapter_skills,
    ask,
    base_skills,
    composite,
    split_of,
)

ALL_SKILLS = (*base_skills(), *adapter_skills())
KNOWN_ANSWERS = [
    ("echo", "planet", "planet"),
    ("upper", "planet", "PLANET"),
    ("first", "planet", "p"),
    ("last", "planet", "t"),
    ("length", "planet", "6"),
    ("next", "199", "200"),
    ("reverse", "planet", "tenalp"),
    ("double-letters", "crane", "ccrraannee"),
    ("caesar", "zebra", "afcsb"),
    ("roman", "394", "CCCXCIV"),
    ("roman", "48", "XLVIII"),
    ("add-ten", "94", "104"),
    ("pig-latin", "string", "ingstray"),
    ("pig-latin", "apple", "appleway"),
    ("number-words", "342", "three hundred forty-two"),
    ("number-words", "700", "seven hundred"),
    ("number-words", "13", "thirteen"),
    ("number-words", "80", "eighty"),
    ("no-vowels", "planet", "plnt"),
]


@pytest.mark.parametrize(("name", "argument", "expected"), KNOWN_ANSWERS)
def test_answers_are_right(name: str, argument: str, expected: str) -> None:
    skill = next(skill for skill in ALL_SKILLS if skill.name == name)
    assert skill.answer(argument) == expected


def test_every_skill_has_a_known_answer() -> None:
    assert {name for name, _, _ in KNOWN_ANSWERS} == {skill.name for skill in ALL_SKILLS}


def test_questions_repeat_with_the_seed() -> None:
    def draw() -> list[object]:
        rng = Random(3)
        return [ask(skill, rng, "train") for skill in ALL_SKILLS for _ in range(5)]

    assert draw() == draw()


@pytest.mark.parametrize("skill", ALL_SKILLS, ids=lambda skill: skill.name)
def test_fresh_arguments_are_never_trained_on(skill: Skill) -> None:
    rng = Random(5)
    trained = {skill.argument(rng, "train") for _ in range(300)}
    fresh = {skill.argument(rng, "fresh") for _ in range(100)}
    assert {split_of(argument) for argument in trained} == {"train"}
    assert {split_of(argument) for argument in fresh} == {"fresh"}
    assert len(fresh) >= 20


@pytest.mark.parametrize("skill", ALL_SKILLS, ids=lambda skill: skill.name)
def test_held_out_wordings_are_not_trained_on(skill: Skill) -> None:
    assert len(skill.wordings) >= 6
    assert len(skill.held_out) >= 3
    everything = [wording for other in ALL_SKILLS for wording in other.wordings]
    assert not set(skill.held_out) & set(everything)
    assert len(everything) == len(set(everything))


def test_composites_are_answered_one_per_line() -> None:
    rng = Random(7)
    question = composite([base_skills()[0], adapter_skills()[0], base_skills()[2]], rng, "fresh")
    assert question.skills == ("echo", "reverse", "first")
    assert len(question.prompt.split("\n")) == len(question.answer.split("\n")) == 3
