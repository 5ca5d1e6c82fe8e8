"""Prompts by which the router knows the demo's adapters and base: many wordings of each skill."""

from __future__ import annotations

import itertools
from random import Random

from loramux.server.demo.skills import Skill, phrase
from loramux.server.demo.wordings import MORE, bare, expansions, varied


def example_prompts(skill: Skill, rng: Random, n: int) -> list[str]:
    """``n`` prompts of the training split, a wording of each pattern in turn, often framed; never a held-out one."""
    kept_out = set(map(bare, skill.held_out))
    patterns = (*skill.wordings, *MORE[skill.name].splitlines())
    made = (varied(rng.choice(expansions(pattern)), rng) for pattern in itertools.cycle(patterns))
    wordings = (wording for wording in made if bare(wording) not in kept_out)
    return [phrase(wording, skill.argument(rng, "train")) for wording in itertools.islice(wordings, n)]
