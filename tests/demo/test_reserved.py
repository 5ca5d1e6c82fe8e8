"""What the router is measured on is nowhere in what the demo is trained on or known by, in whatever frame or style."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from loramux.server.demo.assets import demo_adapters
from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.demo.reserved import DIGESTS
from loramux.server.demo.skills import adapter_skills, ask, base_skills, near_miss
from loramux.server.demo.wordings import ORDER_FRAMES, QUESTION_FRAMES, bare, expansions, varied, wordings

NAMES = ("order", "Order", "question", "Question")
FRAMES = (*ORDER_FRAMES, *QUESTION_FRAMES)
FROZEN = Path(__file__).parents[2] / "benchmarks/router_prompts.json"


def frozen() -> set[str]:
    """The words of every wording that the router is measured on."""
    kinds: dict[str, dict[str, list[str]]] = json.loads(FROZEN.read_text(encoding="utf-8"))
    return {bare(wording) for skills in kinds.values() for wordings in skills.values() for wording in wordings}


def known() -> Iterator[str]:
    """Every wording that is trained on, given as an example, or held out for development; reserved ones apart."""
    for part in ("skills", "near_misses", "held_out", "near_misses_held_out"):
        for patterns in wordings(part).values():
            for pattern in patterns:
                yield from expansions(pattern)


def test_the_digests_are_of_the_frozen_wordings() -> None:
    assert len(frozen()) == 232
    assert {hashlib.blake2b(words.encode(), digest_size=8).hexdigest() for words in frozen()} == DIGESTS


def test_no_wording_is_a_frozen_one() -> None:
    everything, kept = set(known()), frozen()
    assert len(everything) > 10_000
    assert sum(bare(wording) in kept for wording in everything) == 0


def test_no_frame_and_no_style_makes_a_frozen_one() -> None:
    kept, rng = frozen(), Random(1)
    within = {
        wording
        for wording in known()
        if any(bare(frame.format_map(dict.fromkeys(NAMES, wording[:-1]))) in kept for frame in FRAMES)
    }
    assert within  # else this test would show nothing: frames do meet frozen wordings, and `varied` turns them down
    assert not any(bare(varied(wording, rng)) in kept for wording in within for _ in range(400))


def test_no_example_is_a_frozen_one() -> None:
    kept, rng = frozen(), Random(2)
    prompts = [text for adapter in demo_adapters() for text in adapter.examples] + list(demo_base_examples())
    prompts += [ask(skill, rng, "train").prompt for skill in (*base_skills(), *adapter_skills()) for _ in range(100)]
    prompts += [near_miss(rng, "train").prompt for _ in range(200)]
    vocabulary = {word for wording in known() for word in re.findall(r"\w+", wording.lower())}
    words = [
        (prompt, word) for prompt in map(str.lower, prompts) for word in set(re.findall(r"\w+", prompt)) - vocabulary
    ]
    assert len(words) > 1500  # arguments, one or so to a prompt
    assert sum(bare(prompt.replace(word, "{x}")) in kept for prompt, word in words) == 0
