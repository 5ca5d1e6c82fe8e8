"""The ladder: which rung decides, for which candidates, and what it decides.

Rungs, best first: "scores" (a scorer trained on per-query scores), "examples" (the gallery of example prompts and
descriptions), "weights" (the adapters' own matrices). A rung covers the candidates that it knows something of, and can
abstain where it has a threshold: scores by the base's predicted score, examples by the calibrated one (or, while that
is missing, by whether the base's own examples are nearer), weights by the base's own examples.

A request may name its rung, which then decides alone. RouterError if it covers no candidate. Else rungs decide one
after another, each among the candidates that no rung before it covers:

1. First, of scores and examples, the one that covers more of the candidates (scores on a tie), if it covers at least
   half of them or can abstain; else the one of all three that covers most (the better on a tie).
2. While nobody reaches the threshold, the other rungs follow, best first; a rung that cannot abstain never follows,
   because it would take every query that those before it left to the base.

So each adapter is judged by one rung, the best that knows it, and scores of different rungs, which have different
units, are never compared. A request's own `threshold` is in the units of one rung: with it the first decides alone.
Candidates that nothing covers are never chosen; the decision's reason names them. The answer is the base when no rung
chose.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from loramux.router.gallery import Gallery, GallerySnapshot, nearest_threshold
from loramux.router.interface import BASE, Floats, Scorer
from loramux.router.options import RouteOptions, RouterError
from loramux.router.scores.ridge import Ridge
from loramux.router.sets import choose
from loramux.router.units import unit_of
from loramux.router.weights_only import WeightsScorer

Rung = Literal["scores", "examples", "weights"]
Places = npt.NDArray[np.int64]

RUNGS: tuple[Rung, ...] = ("scores", "examples", "weights")
TEMPERATURE: Mapping[Rung, float] = {"scores": 0.1, "examples": 0.03, "weights": 0.5}  # in the units of their scores
"""The scores' is for what predicts scores of 0 to 1; `unit_of` brings other scorers' values to that.

