"""The ladder: which rung decides, for which candidates, and what it decides.

Rungs, best first: "scores" (a scorer trained on per-query scores), "examples" (the gallery of example prompts and
descriptions), "weights" (the adapters' own matrices). A rung covers the candidates that it knows something of. One rung
decides a query:

- The one that the request names. RouterError if it covers no candidate.
- Else, of scores and examples, the one that covers more of the candidates (scores on a tie), if that is at least half.
- Else the one of all three that covers most (the better on a tie).

Candidates that the rung does not cover are never chosen; the decision's reason names them. Scores of different rungs
have different units, so they are never compared with one another.

The answer is the base when no candidate's score reaches the threshold: the request's own; else for scores the base's
predicted score, for examples the gallery's calibrated one (while it is uncalibrated but the base has examples,
whichever of base and adapter is nearer), for weights none.
"""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from loramux.router.gallery import Gallery, GallerySnapshot, nearest_threshold
from loramux.router.interface import BASE, Floats, Scorer
from loramux.router.options import RouteOptions, RouterError
from loramux.router.sets import choose
from loramux.router.weights_only import WeightsScorer

Rung = Literal["scores", "examples", "weights"]

RUNGS: tuple[Rung, ...] = ("scores", "examples", "weights")
TEMPERATURE: Mapping[Rung, float] = {"scores": 0.1, "examples": 0.1, "weights": 0.5}  # in the units of their scores
_REMEDY: Mapping[Rung, str] = {
    "scores": "train a scorer on scores of these adapters, or use another policy",
    "examples": "upload the adapters with examples or a description, or use another policy",
    "weights": "no adapter has weights where the router looks, or none were given to it; use another policy",
}
_NAMED = 3  # uncovered candidates that a reason names


class Query(Protocol):
    """What a rung may ask for of a query; asked at most once per decision, and only for the rung that decides."""

    def embedding(self, encoder: str) -> Floats:
        """float32 [dim] by the encoder of that name."""
        ...

    def features(self, modules: Sequence[str]) -> Mapping[str, Floats]:
        """Inputs of these modules on the prompt: module -> float32 [tokens, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What serves the query, and why.

    `chosen` are (key, weight), heaviest first, weights multiples of 1/16 that sum to 1; empty is the base. `rung` is
    the rung that decided, "none" where there was nothing to decide. `scores` are the best candidates' (key, score),
    best first. `threshold` is the least score of a member, None where there was none. `abstained`: candidates were
    scored and none reached it. `milliseconds` run from the plan to the decision, encoding included.
    """

    chosen: tuple[tuple[str, float], ...]
    rung: str
    scores: tuple[tuple[str, float], ...]
    threshold: float | None
    abstained: bool
    reason: str
    milliseconds: float


