"""Feedback: whose opinion of what is taken, and the requests that it names."""

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api.harness import BASE, Bench, in_process, make_bench
from api.test_routing import SPELL, TALK, ready, route, teach
from api.test_routing_scores import learn_opposite, trained
from api.test_tenants import As

from loramux.router.interface import BASE as BASE_KEY
from loramux.router.scores.dataset import ScoredQuery, newest
from loramux.server.api.auto import recent, scoring
from loramux.server.api.auto.ledger import ScoreLedger
from loramux.server.api.auto.recent import RecentDeletions
from loramux.server.api.auto.scoring import MIN_NEW

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[tuple[Bench, As, As]]:
    """Two tenants; what the first has is public."""
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        acme, other = As(bench, "acme"), As(bench, "other")
        assert (await acme.upload("open", 1, visibility="public")).status_code == 201
        yield bench, acme, other


async def say(tenant: As, **body: Any) -> tuple[int, Any]:
    response = await tenant.ask("POST", "/v1/feedback", json={"score": 1, **body})
    return response.status_code, response.json()


def kept(bench: Bench) -> list[ScoredQuery]:
    assert bench.state.router is not None
    return bench.state.router.scores._ledger.rows(["acme/open", BASE_KEY])


async def test_users_steer_their_own_adapters_only(shared: tuple[Bench, As, As]) -> None:
    bench, acme, other = shared
    for tenant, name in ((other, "acme/open"), (other, BASE), (other, "base"), (acme, BASE)):
        status, body = await say(tenant, input="a text", adapter=name)
        assert (status, body["error"]["param"], body["error"]["code"]) == (403, "adapter", "insufficient_permissions")
        assert "`request_id`" in body["error"]["message"]
    assert kept(bench) == []
    assert (await say(acme, input="a text", adapter="open"))[0] == 200
    assert (await say(As(bench, "other", "admin"), input="another", adapter="acme/open"))[1]["adapter"] == "acme/open"
    assert kept(bench) == [ScoredQuery("a text", {"acme/open": 1.0}), ScoredQuery("another", {"acme/open": 1.0})]


async def test_users_score_what_they_were_served(shared: tuple[Bench, As, As]) -> None:
    bench, acme, other = shared
    by_adapter = (await other.chat("acme/open")).json()["id"]
    by_base = (await other.chat()).json()["id"]
    assert (await say(other, request_id=by_adapter, adapter=BASE))[0] == 403
    assert (await say(other, request_id=by_base, adapter="acme/open"))[0] == 403
    assert (await say(acme, request_id=by_adapter))[0] == 404
    assert kept(bench) == []
    assert (await say(other, request_id=by_adapter, adapter="acme/open"))[0] == 200
    assert (await say(other, request_id=by_base, adapter="base"))[1]["adapter"] == BASE
    assert kept(bench) == [ScoredQuery("hi", {BASE_KEY: 1.0, "acme/open": 1.0})]


