"""The questions that the router is measured on: in words that neither adapters, base nor gallery were trained on.

`router_prompts.json` holds wordings by kind: the adapters' skills, the base's own skills, and near misses (what looks
like a skill of an adapter's, and none does). They were written apart from all others, before anything was measured on
them, and nothing is chosen by them. Arguments are the demo's own, of the split that no training saw, drawn by a fixed
seed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from loramux.server.demo.skills import Question, Skill, adapter_skills, base_skills, composite, phrase
from loramux.server.demo.wordings import expansions

WORDINGS = Path(__file__).with_name("router_prompts.json")
SEED = 4
ADAPTER_DRAWS, BASE_DRAWS, NEAR_DRAWS = 6, 5, 2
"""Prompts of each wording: 48 per adapter, and as many of the base's skills as near misses."""
COMPOSITES = 8
"""Of each adapter, and of each kind."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question: `adapter` is the one that it needs ("" for none), `skill` what is asked or looks as if it were.

    `question.answer` is "" for near misses, which nothing here can answer.
    """

    kind: str
    adapter: str
    skill: str
    wording: str
    question: Question


def fresh_prompts() -> list[Prompt]:
    """The frozen set: kinds "adapter", "base" and "near"."""
    wordings: dict[str, dict[str, list[str]]] = json.loads(WORDINGS.read_text(encoding="utf-8"))
    rng = Random(SEED)
    made = []
    for skill in adapter_skills():
        for wording in wordings["adapters"][skill.name]:
            made += [_prompt("adapter", skill.name, skill, wording, rng) for _ in range(ADAPTER_DRAWS)]
    for skill in base_skills():
        for wording in wordings["base"][skill.name]:
            made += [_prompt("base", "", skill, wording, rng) for _ in range(BASE_DRAWS)]
    for skill in adapter_skills():
        for wording in wordings["near_misses"][skill.name]:
            made += [_prompt("near", "", skill, wording, rng) for _ in range(NEAR_DRAWS)]
    return made


def _prompt(kind: str, adapter: str, skill: Skill, wording: str, rng: Random) -> Prompt:
    argument = skill.argument(rng, "fresh")
    answer = "" if kind == "near" else skill.answer(argument)
    return Prompt(kind, adapter, skill.name, wording, Question(phrase(wording, argument), answer, (skill.name,)))


def composites() -> list[Prompt]:
    """Several questions in one prompt: kind "mixed", one adapter's among one or two of the base's; kind "two", two
    adapters'. In trained wordings, so that what is measured is the mixture."""
    rng = Random(SEED + 1)
    learnt = adapter_skills()
    made = []
    for skill in learnt:
        for _ in range(COMPOSITES):
            asked = rng.choices(base_skills(), k=rng.randint(1, 2))
            asked.insert(rng.randint(0, len(asked)), skill)
            made.append(Prompt("mixed", skill.name, skill.name, "", composite(asked, rng, "fresh")))
            asked = [skill, rng.choice([other for other in learnt if other is not skill])]
            rng.shuffle(asked)
            made.append(Prompt("two", skill.name, skill.name, "", composite(asked, rng, "fresh")))
    return made


def examples_of(skill: Skill, count: int, seed: int = SEED) -> list[str]:
    """`count` prompts that an upload could give: trained wordings, evenly over all there are, with arguments of the
    training split."""
    rng, lines = Random(seed), skill.patterns.lines
    wordings = [rng.choice(expansions(lines[i * len(lines) // count])) for i in range(count)]
    return [phrase(wording, skill.argument(rng, "train")) for wording in wordings]