The examples' is the likeliest (of 0.02 to 0.2) for held-out prompts of the demo's adapters in new wordings.
"""
_REMEDY: Mapping[Rung, str] = {
    "scores": "train a scorer on scores of these adapters, or use another policy",
    "examples": "upload the adapters with examples or a description, or use another policy",
    "weights": "no adapter has weights where the router looks, or none are read yet; use another policy",
}
LIGHT_CANDIDATES = 512  # with more, scoring them is work for a thread
_NAMED = 3  # uncovered candidates that a reason names
_POOLS = 16  # whose rungs are kept resolved


class Pool:
    """The adapters that a caller may use. Made once and kept while it holds: what follows from it is cached by it.

    `names` has each adapter once, never the base. `called` gives what the caller calls an adapter, for what it is told
    in words.
    """

    __slots__ = ("called", "known", "names")

    def __init__(self, names: Iterable[str], called: Callable[[str], str] = str) -> None:
        self.names = tuple(name for name in dict.fromkeys(names) if name != BASE)
        self.known = frozenset(self.names)
        self.called = called

    def without(self, gone: Collection[str]) -> "Pool":
        """The same but for some."""
        return Pool((name for name in self.names if name not in gone), self.called)


class Query(Protocol):
    """What a rung may ask for of a query; asked at most once per rung, and only for rungs that come to decide."""

    def embedding(self, encoder: str) -> Floats:
        """float32 [dim] by the encoder of that name."""
        ...

    def states(self, layers: Sequence[int]) -> Mapping[int, Floats]:
        """The prompt's states that enter these layers' attention: layer -> float32 [tokens, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What serves the query, and why.

    `chosen` are (key, weight), heaviest first, weights multiples of 1/16 that sum to 1; empty is the base. `rung` is
    the rung that decided (the first, where all left it to the base), "none" where there was nothing to decide.
    `scores` are the best candidates' (key, score) by that rung, best first. `threshold` is the least score of a member,
    None where there was none. `abstained`: candidates were scored and none reached it. `milliseconds` run from the
    plan to the decision, encoding included.
    """

    chosen: tuple[tuple[str, float], ...]
    rung: str
    scores: tuple[tuple[str, float], ...]
    threshold: float | None
    abstained: bool
    reason: str
    milliseconds: float


Source = Scorer | GallerySnapshot | WeightsScorer


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """One rung and the candidates that are its to judge: `names`, at `places` among what `source` scores."""

    rung: Rung
    source: Source
    names: tuple[str, ...]
    places: Places
    note: str
    encoder: str = ""
    layers: tuple[int, ...] = ()

    @property
    def temperature(self) -> float:
        """What divides the scores before the softmax where a request does not say."""
        unit = 1.0 if isinstance(self.source, GallerySnapshot | WeightsScorer) else unit_of(self.source)
        return TEMPERATURE[self.rung] * unit

    @property
    def is_light(self) -> bool:
        """See `Plan.is_light`. The gallery scores the stage's candidates, a scorer all of its own."""
        if isinstance(self.source, GallerySnapshot):
            return len(self.names) <= LIGHT_CANDIDATES
        return isinstance(self.source, Ridge) and len(self.source.candidates) <= LIGHT_CANDIDATES

    def score(self, embedding: Floats | None, states: Mapping[int, Floats] | None) -> "_Scores":
        """The scores of one query, from what the rung needs of it."""
        source = self.source
        if isinstance(source, WeightsScorer):
            if states is None:
                raise ValueError("the weights rung needs the prompt's states")
            threshold = source.threshold(self.places)
            basis = source.reference.describe() if threshold is None else source.describe()
            return _Scores(source.score_at(states, self.places), threshold, basis)
        if embedding is None:
            raise ValueError(f"the {self.rung} rung needs an embedding by {self.encoder}")
        return self.score_rows(np.asarray(embedding, dtype=np.float32).reshape(1, -1))[0]

    def score_rows(self, rows: Floats) -> "list[_Scores]":
        """The scores of queries by their embeddings [n, dim], in one product; ValueError where the rung takes none."""
        source = self.source
        if isinstance(source, WeightsScorer):
            raise ValueError("the weights rung takes no embeddings")
        if isinstance(source, GallerySnapshot):
            calibration, threshold = source.calibration, source.calibration.threshold
            basis, values = calibration.describe(), np.ascontiguousarray(source.score_at(rows, self.places))
            likeness = source.base_likeness(rows) if threshold is None else None
            if likeness is None:
                return [_Scores(row, threshold, basis) for row in values]
            basis = f"the base is as near; {basis}"
            return [
                _Scores(row, nearest_threshold(float(near)), basis) for row, near in zip(values, likeness, strict=True)
            ]
        values = np.asarray(source.score(rows), dtype=np.float32)
        if BASE not in source.candidates:
            return [_Scores(row[self.places], None, "the base has no predicted score") for row in values]
        base = source.candidates.index(BASE)
        return [_Scores(row[self.places], float(row[base]), "the base's predicted score") for row in values]

    def of_all(self) -> "_Stage":
        """The same rung over everything that its source scores."""
        count = self.source.used if isinstance(self.source, GallerySnapshot) else len(self.source.candidates)
        return replace(self, places=np.arange(count))


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """One query's score of each of a stage's candidates, the threshold, and where that is from."""

    values: Floats
    threshold: float | None
    basis: str


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which rungs will decide one query, and what the next one needs; nothing that changes later affects it.

    `encoder` names the encoder of the embedding that is needed ("" if none is), `layers` the layers whose states are.
    Where both are empty, `decide()` needs nothing: the answer is the base. After a decision, `after` gives the plan of
    the rung that follows, if one does.
    """

    stages: tuple[_Stage, ...]
    options: RouteOptions
    called: Callable[[str], str]
    note: str
    started: float
    max_set_size: int
    max_scores: int
    before: Decision | None = None

    @property
    def rung(self) -> Rung | None:
        """The rung that decides next."""
        return self.stages[0].rung if self.stages else None

    @property
    def candidates(self) -> tuple[str, ...]:
        """Those that it judges."""
        return self.stages[0].names if self.stages else ()

    @property
    def encoder(self) -> str:
        """See the class."""
        return self.stages[0].encoder if self.stages else ""

    @property
    def layers(self) -> tuple[int, ...]:
        """See the class."""
        return self.stages[0].layers if self.stages else ()

    @property
    def is_light(self) -> bool:
        """Whether `decide` is one product with a small matrix at most: the gallery or a ridge of few candidates."""
        return not self.stages or self.stages[0].is_light

    def after(self, decision: Decision) -> "Plan | None":
        """The plan that goes on where this one's `decision` left the query to the base; None when it stands."""
        if not decision.abstained or len(self.stages) < 2:
            return None
        return replace(self, stages=self.stages[1:], before=decision)

    def decide(self, embedding: Floats | None = None, states: Mapping[int, Floats] | None = None) -> Decision:
        """The decision, from what the plan needs: an `embedding` [dim], or `states` (layer -> [tokens, in]).

        ValueError when what is needed is missing.
        """
        if not self.stages:
            return self._decision((), (), None, self.note, abstained=False)
        return self._choose(self.stages[0].score(embedding, states))

    def _choose(self, found: _Scores) -> Decision:
        """The next rung's decision by its scores."""
        stage, values, threshold, basis = self.stages[0], found.values, found.threshold, found.basis
        if self.options.threshold is not None:
            threshold, basis = self.options.threshold, "as requested"
        finite = np.isfinite(values)
        members = int((finite if threshold is None else finite & (values >= threshold)).sum())
        top_p = self.options.top_p
        order = best_places(values, max(self.max_scores, members if top_p is not None else self.max_set_size))
        shown = tuple((stage.names[i], float(values[i])) for i in order[: self.max_scores])
        if not members:
            why = "no candidate has a score"
            if shown:
                best = f"{shown[0][1]:.4g} of {self.called(shown[0][0])}"
                why = f"the best score, {best}, is below the threshold {threshold:.4g} ({basis})"
            return self._decision((), shown, threshold, f"{why}; {stage.note}", abstained=True)
        positions = choose(
            values[order[:members]],
            temperature=self.options.temperature or stage.temperature,
            top_k=self.options.top_k,
            top_p=top_p,
            max_size=self.max_set_size,
        )
        chosen = tuple((stage.names[order[i]], weight) for i, weight in positions)
        bar = "no threshold" if threshold is None else f"threshold {threshold:.4g}"
        why = f"best of {int(finite.sum())}; {bar} ({basis}); {stage.note}"
        return self._decision(chosen, shown, threshold, why, abstained=False)

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
        if self.before is not None:
            if abstained:
                return replace(self.before, reason=f"{self.before.reason}; {self.rung}: {reason}", milliseconds=elapsed)
            reason = f"{reason}; {self.before.rung}: {self.before.reason}"
        return Decision(chosen, self.rung or "none", scores, threshold, abstained, reason, elapsed)


def decide_together(plans: Sequence[Plan], rows: Sequence[Floats]) -> list[Decision]:
    """`plan.decide(row)` of each plan with its embedding [dim]: one product for all that one rung's state judges.

    Many candidates are read from memory once for all of them, which is most of what one costs. ValueError for a plan
    whose next rung takes no embedding.
    """
    groups: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        if not plan.encoder:
            raise ValueError("only plans that need an embedding are decided together")
        groups.setdefault(id(plan.stages[0].source), []).append(i)
    decisions: dict[int, Decision] = {}
    for members in groups.values():
        together = np.stack([np.asarray(rows[i], dtype=np.float32) for i in members])
        stages = [plans[i].stages[0] for i in members]
        if all(stage is stages[0] for stage in stages):
            found = stages[0].score_rows(together)
        else:  # of several pools, or restricted by their requests
            wide = stages[0].of_all().score_rows(together)
            found = [replace(s, values=s.values[stage.places]) for s, stage in zip(wide, stages, strict=True)]
        decisions.update((i, plans[i]._choose(scores)) for i, scores in zip(members, found, strict=True))
    return [decisions[i] for i in range(len(plans))]


def best_places(values: Floats, count: int) -> Places:
    """Places of the `count` highest finite values [n], highest first, of equals the first: O(n) and a short sort."""
    places = np.flatnonzero(np.isfinite(values))
    if count < len(places):
        kept = values[places]
        places = places[kept >= np.partition(kept, len(kept) - count)[len(kept) - count]]
    return np.asarray(places[np.argsort(-values[places], kind="stable")][:count], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What the policy knows at one moment, but for what the gallery learns."""

    scorer: Scorer | None = None
    scorer_encoder: str = ""
    forgotten: frozenset[str] = frozenset()
    gallery: Gallery | None = None
    gallery_encoder: str = ""
    weights: WeightsScorer | None = None
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class _RungState:
    """One rung at one moment: what scores, the place of each candidate that it knows, and what it needs of a query."""

    source: Source
    places: Mapping[str, int]
    can_abstain: bool
    encoder: str = ""
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Rungs:
    """The rungs that there are, best first, and what they mean for pools that have been asked about."""

    known: _Known
    snapshot: GallerySnapshot | None
    states: Mapping[Rung, _RungState]
    resolved: dict[int, tuple[Pool, tuple[_Stage, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, known: _Known, snapshot: GallerySnapshot | None) -> "_Rungs":
        found: dict[Rung, _RungState] = {}
        if known.scorer is not None:
            names = known.scorer.candidates
            places = {n: i for i, n in enumerate(names) if n != BASE and n not in known.forgotten}
            found["scores"] = _RungState(known.scorer, places, BASE in names, encoder=known.scorer_encoder)
        if snapshot is not None:
            can_abstain = snapshot.calibration.threshold is not None or snapshot.knows_base
            found["examples"] = _RungState(snapshot, snapshot.slots, can_abstain, encoder=known.gallery_encoder)
        if known.weights is not None:
            weights = known.weights
            places = {n: i for n, i in weights.places.items() if n not in known.hidden}
            found["weights"] = _RungState(weights, places, weights.reference.own, layers=weights.layers)
        return cls(known, snapshot, found)

    def stages(self, pool: Pool) -> tuple[_Stage, ...]:
        """The rungs that decide for a pool, in order; kept, because pools recur and are large."""
        kept = self.resolved.get(id(pool))
        if kept is not None:
            return kept[1]
        found = _stages(pool, self.states)
        if len(self.resolved) >= _POOLS:
            self.resolved.clear()
        self.resolved[id(pool)] = (pool, found)  # the pool is kept with it, so that nobody gets its identity
        return found


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
        self._rungs = _Rungs(self._known, None, {})

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

    def use_weights(self, weights: WeightsScorer | None, hidden: Iterable[str] = ()) -> None:
        """The weights rung is this scorer, but for the adapters `hidden`; None takes it away."""
        with self._lock:
            self._known = replace(self._known, weights=weights, hidden=frozenset(hidden))

    def forget(self, key: str) -> None:
        """Removes an adapter from every rung. Scores and weights ignore the key until they get a new scorer."""
        with self._lock:
            known = self._known
            self._known = replace(known, forgotten=known.forgotten | {key}, hidden=known.hidden | {key})
        if known.gallery is not None:
            known.gallery.remove(key)  # it may fit anew, which nobody who changes another rung waits for

    def decide(self, query: Query, allowed: Pool | Sequence[str], options: RouteOptions | None = None) -> Decision:
        """The decision for a query among the adapters that its caller may use. Raises RouterError; see `plan`."""
        plan: Plan | None = self.plan(allowed, options)
        while plan is not None:
            embedding = query.embedding(plan.encoder) if plan.encoder else None
            decision = plan.decide(embedding, query.states(plan.layers) if plan.layers else None)
            plan = plan.after(decision)
        return decision

    def plan(self, allowed: Pool | Sequence[str], options: RouteOptions | None = None) -> Plan:
        """Picks the rungs for a query among the adapters that its caller may use; see the module.

        A `Pool` that is given again costs nothing while nothing is learnt. Raises RouterError for a candidate that is
        not allowed, a set larger than the engine takes, and a rung asked for by name that knows none of the
        candidates. An empty pool is the base, not an error.
        """
        started = time.perf_counter()
        options = options or RouteOptions()
        if options.top_k is not None and options.top_k > self._max_set_size:
            raise RouterError("top_k", f"is {options.top_k}, a set has at most {self._max_set_size} members")
        pool = allowed if isinstance(allowed, Pool) else Pool(allowed)
        rungs = self._current()
        if options.candidates is not None:
            pool = _restricted(pool, options.candidates)
            stages = _stages(pool, rungs.states)
        else:
            stages = rungs.stages(pool)
        if options.policy != "auto":
            stages = _named(options.policy, pool, rungs.states)
        elif options.threshold is not None:
            stages = stages[:1]
        note = "" if stages else "there is no adapter to choose from"
        if not stages and pool.names:
            note = f"nothing is known of the {len(pool.names)} candidates"
        return Plan(stages, options, pool.called, note, started, self._max_set_size, self._max_scores)

    def _current(self) -> _Rungs:
        """The rungs as they are now; made anew only when something was learnt."""
        known = self._known
        snapshot = None if known.gallery is None else known.gallery.snapshot()
        rungs = self._rungs
        if rungs.known is not known or rungs.snapshot is not snapshot:
            self._rungs = rungs = _Rungs.of(known, snapshot)
        return rungs


def _check_encoder(rung: object | None, encoder: str) -> None:
    if rung is not None and not encoder:
        raise ValueError("encoder must name the encoder of the embeddings that this rung takes")


def _restricted(pool: Pool, candidates: Sequence[str]) -> Pool:
    """The candidates that a request asks for, each of which must be in its caller's pool."""
    for key in candidates:
        if key not in pool.known:
            raise RouterError("candidates", f"there is no adapter {pool.called(key)!r} that you may use")
    return Pool(candidates, pool.called)


def _stages(pool: Pool, states: Mapping[Rung, _RungState]) -> tuple[_Stage, ...]:
    """The rungs that decide for a pool, in order, by the module's rules."""
    covered = {rung: [name for name in pool.names if name in state.places] for rung, state in states.items()}
    sizes = {rung: len(covered.get(rung, ())) for rung in RUNGS}
    first = max(RUNGS[:2], key=lambda rung: sizes[rung])
    if sizes[first] * 2 < len(pool.names) and not (sizes[first] and states[first].can_abstain):
        first = max(RUNGS, key=lambda rung: sizes[rung])
    if not sizes[first]:
        return ()
    order = [first, *(rung for rung in RUNGS if rung != first and rung in states and states[rung].can_abstain)]
    if not states[first].can_abstain:
        order = [first]
    left: dict[str, None] = dict.fromkeys(pool.names)
    shares: list[tuple[Rung, list[str]]] = []
    for rung in order:
        names = [name for name in covered[rung] if name in left]
        for name in names:
            del left[name]
        if names:
            shares.append((rung, names))
    note = _coverage(pool, shares, list(left))
    return tuple(_stage(rung, states[rung], names, note if i == 0 else "") for i, (rung, names) in enumerate(shares))


def _named(rung: Rung, pool: Pool, states: Mapping[Rung, _RungState]) -> tuple[_Stage, ...]:
    """The rung that a request names, alone."""
    names = [name for name in pool.names if name in states[rung].places] if rung in states else []
    if not names:
        if pool.names:
            raise RouterError("policy", f"{rung!r} knows none of the candidates: {_REMEDY[rung]}")
        return ()
    left = [name for name in pool.names if name not in states[rung].places]
    return (_stage(rung, states[rung], names, _coverage(pool, [(rung, names)], left)),)


def _stage(rung: Rung, state: _RungState, names: Sequence[str], note: str) -> _Stage:
    places = np.fromiter(map(state.places.__getitem__, names), np.int64, len(names))
    note = note or f"{rung} known of {len(names)} candidates that no better rung knows"
    return _Stage(rung, state.source, tuple(names), places, note, state.encoder, state.layers)


def _coverage(pool: Pool, shares: Sequence[tuple[Rung, Sequence[str]]], left: Sequence[str]) -> str:
    """What the first rung covers of the pool, in words, naming a few of those that none does."""
    (rung, names), size = shares[0], len(pool.names)
    if len(names) == size:
        return f"{rung} known of all {size} candidates"
    said = f"{rung} known of {len(names)} of {size} candidates"
    for later, others in shares[1:]:
        said += f", {later} of {len(others)} more"
    if not left:
        return said
    return (
        f"{said}, not considered: {', '.join(map(pool.called, left[:_NAMED]))}{', ...' if len(left) > _NAMED else ''}"
    )