async def test_feedback_counts_as_a_request(shared: tuple[Bench, As, As]) -> None:
    bench, acme, _ = shared
    bench.state.tenants.set_limits("acme", {"requests": 1})
    gate, caller = bench.state.gate, bench.state.keys.caller(acme.secret.encode())
    assert caller is not None
    with gate.admit(caller):
        status, body = await say(acme, input="a text", adapter="open")
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (await say(acme, input="a text", adapter="open"))[0] == 200
    assert gate.of("acme").sequences == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "asked"}]}),
        ("/v1/completions", {"prompt": "asked"}),
        ("/v1/responses", {"input": "asked", "store": False}),
    ],
)
@pytest.mark.parametrize("given", [None, "cmpl-7", "resp_chatcmpl-8"])
async def test_every_id_that_an_answer_shows_names_its_request(
    shared: tuple[Bench, As, As], path: str, body: Any, given: str | None
) -> None:
    bench, acme, _ = shared
    headers = {} if given is None else {"x-request-id": given}
    answer = await acme.ask("POST", path, json={"model": BASE, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    for id in (answer.json()["id"], answer.headers["x-request-id"]):
        assert (await say(acme, request_id=id, score=0.5))[0] == 200, id
    assert kept(bench) == [ScoredQuery("asked", {BASE_KEY: 0.5})]


async def test_an_answer_of_a_deleted_adapter_scores_nobody(shared: tuple[Bench, As, As]) -> None:
    """Neither while there is none of that name, nor the next one that has it."""
    bench, acme, _ = shared
    id = (await acme.chat("open")).json()["id"]
    assert (await acme.ask("DELETE", "/v1/adapters/open")).status_code == 200
    for _ in range(2):
        status, body = await say(acme, request_id=id)
        assert (status, body["error"]["param"], body["error"]["code"]) == (404, "request_id", "model_not_found")
        assert (await acme.upload("open", 2)).status_code in (200, 201)
    assert kept(bench) == []
    assert (await say(acme, request_id=(await acme.chat("open")).json()["id"]))[0] == 200


async def test_what_is_deleted_while_its_scores_are_embedded_stays_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = scoring._embedded

    async def meanwhile(*args: Any) -> Any:
        rows = await embedded(*args)
        assert (await bench.client.delete("/v1/adapters/spell")).status_code == 200
        return rows

    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "_embedded", meanwhile)
            feedback = {"input": "Spell it", "adapter": "spell", "score": 1}
            assert (await bench.client.post("/v1/feedback", json=feedback)).json()["learnt"] is False
        await teach(bench, "spell", SPELL, 3)
        (decision,) = await route(bench, policy="scores", threshold=-10)
        assert [score["name"] for score in decision["scores"]] == ["sum"]


async def test_what_there_is_no_room_for_is_kept_for_the_next_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scorer(bench: Bench) -> Any:
        return (await bench.client.get("/v1/router")).json()["rungs"]["scores"]["scorer"]

    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        state = await scorer(bench)
        assert (state["chosen"], state["rows"]) == ("knn", 16)
        dim = (await bench.client.get("/v1/router")).json()["encoder"]["dim"]
        monkeypatch.setattr("loramux.router.scores.knn.MAX_BYTES", (16 + 3) * (4 * dim + 3 * 8))

        async def learnt(number: int) -> bool:
            feedback = {"input": f"Spell {number}", "adapter": "spell", "score": 1}
            return bool((await bench.client.post("/v1/feedback", json=feedback)).json()["learnt"])

        assert [await learnt(number) for number in range(5)] == [True, True, True, False, False]
        assert await learnt(0), "a repeated score takes no room"
        assert (await scorer(bench))["rows_since_training"] == 4
        assert bench.state.router is not None
        fresh = bench.state.router.scores._ledger.rows(["spell"], fresh=True)
        assert [row.query for row in fresh] == [f"Spell {number}" for number in range(5)]
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        assert (await scorer(bench))["rows_since_training"] == 2, "the half of them that there is room for"


async def test_a_training_is_of_the_newest_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        dim = (await bench.client.get("/v1/router")).json()["encoder"]["dim"]
        monkeypatch.setattr(scoring, "newest", partial(newest, max_cells=12 * (dim + 3) + 1))
        await bench.client.post("/v1/router/train", json={"seed": 3})
        state = await trained(bench)
        assert state["training"] == {"status": "done", "error": None, "rows": 12, "rows_left_out": 4}
        assert state["scorer"]["rows"] == 12


def test_the_ledger_looks_candidates_up(tmp_path: Path) -> None:
    """By an index in both tables, however many there are; any text is a name."""
    ledger = ScoreLedger(tmp_path / "scores.sqlite3", max_bytes=1 << 20)
    odd = "a'\"\\ß"
    ledger.add(ScoredQuery(f"q{number}", {"b": 1, **({odd: 0} if number % 2 else {})}) for number in range(4))
    many = [odd, BASE_KEY, *(f"n{number}" for number in range(40_000))]
    for fresh in (False, True):
        assert ledger.rows(many, fresh=fresh) == [ScoredQuery(f"q{number}", {odd: 0.0}) for number in (1, 3)]
    assert ledger.fresh_counts(many) == {odd: 2}
    statements: list[str] = []
    ledger._database.set_trace_callback(statements.append)
    ledger.rows(["b"], fresh=True)
    ledger.rows(["b"])
    ledger.fresh_counts(["b"])
    ledger._database.set_trace_callback(None)
    for statement in statements:
        plan = [row[-1] for row in ledger._database.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert any("_by_candidate" in step for step in plan), plan
        assert not any(step.startswith(("SCAN s", "SCAN q", "SCAN fresh")) for step in plan), plan
    ledger.close()


async def test_one_look_at_the_ledger_for_all_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    rows = ScoreLedger.rows

    def noting(self: ScoreLedger, candidates: list[str], *, fresh: bool = False) -> list[ScoredQuery]:
        asked.append(sorted(candidates))
        return rows(self, candidates, fresh=fresh)

    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        monkeypatch.setattr(ScoreLedger, "rows", noting)
        scores = {f"n{number}": 1.0 for number in range(50)}
        line = json.dumps({"query": "one of all", "scores": scores})
        assert (await bench.client.post("/v1/router/scores", content=line)).status_code == 200
        assert asked == [], "nobody has enough"
        lines = [json.dumps({"query": f"q{number}", "scores": {"n7": 1, "n9": 0}}) for number in range(MIN_NEW)]
        await bench.client.post("/v1/router/scores", content="\n".join(lines))
        assert asked == [["n7", "n9"]]


def test_recent_deletions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1, 10))
    monkeypatch.setattr(recent, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    deletions = RecentDeletions(max_names=2)
    for key in ("a", "b", "a"):
        deletions.add(key)
    assert [deletions.since("a", at) for at in (2, 3, 4)] == [True, True, False]
    assert not deletions.since("never", 0)
    deletions.add("c")
    assert [deletions.since("b", at) for at in (2, 3)] == [True, False]
    assert deletions.since("never", 1), "it may have been one of those no longer known"
    assert not deletions.since(BASE_KEY, 0)