@dataclass(frozen=True, slots=True)
class _Known:
    """What the policy knows at one moment."""

    scorer: Scorer | None = None
    scorer_encoder: str = ""
    forgotten: frozenset[str] = frozenset()
    gallery: Gallery | None = None
    gallery_encoder: str = ""
    weights: WeightsScorer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which rung will decide one query and what it needs for that; nothing that changes later affects it.

    `encoder` names the encoder of the embedding that is needed ("" if none is), `modules` the modules whose inputs
    are. Where both are empty, `decide()` needs nothing: the answer is the base.
    """

    rung: Rung | None
    candidates: tuple[str, ...]
    encoder: str
    modules: tuple[str, ...]
    options: RouteOptions
    note: str
    started: float
    max_set_size: int
    max_scores: int
    source: Scorer | GallerySnapshot | WeightsScorer | None

    def decide(
        self,
        embedding: Floats | None = None,
        features: Mapping[str, Floats] | None = None,
        responses: Mapping[str, float] | None = None,
    ) -> Decision:
        """The decision, from what the plan needs: an `embedding` [dim], or `features` (module -> [tokens, in]).

        `responses` are the weights rung's scores by candidate, where the engine has computed them already
        (`StackedScorer`). ValueError when what is needed is missing.
        """
        if self.rung is None:
            return self._decision((), (), None, self.note, abstained=False)
        values, threshold, basis = self._scores(embedding, features, responses)
        if self.options.threshold is not None:
            threshold, basis = self.options.threshold, "as requested"
        order = np.argsort(-values, kind="stable")
        order = order[np.isfinite(values[order])]
        ranked = values[order]
        shown = tuple((self.candidates[i], float(values[i])) for i in order[: self.max_scores])
        members = len(order) if threshold is None else int((ranked >= threshold).sum())
        if not members:
            why = f"no candidate has a score; {self.note}"
            if shown:
                below = f"the best score, {shown[0][1]:.4g} of {shown[0][0]}, is below the threshold {threshold:.4g}"
                why = f"{below} ({basis}); {self.note}"
            return self._decision((), shown, threshold, why, abstained=True)
        positions = choose(
            ranked[:members],
            temperature=self.options.temperature or TEMPERATURE[self.rung],
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            max_size=self.max_set_size,
        )
        chosen = tuple((self.candidates[order[i]], weight) for i, weight in positions)
        bar = "no threshold" if threshold is None else f"threshold {threshold:.4g}"
        why = f"best of {len(order)}; {bar} ({basis}); {self.note}"
        return self._decision(chosen, shown, threshold, why, abstained=False)

    def _scores(
        self,
        embedding: Floats | None,
        features: Mapping[str, Floats] | None,
        responses: Mapping[str, float] | None,
    ) -> tuple[Floats, float | None, str]:
        """(score of each candidate, threshold, where the threshold is from)."""
        if isinstance(self.source, WeightsScorer):
            basis = "weights alone cannot tell that none fits"
            if responses is not None:
                return np.asarray([responses.get(k, -np.inf) for k in self.candidates], np.float32), None, basis
            if features is None:
                raise ValueError("the weights rung needs features of the prompt")
            return self.source.score(features, self.candidates), None, basis
        if embedding is None:
            raise ValueError(f"the {self.rung} rung needs an embedding by {self.encoder}")
        row = np.asarray(embedding, dtype=np.float32).reshape(1, -1)
        if isinstance(self.source, GallerySnapshot):
            calibration, threshold = self.source.calibration, self.source.calibration.threshold
            basis = calibration.describe()
            likeness = self.source.base_likeness(row)
            if threshold is None and likeness is not None:
                threshold, basis = nearest_threshold(float(likeness[0])), f"the base is as near; {basis}"
            return self.source.score(row, self.candidates)[0], threshold, basis
        assert self.source is not None
        scored = dict(zip(self.source.candidates, self.source.score(row)[0].tolist(), strict=True))
        values = np.asarray([scored[key] for key in self.candidates], dtype=np.float32)
        if BASE in scored:
            return values, float(scored[BASE]), "the base's predicted score"
        return values, None, "the base has no predicted score"

    def _decision(
        self,
        chosen: tuple[tuple[str, float], ...],
        scores: tuple[tuple[str, float], ...],
        threshold: float | None,
        reason: str,
        *,
        abstained: bool,
    ) -> Decision:
        elapsed = (time.perf_counter() - self.started) * 1e3
        return Decision(chosen, self.rung or "none", scores, threshold, abstained, reason, elapsed)


class RouterPolicy:
    """What is known of the adapters, rung by rung, and the choice of the rung.

    Any thread may plan and decide at any time; changes are serialised and take effect for plans made afterwards.
    `max_set_size` bounds a set (the engine's bound), `max_scores` the scores that a decision shows.
    """

    def __init__(self, *, max_set_size: int = 8, max_scores: int = 10) -> None:
        if max_set_size < 1 or max_scores < 1:
            raise ValueError("max_set_size and max_scores must be at least 1")
        self._max_set_size = max_set_size
        self._max_scores = max_scores
        self._lock = threading.Lock()
        self._known = _Known()

    def use_scorer(self, scorer: Scorer | None, encoder: str = "") -> None:
        """The scores rung is this scorer over embeddings of that encoder; None takes it away.

        Candidates that were forgotten before count again: the scorer is taken to be trained on what is there now.
        Raises ValueError for a scorer without the name of its encoder.
        """
        _check_encoder(scorer, encoder)
        with self._lock:
            self._known = replace(self._known, scorer=scorer, scorer_encoder=encoder, forgotten=frozenset())

    def use_gallery(self, gallery: Gallery | None, encoder: str = "") -> None:
        """The examples rung is this gallery (its later changes count) over embeddings of that encoder; None: no rung.

        Raises ValueError for a gallery without the name of its encoder.
        """
        _check_encoder(gallery, encoder)
        with self._lock:
            self._known = replace(self._known, gallery=gallery, gallery_encoder=encoder)

    def use_weights(self, weights: WeightsScorer | None) -> None:
        """The weights rung is this scorer; None takes it away."""
        with self._lock:
            self._known = replace(self._known, weights=weights)

    def forget(self, key: str) -> None:
        """Removes an adapter from every rung. The scores rung ignores the key until it gets a new scorer."""
        with self._lock:
            known = self._known
            if known.gallery is not None:
                known.gallery.remove(key)
            weights = known.weights.without(key) if known.weights is not None else None
            self._known = replace(known, weights=weights, forgotten=known.forgotten | {key})

    def decide(self, query: Query, allowed: Sequence[str], options: RouteOptions | None = None) -> Decision:
        """The decision for a query among the adapters that its caller may use. Raises RouterError; see `plan`."""
        plan = self.plan(allowed, options)
        embedding = query.embedding(plan.encoder) if plan.encoder else None
        return plan.decide(embedding, query.features(plan.modules) if plan.modules else None)

    def plan(self, allowed: Sequence[str], options: RouteOptions | None = None) -> Plan:
        """Picks the rung for a query among the adapters that its caller may use; see the module.

        Raises RouterError for a candidate that is not allowed, a set larger than the engine takes, and a rung asked for
        by name that knows none of the candidates. An empty pool is the base, not an error.
        """
        started = time.perf_counter()
        options = options or RouteOptions()
        if options.top_k is not None and options.top_k > self._max_set_size:
            raise RouterError("top_k", f"is {options.top_k}, a set has at most {self._max_set_size} members")
        pool = _pool(allowed, options)
        known = self._known
        rungs = _rungs(known)
        covered = {name: tuple(filter(rung.keys.__contains__, pool)) for name, rung in rungs.items()}
        name = _pick(pool, covered, options)
        limits = (self._max_set_size, self._max_scores)
        if name is None:
            note = f"nothing is known of the {len(pool)} candidates" if pool else "there is no adapter to choose from"
            return Plan(None, (), "", (), options, note, started, *limits, None)
        rung = rungs[name]
        note = _coverage(name, pool, covered[name])
        return Plan(name, covered[name], rung.encoder, rung.modules, options, note, started, *limits, rung.source)


@dataclass(frozen=True, slots=True)
class _RungState:
    """One rung at one moment: what scores, the candidates it knows, and what it needs of a query."""

    source: Scorer | GallerySnapshot | WeightsScorer
    keys: Collection[str]
    encoder: str = ""
    modules: tuple[str, ...] = ()


def _check_encoder(rung: object | None, encoder: str) -> None:
    if rung is not None and not encoder:
        raise ValueError("encoder must name the encoder of the embeddings that this rung takes")


def _rungs(known: _Known) -> dict[Rung, _RungState]:
    """The rungs that there are, best first."""
    found: dict[Rung, _RungState] = {}
    if known.scorer is not None:
        keys = frozenset(known.scorer.candidates) - known.forgotten
        found["scores"] = _RungState(known.scorer, keys, encoder=known.scorer_encoder)
    if known.gallery is not None:
        snapshot = known.gallery.snapshot()
        found["examples"] = _RungState(snapshot, snapshot.slots, encoder=known.gallery_encoder)
    if known.weights is not None:
        found["weights"] = _RungState(known.weights, known.weights.factors, modules=known.weights.modules)
    return found


def _pool(allowed: Sequence[str], options: RouteOptions) -> tuple[str, ...]:
    """The candidates: those allowed, or those asked for, each of which must be allowed. Never the base."""
    if options.candidates is None:
        pool = dict.fromkeys(allowed)
        pool.pop(BASE, None)
        return tuple(pool)
    permitted = set(allowed)
    for key in options.candidates:
        if key not in permitted:
            raise RouterError("candidates", f"there is no adapter {key!r} that you may use")
    return tuple(dict.fromkeys(options.candidates))


def _pick(pool: Sequence[str], covered: Mapping[Rung, Sequence[str]], options: RouteOptions) -> Rung | None:
    """The rung that decides, by the module's rules; None where there is none and none was asked for."""
    if options.policy != "auto":
        if pool and not covered.get(options.policy):
            raise RouterError("policy", f"{options.policy!r} knows none of the candidates: {_REMEDY[options.policy]}")
        return options.policy if pool else None
    sizes = {rung: len(covered.get(rung, ())) for rung in RUNGS}
    best = max(RUNGS[:2], key=lambda rung: sizes[rung])
    if sizes[best] * 2 < len(pool):
        best = max(RUNGS, key=lambda rung: sizes[rung])
    return best if sizes[best] else None


def _coverage(rung: Rung, pool: Sequence[str], covered: Sequence[str]) -> str:
    """What the rung covers of the pool, in words, naming a few of those it does not."""
    if len(covered) == len(pool):
        return f"{rung} known of all {len(pool)} candidates"
    inside = set(covered)
    missing = [key for key in pool if key not in inside]
    named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    return f"{rung} known of {len(covered)} of {len(pool)} candidates, not considered: {named}"
