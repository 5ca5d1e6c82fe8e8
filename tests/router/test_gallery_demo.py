"""The gallery on the demo's skills with character n-grams: routing, hot-add, and "none of these"."""

from random import Random

import numpy as np
import pytest
from support.far_wordings import HELD_OUT, NEAR_HELD_OUT

from loramux.router.encoders.ngram import NgramEncoder
from loramux.router.gallery import Gallery
from loramux.router.interface import BASE, Floats
from loramux.server.demo.assets import demo_adapters
from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.demo.skills import Skill, adapter_skills, ask, base_skills, phrase

ENCODER = NgramEncoder()
NEAR_MISSES = {
    "reverse": ('Sort the letters of "{x}".', 'Read "{x}" from left to right.'),
    "double-letters": ('Triple every letter of "{x}".', 'Put a dash between the letters of "{x}".'),
    "caesar": ('Decrypt "{x}" with a Caesar cipher.', 'Put "{x}" into Morse code.'),
    "roman": ("Convert {x} to binary.", "How would a Greek write {x}?"),
    "add-ten": ("What is {x} plus twenty?", "Divide {x} by ten."),
    "pig-latin": ('Translate "{x}" to French.', 'Turn "{x}" into a rhyme.'),
    "number-words": ("How do you say {x} in German?", "Is the number {x} even?"),
    "no-vowels": ('Count the vowels in "{x}".', 'Drop the first letter of "{x}".'),
}


def fresh(skills: tuple[Skill, ...], n: int, *, held_out: bool) -> tuple[Floats, list[str]]:
    rng = Random(5)
    asked = [ask(skill, rng, "fresh", held_out=held_out) for skill in skills for _ in range(n)]
    return ENCODER.encode([q.prompt for q in asked]), [q.skills[0] for q in asked]


def near_misses(n: int) -> Floats:
    rng = Random(7)
    skills = {skill.name: skill for skill in adapter_skills()}
    texts = [
        phrase(wording, skills[name].argument(rng, "fresh"))
        for name, wordings in NEAR_MISSES.items()
        for wording in wordings
        for _ in range(n)
    ]
    return ENCODER.encode(texts)


def base_examples() -> Floats:
    return ENCODER.encode(demo_base_examples())


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    gallery = Gallery(ENCODER.dim)
    gallery.put_many([(a.name, ENCODER.encode(a.examples), "examples") for a in demo_adapters()])
    gallery.put(BASE, base_examples())
    return gallery


def auroc(positive: Floats, negative: Floats) -> float:
    """P(positive > negative) + P(equal) / 2."""
    difference = positive[:, None] - negative
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


@pytest.mark.parametrize("held_out", [False, True])
def test_fresh_prompts_reach_their_adapter(gallery: Gallery, held_out: bool) -> None:
    snapshot = gallery.snapshot()
    embeddings, wanted = fresh(adapter_skills(), 20, held_out=held_out)
    scores = snapshot.score(embeddings)
    chosen = [snapshot.candidates[i] for i in scores.argmax(axis=1)]
    assert np.mean([c == w for c, w in zip(chosen, wanted, strict=True)]) >= 0.98
    assert snapshot.calibration.threshold is not None
    assert (scores.max(axis=1) >= snapshot.calibration.threshold).mean() >= 0.98


def test_prompts_of_none_are_told_apart(gallery: Gallery) -> None:
    snapshot = gallery.snapshot()
    best = {
        "own": snapshot.score(fresh(adapter_skills(), 20, held_out=True)[0]).max(axis=1),
        "base": snapshot.score(fresh(base_skills(), 20, held_out=True)[0]).max(axis=1),
        "near": snapshot.score(near_misses(10)).max(axis=1),
    }
    assert auroc(best["own"], best["base"]) >= 0.99
    assert (auroc(best["own"], best["base"]) + auroc(best["own"], best["near"])) / 2 >= 0.95
    assert snapshot.calibration.threshold is not None
    assert (best["base"] >= snapshot.calibration.threshold).mean() <= 0.05


def test_far_wordings_and_near_misses_are_the_hard_half(gallery: Gallery) -> None:
    """Bars a little below what was measured: character n-grams know no synonyms."""
    snapshot, rng = gallery.snapshot(), Random(9)
    skills = {skill.name: skill for skill in (*adapter_skills(), *base_skills())}

    def scores(wordings: dict[str, str], names: list[str]) -> tuple[Floats, list[str]]:
        asked = [(name, line) for name in names for line in wordings[name].splitlines()]
        texts = [phrase(line, skills[name].argument(rng, "fresh")) for name, line in asked]
        return snapshot.score(ENCODER.encode(texts)), [name for name, _ in asked]

    own, wanted = scores(HELD_OUT, [skill.name for skill in adapter_skills()])
    chosen = [snapshot.candidates[i] for i in own.argmax(axis=1)]
    assert np.mean([c == w for c, w in zip(chosen, wanted, strict=True)]) >= 0.8
    base, _ = scores(HELD_OUT, [skill.name for skill in base_skills()])
    assert auroc(own.max(axis=1), base.max(axis=1)) >= 0.9
    near, _ = scores(NEAR_HELD_OUT, list(NEAR_HELD_OUT))
    assert auroc(own.max(axis=1), near.max(axis=1)) >= 0.65


def test_prompts_of_a_removed_adapter_score_lower() -> None:
    adapters = {a.name: ENCODER.encode(a.examples) for a in demo_adapters()}
    for left_out in ("caesar", "roman"):
        gallery = Gallery(ENCODER.dim)
        gallery.put_many([(k, rows, "examples") for k, rows in adapters.items() if k != left_out])
        gallery.put(BASE, base_examples())
        snapshot = gallery.snapshot()
        embeddings, names = fresh(adapter_skills(), 10, held_out=True)
        best = snapshot.score(embeddings).max(axis=1)
        own = np.asarray([name != left_out for name in names])
        assert auroc(best[own], best[~own]) >= 0.95


def test_a_ninth_adapter_is_routed_at_once(gallery: Gallery) -> None:
    wordings = ("Count the syllables of", "How many syllables has", "Number of syllables in", "Tell the syllables of")
    words = [f"w{i}ord" for i in range(20)]
    texts = [f'{wordings[i % 4]} "{word}".' for i, word in enumerate(words)]
    gallery.put("syllables", ENCODER.encode(texts[:10]))
    snapshot = gallery.snapshot()
    gallery.remove("syllables")
    scores = snapshot.score(ENCODER.encode(texts[10:]))
    assert {snapshot.candidates[i] for i in scores.argmax(axis=1)} == {"syllables"}
    embeddings, wanted = fresh(adapter_skills(), 10, held_out=True)
    chosen = [snapshot.candidates[i] for i in snapshot.score(embeddings).argmax(axis=1)]
    assert np.mean([c == w for c, w in zip(chosen, wanted, strict=True)]) >= 0.98
