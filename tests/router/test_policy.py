"""The ladder: which rung decides, among whom, and what its decision says."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.gallery import Gallery
from loramux.router.interface import BASE, Floats
from loramux.router.options import RouteOptions, RouterError
from loramux.router.policy import LIGHT_CANDIDATES, Decision, Pool, RouterPolicy, best_places, decide_together
from loramux.router.scores.dataset import ScoredQuery, ScoreTable, build_table
from loramux.router.scores.ensemble import Ensemble
from loramux.router.scores.knn import Neighbours
from loramux.router.scores.ridge import Ridge
from loramux.router.scores.routerdc import RouterDC
from loramux.router.units import unit_of
from loramux.router.weights_only import AdapterFactors, Reference, WeightsScorer
from loramux.server.api.auto.scoring import Restricted

DIM = 8
MODULE = "model.layers.0.self_attn.q_proj"
AXES = np.eye(DIM, dtype=np.float32)


class TableScorer:
    """Scores that do not depend on the query."""

    def __init__(self, table: Mapping[str, float]) -> None:
        self.candidates = tuple(table)
        self._row = np.asarray(list(table.values()), np.float32)

    def score(self, embeddings: Floats) -> Floats:
        return np.repeat(self._row[None], len(embeddings), axis=0)


class AskedQuery:
    """A query along one axis that notes what it is asked for."""

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis
        self.asked: list[object] = []

    def embedding(self, encoder: str) -> Floats:
        self.asked.append(encoder)
        return AXES[self.axis]

    def states(self, layers: Sequence[int]) -> Mapping[int, Floats]:
        self.asked.append(tuple(layers))
        return dict.fromkeys(layers, 3 * AXES[self.axis][None])


def gallery(axes: Mapping[str, int], examples: int = 4) -> Gallery:
    made = Gallery(DIM)
    noise = np.random.default_rng(0).standard_normal((len(axes), examples, DIM)).astype(np.float32) * 0.05
    made.put_many([(key, AXES[axis] + noise[i], "examples") for i, (key, axis) in enumerate(axes.items())])
    return made


def weights(axes: Mapping[str, int], *, own: bool = False) -> WeightsScorer:
    noise = np.random.default_rng(0).standard_normal((20, 4, DIM)).astype(np.float32)
    reference = Reference.fit([{0: rows} for rows in noise], own=own)
    found = {}
    for key, axis in axes.items():
        A = torch.from_numpy(np.concatenate([AXES[axis : axis + 1], 0.1 * AXES]))
        made = AdapterFactors.of({MODULE: ModuleWeights(A, torch.eye(DIM + 1), 1.0)}, reference)
        assert made is not None
        found[key] = made
    return WeightsScorer(reference).with_adapters(found)


def options(**values: Any) -> RouteOptions:
    return RouteOptions.from_mapping(values)


@pytest.fixture
def policy() -> RouterPolicy:
    """Scores of a, b and the base; examples of a, b, c; weights of all four."""
    made = RouterPolicy(max_set_size=3)
    made.use_scorer(TableScorer({"a": 0.4, "b": 0.7, BASE: 0.5}), "scorer's")
    made.use_gallery(gallery({"a": 0, "b": 1, "c": 2}), "gallery's")
    made.use_weights(weights({"a": 0, "b": 1, "c": 2, "d": 3}))
    return made


@pytest.mark.parametrize(
    ("allowed", "rung"),
    [
        ("a", "scores"),
        ("ab", "scores"),  # both cover all: the better
        ("abc", "examples"),  # examples cover more
        ("abcd", "examples"),
        ("abd", "scores"),  # a tie at two thirds
        ("ad", "scores"),  # half is enough
        ("cd", "examples"),
        ("d", "weights"),
        ("x", "none"),
        ("", "none"),
    ],
)
def test_the_ladder(policy: RouterPolicy, allowed: str, rung: str) -> None:
    query = AskedQuery(0)
    decision = policy.decide(query, list(allowed))
    assert decision.rung == rung
    wanted = {"scores": ["scorer's"], "examples": ["gallery's"], "weights": [(0,)], "none": []}
    assert query.asked == wanted[rung]
    assert {key for key, _ in decision.scores} <= set(allowed)


def test_weights_decide_where_the_better_rungs_know_less_than_half(policy: RouterPolicy) -> None:
    policy.use_scorer(None)
    policy.use_gallery(gallery({"a": 0}), "gallery's")
    decision = policy.decide(AskedQuery(3), list("abcd"))
    assert (decision.rung, decision.chosen) == ("weights", (("d", 1.0),))


@pytest.mark.parametrize("rung", ["scores", "examples", "weights"])
def test_a_rung_can_be_named(policy: RouterPolicy, rung: str) -> None:
    assert policy.decide(AskedQuery(1), ["a", "b"], options(policy=rung)).rung == rung
    assert policy.decide(AskedQuery(1), ["a", "b"], options(policy=rung)).chosen == (("b", 1.0),)


@pytest.mark.parametrize(("rung", "allowed"), [("scores", "cd"), ("examples", "d"), ("weights", "x")])
def test_a_named_rung_without_data_is_an_error(policy: RouterPolicy, rung: str, allowed: str) -> None:
    with pytest.raises(
        RouterError, match=f"policy: '{rung}' knows none of the candidates: .*use another policy"
    ) as info:
        policy.decide(AskedQuery(), list(allowed), options(policy=rung))
    assert info.value.field == "policy"
    with pytest.raises(RouterError, match="knows none"):
        RouterPolicy().decide(AskedQuery(), ["a"], options(policy=rung))


def test_an_empty_pool_is_the_base_whatever_is_asked(policy: RouterPolicy) -> None:
    for name in ("auto", "scores", "examples", "weights"):
        decision = policy.decide(AskedQuery(), [], options(policy=name))
        assert (decision.chosen, decision.rung, decision.abstained) == ((), "none", False)
        assert decision.reason == "there is no adapter to choose from"
    assert "nothing is known of the 2" in policy.decide(AskedQuery(), ["x", "y"]).reason


def test_uncovered_candidates_are_named_and_never_chosen(policy: RouterPolicy) -> None:
    decision = policy.decide(AskedQuery(3), ["a", "b", "c", "d"], options(threshold=-9))
    assert "d" not in dict(decision.scores)
    assert "examples known of 3 of 4 candidates, not considered: d" in decision.reason
    assert "known of all 2 candidates" in policy.decide(AskedQuery(), ["a", "b"]).reason


def test_only_allowed_candidates_are_scored(policy: RouterPolicy) -> None:
    for rung in ("scores", "examples", "weights"):
        decision = policy.decide(AskedQuery(1), ["a", BASE], options(policy=rung, threshold=-9))
        assert [key for key, _ in decision.scores] == ["a"]
        decision = policy.decide(AskedQuery(1), ["a", "b"], options(policy=rung, threshold=-9, candidates=["a"]))
        assert decision.chosen == (("a", 1.0),)


def test_the_scores_rung_answers_with_the_base_when_the_base_scores_best(policy: RouterPolicy) -> None:
    decision = policy.decide(AskedQuery(), ["a"])
    assert (decision.chosen, decision.abstained, decision.threshold) == ((), True, 0.5)
    assert decision.scores == (("a", pytest.approx(0.4)),)
    assert "below the threshold 0.5 (the base's predicted score)" in decision.reason
    assert policy.decide(AskedQuery(), ["a"], options(threshold=0.3)).chosen == (("a", 1.0),)
    policy.use_scorer(TableScorer({"a": -5.0}), "e")
    assert policy.decide(AskedQuery(), ["a"]).chosen == (("a", 1.0),)


def test_the_examples_rung_uses_the_calibrated_threshold() -> None:
    policy = RouterPolicy()
    made = gallery({"a": 0, "b": 1, "c": 2}, examples=10)
    policy.use_gallery(made, "e")
    decision = policy.decide(AskedQuery(0), ["a", "b", "c"])
    assert decision.chosen == (("a", 1.0),)
    assert decision.threshold == made.snapshot().calibration.threshold
    away = policy.decide(AskedQuery(6), ["a", "b", "c"])
    assert (away.chosen, away.abstained) == ((), True)
    assert "calibrated on 30 held-out examples" in away.reason


def test_uncalibrated_examples_say_so_and_take_the_nearer_of_base_and_adapter() -> None:
    policy = RouterPolicy()
    made = gallery({"a": 0, "b": 1}, examples=2)
    policy.use_gallery(made, "e")
    decision = policy.decide(AskedQuery(6), ["a", "b"])
    assert decision.threshold is None
    assert len(decision.chosen) == 1
    assert "uncalibrated" in decision.reason
    made.put(BASE, AXES[5:7])
    assert policy.decide(AskedQuery(6), ["a", "b"]).chosen == ()
    assert policy.decide(AskedQuery(1), ["a", "b"]).chosen == (("b", 1.0),)


def test_sets(policy: RouterPolicy) -> None:
    pair = policy.decide(AskedQuery(), ["a", "b"], options(policy="scores", top_k=2, threshold=0, temperature=0.3))
    assert [key for key, _ in pair.chosen] == ["b", "a"]
    assert pair.chosen[0][1] == round(16 / (1 + np.exp(-1))) / 16
    everything = options(policy="weights", top_p=1.0, temperature=1e6)
    chosen = policy.decide(AskedQuery(), list("abcd"), everything).chosen
    assert (chosen[0], [weight for _, weight in chosen]) == (("a", 6 / 16), [6 / 16, 5 / 16, 5 / 16])
    both = options(policy="weights", top_p=1.0, top_k=2, temperature=1e6)
    assert len(policy.decide(AskedQuery(), list("abcd"), both).chosen) == 2
    one = options(policy="scores", top_k=2)  # a is below the base's score: every member must pass
    assert policy.decide(AskedQuery(), ["a", "b"], one).chosen == (("b", 1.0),)


def test_sets_are_the_same_whatever_the_scorers_units() -> None:
    """An ensemble of f and f over their scales s and t is (1/s + 1/t) f."""
    plain = TableScorer({"a": 0.5, "b": 0.4, "c": 0.35, BASE: 0.0})
    mixed = Ensemble((plain, plain), (0.1, 0.04))
    found = []
    for scorer in (plain, mixed, Restricted.without(mixed, ["c"])):
        policy = RouterPolicy()
        policy.use_scorer(scorer, "e")
        found.append(policy.decide(AskedQuery(), ["a", "b"], options(top_k=2)).chosen)
    assert found[0] == (("a", 12 / 16), ("b", 4 / 16))  # e / (e + 1) = 0.73
    assert found[1:] == found[:1] * 2
    head = RouterDC(("a", "b"), AXES[:2], None, 0.5)
    assert unit_of(head) == 4  # from -2 to 2
    assert unit_of(Ensemble((head, TableScorer({"a": 1.0, "b": 0.0})), (2.0, 0.5))) == 4


def test_scores_are_shown_best_first_and_bounded() -> None:
    policy = RouterPolicy(max_scores=3)
    policy.use_scorer(TableScorer({str(i): float(i % 7) for i in range(20)}), "e")
    decision = policy.decide(AskedQuery(), [str(i) for i in range(20)])
    assert decision.scores == (("6", 6.0), ("13", 6.0), ("5", 5.0))


def test_candidates_without_a_finite_score_are_never_chosen() -> None:
    policy = RouterPolicy()
    policy.use_scorer(TableScorer({"a": float("-inf"), "b": float("nan"), "c": -3.0}), "e")
    assert policy.decide(AskedQuery(), ["a", "b", "c"]).scores == (("c", -3.0),)
    decision = policy.decide(AskedQuery(), ["a", "b"])
    assert (decision.chosen, decision.abstained) == ((), True)
    assert "no candidate has a score" in decision.reason


def test_an_embedding_of_no_numbers_is_answered_by_the_base() -> None:
    policy = RouterPolicy()
    policy.use_gallery(gallery({"a": 0, "b": 1}), "e")
    decision = policy.plan(["a", "b"]).decide(np.full(DIM, np.nan, np.float32))
    assert (decision.chosen, decision.scores, decision.abstained) == ((), (), True)


def test_a_forgotten_adapter_is_in_no_rung(policy: RouterPolicy) -> None:
    policy.forget("b")
    for rung in ("scores", "examples", "weights"):
        decision = policy.decide(AskedQuery(1), ["a", "b"], options(policy=rung, threshold=-9))
        assert [key for key, _ in decision.scores] == ["a"]
    policy.use_scorer(TableScorer({"b": 1.0}), "e")
    assert policy.decide(AskedQuery(1), ["b"]).chosen == (("b", 1.0),)
    RouterPolicy().forget("anything")


def test_a_plan_is_not_touched_by_later_changes(policy: RouterPolicy) -> None:
    plan = policy.plan(["a", "b", "c"])
    policy.forget("c")
    policy.use_gallery(None)
    assert (plan.rung, plan.encoder, plan.layers) == ("examples", "gallery's", ())
    assert plan.decide(AXES[2]).chosen == (("c", 1.0),)


def test_a_plan_without_what_it_needs_is_refused(policy: RouterPolicy) -> None:
    with pytest.raises(ValueError, match="needs an embedding by gallery's"):
        policy.plan(["a", "b", "c"]).decide()
    with pytest.raises(ValueError, match="needs the prompt's states"):
        policy.plan(["d"]).decide(AXES[0])


def test_a_rung_that_left_the_query_to_the_base_is_followed_by_the_others(policy: RouterPolicy) -> None:
    """Scores turn `a` down, the examples do not know `d`, whose weights answer to the query."""
    policy.use_gallery(gallery({"b": 1, "c": 2, "e": 4}, examples=10), "gallery's")
    policy.use_weights(weights({"a": 0, "b": 1, "c": 2, "d": 3}, own=True))
    policy.use_scorer(TableScorer({"a": 0.4, "b": 0.3, BASE: 0.5}), "scorer's")
    query = AskedQuery(3)
    decision = policy.decide(query, list("abcd"))
    assert (decision.rung, decision.chosen) == ("weights", (("d", 1.0),))
    assert query.asked == ["scorer's", "gallery's", (0,)]
    assert [key for key, _ in decision.scores] == ["d"]  # the others are not its to judge
    assert "weights known of 1 candidates that no better rung knows" in decision.reason
    assert "scores: the best score, 0.4 of a, is below the threshold" in decision.reason
    stays = policy.decide(AskedQuery(6), list("abcd"))
    assert (stays.rung, stays.chosen, stays.abstained) == ("scores", (), True)
    assert [key for key, _ in stays.scores] == ["a", "b"]
    for word in ("examples: the best score", "weights: the best score"):
        assert word in stays.reason
    assert policy.decide(AskedQuery(2), list("abcd")).chosen == (("c", 1.0),)
    assert policy.decide(AskedQuery(3), list("abcd"), options(threshold=0.45)).rung == "scores"  # decides alone


def test_a_rung_that_cannot_abstain_never_follows(policy: RouterPolicy) -> None:
    policy.use_gallery(gallery({"a": 0, "b": 1, "c": 2}, examples=10), "gallery's")
    policy.use_scorer(None)
    decision = policy.decide(AskedQuery(3), list("abcd"))  # these weights have no examples of the base
    assert (decision.rung, decision.chosen) == ("examples", ())
    assert "not considered: d" in decision.reason


def test_weights_leave_the_base_its_own_where_its_examples_are_known(policy: RouterPolicy) -> None:
    policy.use_weights(weights({"a": 0, "d": 3}, own=True))
    decision = policy.decide(AskedQuery(5), ["d"])
    assert (decision.rung, decision.chosen, decision.abstained) == ("weights", (), True)
    assert "reached by 20% of the 20 examples of the base" in decision.reason
    assert policy.decide(AskedQuery(3), ["d"]).chosen == (("d", 1.0),)
    policy.use_weights(weights({"d": 3}))
    assert "cannot tell that none fits" in policy.decide(AskedQuery(5), ["d"]).reason


def test_hidden_adapters_are_not_in_the_weights_rung(policy: RouterPolicy) -> None:
    policy.use_weights(weights({"c": 2, "d": 3}), hidden=["d"])
    assert policy.decide(AskedQuery(3), ["d"]).rung == "none"
    policy.use_weights(weights({"c": 2, "d": 3}))
    assert policy.decide(AskedQuery(3), ["d"]).rung == "weights"


def test_a_pool_that_recurs_is_resolved_once_until_something_is_learnt(policy: RouterPolicy) -> None:
    pool = Pool(iter(["a", "b", BASE, "a", "c"]))
    assert pool.names == ("a", "b", "c")
    first = policy.plan(pool)
    assert policy.plan(pool).stages is first.stages
    assert policy.plan(Pool(pool.names)).stages is not first.stages
    policy.forget("c")
    assert policy.plan(pool).candidates == ("a", "b")
    for size in range(40):  # kept pools are bounded
        policy.plan(Pool([str(size)]))
    assert policy.plan(pool).candidates == ("a", "b")


def test_the_best_places_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 3, 10, 99, 200):
        values = np.round(rng.normal(size=100), 1).astype(np.float32)  # many ties
        values[rng.integers(0, 100, 10)] = np.nan
        values[5] = -np.inf
        order = np.argsort(-values, kind="stable")
        expected = order[np.isfinite(values[order])][:count]
        np.testing.assert_array_equal(best_places(values, count), expected)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"policy": "best"}, "policy"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": "0.5"}, "top_p"),
        ({"threshold": float("nan")}, "threshold"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"candidates": []}, "candidates"),
        ({"candidates": "a"}, "candidates"),
        ({"candidates": ["a", 1]}, "candidates"),
        ({"candidates": [""]}, "candidates"),
        ({"candidates": ["stranger"]}, "candidates"),
        ({"top_k": 4}, "top_k"),
        ({"topk": 4}, "topk"),
    ],
)
def test_impossible_options_name_the_field(policy: RouterPolicy, values: dict[str, Any], field: str) -> None:
    with pytest.raises(RouterError) as info:
        policy.decide(AskedQuery(), ["a", "b"], options(**values))
    assert info.value.field == field
    assert str(info.value).startswith(f"{field}: ")


def test_settings_are_checked() -> None:
    for settings in ({"max_set_size": 0}, {"max_scores": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            RouterPolicy(**settings)
    for use in (RouterPolicy().use_scorer, RouterPolicy().use_gallery):
        with pytest.raises(ValueError, match="encoder must name"):
            use(object())  # type: ignore[arg-type]


def test_decisions_while_adapters_come_and_go(policy: RouterPolicy) -> None:
    made = gallery({"a": 0, "b": 1, "c": 2})
    policy.use_scorer(None)
    policy.use_gallery(made, "e")
    decisions: list[Decision] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def decide() -> None:
        try:
            while not stop.is_set():
                decisions.append(policy.decide(AskedQuery(1), ["a", "b", "c", "e"], options(threshold=-9)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=decide) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(40):
        made.put("e", AXES[4:5] + 0.01 * i)
        policy.forget("e")
    policy.forget("c")
    after = policy.decide(AskedQuery(2), ["a", "b", "c"], options(threshold=-9))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert decisions
    assert {d.chosen for d in decisions} == {(("b", 1.0),)}
    assert "c" not in dict(after.scores)


FEW = [f"a{i}" for i in range(3)]
MANY = [f"a{i}" for i in range(LIGHT_CANDIDATES + 1)]


def table(names: list[str]) -> ScoreTable:
    rows = [ScoredQuery(f"query {axis}", dict.fromkeys(names, axis / DIM)) for axis in range(DIM)]
    return build_table(rows, AXES)


@pytest.mark.parametrize(("names", "light"), [(FEW, True), (MANY, False)])
def test_products_with_small_matrices_are_light(names: list[str], light: bool) -> None:
    ridge = Ridge.fit(table(names), 1.0)
    policy = RouterPolicy()
    policy.use_scorer(ridge, "e")
    assert policy.plan(names).is_light is light
    assert policy.plan(FEW).is_light is light  # a scorer scores all that it knows
    for heavy in (
        Neighbours.fit(table(names), 3, 0.1),
        Ensemble((ridge,), (1.0,)),
        TableScorer(dict.fromkeys(names, 1.0)),
    ):
        policy.use_scorer(heavy, "e")
        assert not policy.plan(FEW).is_light
    policy.use_scorer(None)
    policy.use_gallery(gallery(dict.fromkeys(names, 0), examples=1), "e")
    assert policy.plan(names).is_light is light
    assert policy.plan(FEW).is_light


def test_weights_are_not_light_and_nothing_is() -> None:
    policy = RouterPolicy()
    policy.use_weights(weights({"a": 0}))
    assert not policy.plan(["a"]).is_light
    assert policy.plan([]).is_light
    assert policy.plan(["unknown"]).is_light


def test_the_other_rungs_change_while_the_gallery_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    removing, go_on = threading.Event(), threading.Event()
    made = gallery({"a": 0, "b": 1})
    remove = made.remove

    def slow(*keys: str) -> None:
        removing.set()
        go_on.wait()
        remove(*keys)

    monkeypatch.setattr(made, "remove", slow)
    policy = RouterPolicy()
    policy.use_gallery(made, "e")
    forgetting = threading.Thread(target=policy.forget, args=("a",))
    changing = threading.Thread(target=policy.use_weights, args=(weights({"c": 2}),))
    forgetting.start()
    removing.wait()
    changing.start()
    changing.join(10)
    waited = changing.is_alive()
    go_on.set()
    forgetting.join()
    changing.join()
    assert not waited
    assert policy.plan(["c"]).rung == "weights"
    assert policy.plan(["a", "b"]).candidates == ("b",)


class AxisScorer:
    """A candidate's score is the query's number on its axis; of the base, where it is known, a half."""

    def __init__(self, *candidates: str) -> None:
        self.candidates = candidates

    def score(self, embeddings: Floats) -> Floats:
        half = np.full((len(embeddings), 1), 0.5, np.float32)
        return np.concatenate([embeddings, half], axis=1)[
            :, [-1 if c == BASE else "abc".index(c) for c in self.candidates]
        ]


@pytest.mark.parametrize("known", ["examples", "examples, base", "scores", "scores, base"])
def test_decisions_made_together_are_those_made_alone(policy: RouterPolicy, known: str) -> None:
    """Of one pool and of several, of the whole and restricted, of a first rung and of one that follows."""
    if known == "examples, base":  # and no calibration: every query has a threshold of its own
        made = gallery({"a": 0, "b": 1, "c": 2})
        made.put(BASE, 0.6 * AXES[:1] + AXES[3:4])
        policy.use_gallery(made, "gallery's")
    elif known.startswith("scores"):
        policy.use_scorer(AxisScorer(*("cba" if known == "scores" else ("c", BASE, "a", "b"))), "scorer's")
    pool = Pool("abc")
    asked = [
        (pool, {}), (Pool("ab"), {}), (pool, {"policy": "examples"}), (pool, {}), (Pool("c"), {"policy": "examples"}),
        (pool, {"candidates": ["b", "c"]}), (pool, {"threshold": -5}),
    ]  # fmt: skip
    plans = [policy.plan(names, options(**given)) for names, given in asked]
    rows = [AXES[2], AXES[1], AXES[3], 0.8 * AXES[0] + 0.2 * AXES[1], AXES[2], AXES[1], AXES[0]]
    together = decide_together(plans, rows)
    for plan, row, decision in zip(plans, rows, together, strict=True):
        alone = plan.decide(row)
        assert (decision.chosen, decision.rung, decision.reason) == (alone.chosen, alone.rung, alone.reason)
        assert decision.threshold == (None if alone.threshold is None else pytest.approx(alone.threshold))
        assert dict(decision.scores) == pytest.approx(dict(alone.scores), abs=1e-6)
    assert len({decision.chosen for decision in together}) > 2
    following = [(plan.after(d), row) for plan, d, row in zip(plans, together, rows, strict=True)]
    left = [(plan, row) for plan, row in following if plan is not None and plan.encoder]
    for (plan, row), decision in zip(
        left, decide_together(*map(list, zip(*left, strict=True))) if left else [], strict=True
    ):
        alone = plan.decide(row)
        assert (decision.chosen, decision.rung, decision.reason) == (alone.chosen, alone.rung, alone.reason)


def test_only_what_takes_an_embedding_is_decided_together(policy: RouterPolicy) -> None:
    plan = policy.plan(Pool("d"))
    assert plan.rung == "weights"
    with pytest.raises(ValueError, match="embedding"):
        decide_together([plan], [AXES[0]])
