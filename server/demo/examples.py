"""Prompts by which the router knows the demo's adapters and base: many wordings of each skill, and near misses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

from loramux.server.demo.skills import Skill, draw_number, draw_word, drawn_of, phrase
from loramux.server.demo.wordings import bare, expansions, varied, wordings


def example_prompts(skill: Skill, rng: Random, n: int) -> list[str]:
    """``n`` prompts of the training split, a wording of each pattern in turn, often framed; never a held-out one."""
    kept_out = set(map(bare, skill.held_out))
    made = (varied(rng.choice(expansions(line)), rng) for line in itertools.cycle(wordings("skills")[skill.name]))
    found = itertools.islice((wording for wording in made if bare(wording) not in kept_out), n)
    return [phrase(wording, skill.argument(rng, "train")) for wording in found]


def near_misses(rng: Random) -> list[str]:
    """What looks like a skill and is none, in one wording of every pattern, with arguments of the training split."""
    word, number = draw_word(3, 7), draw_number(1, 999)
    draws: dict[str, Callable[[Random], str]] = {"word": word, "number": number, "talk": word}
    asked = [(line, draws[kind]) for kind, lines in wordings("near_misses").items() for line in lines]
    return [phrase(varied(rng.choice(expansions(line)), rng), drawn_of(draw, rng, "train")) for line, draw in asked]
