"""Prompts that the demo's base answers by itself, for the router to tell from those that need an adapter."""

from __future__ import annotations

from random import Random

from loramux.server.demo.skills import base_skills, phrase

SEED = 11
DRAWS = 3  # of each wording: what varies between them is what does not matter


def demo_base_examples() -> tuple[str, ...]:
    """Each wording that the base was trained on, a few times, with arguments of the training split."""
    rng = Random(SEED)
    wordings = [(skill, wording) for skill in base_skills() for wording in skill.wordings]
    return tuple(phrase(wording, skill.argument(rng, "train")) for _ in range(DRAWS) for skill, wording in wordings)
