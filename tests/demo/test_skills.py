"""The demo's prompts: right answers, a seeded sampler, and splits that never meet."""

from random import Random

import pytest

from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.demo.skills import (
    UNKNOWN,
    Skill,
    adapter_skills,
    ask,
    base_skills,
    composite,
    example_prompts,
    held_out_near_miss,
    near_miss,
    refused,
    split_of,
)
from loramux.server.demo.wordings import expansions, framed, restyled, varied, wordings

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
    assert len(skill.wordings) >= 300
    assert len(skill.held_out) >= 11
    everything = [wording for other in ALL_SKILLS for wording in other.wordings]
    assert not set(skill.held_out) & set(everything)
    assert len(everything) == len(set(everything))


def near_wordings() -> set[str]:
    """Every near miss that the base is trained on, unframed."""
    return {wording for lines in wordings("near_misses").values() for line in lines for wording in expansions(line)}


def test_near_misses_ask_for_no_skill() -> None:
    asked = {wording for skill in ALL_SKILLS for wording in (*skill.wordings, *skill.held_out)}
    held_out = {wording for lines in wordings("near_misses_held_out").values() for wording in lines}
    trained = near_wordings()
    assert len(trained) >= 3000
    assert set(wordings("near_misses_held_out")) == {skill.name for skill in adapter_skills()}
    assert not asked & (trained | held_out)
    assert not trained & held_out
    rng = Random(8)
    assert {near_miss(rng, "train").answer for _ in range(9)} == {held_out_near_miss(rng).answer} == {UNKNOWN}


def test_the_base_says_of_each_adapter_what_it_cannot_do() -> None:
    rng = Random(9)
    answers = {skill.name: refused(skill, rng, "train").answer for skill in adapter_skills()}
    assert len(set(answers.values()) - {UNKNOWN, ""}) == len(answers)
    assert not any(skill.refusal for skill in base_skills())


def test_patterns_stand_for_all_their_choices() -> None:
    assert expansions('[Say|Write] "{x}"[| now].') == (
        'Say "{x}".',
        'Say "{x}" now.',
        'Write "{x}".',
        'Write "{x}" now.',
    )
    drawn = {wording for seed in range(200) for wording in [ALL_SKILLS[0].patterns.draw(Random(seed))]}
    assert len(drawn) >= 20
    assert drawn <= set(ALL_SKILLS[0].wordings)


def test_orders_and_questions_are_framed_and_nothing_else_is() -> None:
    def frames(wording: str) -> set[str]:
        return {framed(wording, Random(seed)) for seed in range(300)}

    assert {'Could you please say "{x}"?', 'I want you to say "{x}".', 'say "{x}"'} <= frames('Say "{x}".')
    assert {'Tell me: what follows "{x}"?', 'what follows "{x}"'} <= frames('What follows "{x}"?')
    for plain in ("Next: {x}", '"{x}" in bold, please.', "{x} + 1 = ?", "I am late."):
        assert frames(plain) == {plain}


def test_arguments_are_written_in_several_styles() -> None:
    def styles(wording: str) -> set[str]:
        return {restyled(wording, Random(seed)) for seed in range(100)}

    assert {"Say {x}.", "Say '{x}'.", 'Say the word "{x}".'} <= styles('Say "{x}".')
    assert 'Say the word the word "{x}".' not in styles('Say the word "{x}".')
    assert styles("Add ten to {x}.") == {"Add ten to the number {x}.", 'Add ten to "{x}".'}
    assert all(varied('Say "{x}".', Random(seed)).count("{x}") == 1 for seed in range(100))


def test_examples_are_many_and_of_the_training_split() -> None:
    for skill in ALL_SKILLS:
        examples = example_prompts(skill, Random(3), 32)
        assert len(set(examples)) == 32
    examples = demo_base_examples()
    assert len(set(examples)) == len(examples) >= 500


def test_composites_are_answered_one_per_line() -> None:
    rng = Random(7)
    question = composite([base_skills()[0], adapter_skills()[0], base_skills()[2]], rng, "fresh")
    assert question.skills == ("echo", "reverse", "first")
    assert len(question.prompt.split("\n")) == len(question.answer.split("\n")) == 3
