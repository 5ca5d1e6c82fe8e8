"""Feedback, uploaded scores, training, and what a restart or a deletion makes of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.harness import BASE, Bench, in_process, make_bench
from api.test_routing import QUERY, SPELL, SUM, TALK, ready, route, teach

from loramux.router import artifacts
from loramux.router.interface import BASE as BASE_KEY
from loramux.router.scores.dataset import ScoredQuery
from loramux.router.scores.knn import Neighbours
from loramux.server.api.auto.ledger import LedgerError, ScoreLedger
from loramux.server.api.auto.recent import RecentRequests, Served
from loramux.server.api.auto.scoring import MIN_NEW

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": QUERY}]


@pytest.fixture
async def taught(tmp_path: Path) -> AsyncIterator[Bench]:
    """A server with two skills and the base's own examples; adapters without texts are known by nothing."""
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_weights_bytes=0)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1)
        await teach(bench, "sum", SUM, 2)
        yield bench


async def say(bench: Bench, **body: Any) -> tuple[int, Any]:
    response = await bench.client.post("/v1/feedback", json=body)
    return response.status_code, response.json()


def kept(bench: Bench) -> list[ScoredQuery]:
    assert bench.state.router is not None
    return bench.state.router.scores._ledger.rows(["spell", "sum", BASE_KEY])


async def test_feedback_on_a_request(taught: Bench) -> None:
    routed = await taught.chat(model="auto", messages=USER)
    status, body = await say(taught, request_id=routed.json()["id"], score=1)
    assert (status, body) == (200, {"object": "feedback", "adapter": "spell", "score": 1.0, "learnt": False})
    status, _ = await say(taught, request_id=routed.headers["x-request-id"], score=0.5, adapter="sum")
    assert status == 200
    plain = await taught.complete(prompt="Who are you?")
    assert (await say(taught, request_id=plain.json()["id"], score=0.25, group="talk"))[1]["adapter"] == BASE
    assert kept(taught) == [
        ScoredQuery(QUERY, {"spell": 1.0, "sum": 0.5}),
        ScoredQuery("Who are you?", {BASE_KEY: 0.25}, "talk"),
    ]


async def test_opinions_of_one_query_are_averaged(taught: Bench) -> None:
    for score in (1, 0, 0.5):
        assert (await say(taught, input=QUERY, adapter="spell@1", score=score))[0] == 200
    assert (await say(taught, input=QUERY, adapter="base", score=0))[0] == 200
    assert kept(taught) == [ScoredQuery(QUERY, {BASE_KEY: 0.0, "spell": 0.5})]
    state = (await taught.client.get("/v1/router")).json()["rungs"]["scores"]
    assert (state["queries"], state["scores"]) == (1, 2)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a", "adapter": "spell"}, 400, "score"), ({"input": "a", "score": 1}, 400, "adapter"),
        ({"input": "a", "adapter": "spell", "score": 1.5}, 400, "score"),
        ({"input": "a", "adapter": "spell", "score": True}, 400, "score"),
        ({"adapter": "spell", "score": 1}, 400, "request_id"),
        ({"input": "a", "request_id": "b", "adapter": "spell", "score": 1}, 400, "input"),
        ({"input": "a", "adapter": "nobody", "score": 1}, 404, "adapter"),
        ({"request_id": "never", "score": 1}, 404, "request_id"),
        ({"input": " ", "adapter": "spell", "score": 1}, 400, "input"),
        ({"input": "a" * 70_000, "adapter": "spell", "score": 1}, 400, "input"),
    ],
)  # fmt: skip
async def test_wrong_feedback_is_named(taught: Bench, body: Any, status: int, param: str) -> None:
    found = await say(taught, **body)
    assert (found[0], found[1]["error"]["param"]) == (status, param)
    assert kept(taught) == []


async def test_a_fused_answer_needs_a_name(taught: Bench) -> None:
    fused = await taught.chat(adapters=[{"name": "spell"}, {"name": "sum"}], messages=USER)
    status, body = await say(taught, request_id=fused.json()["id"], score=1)
    assert (status, body["error"]["param"]) == (400, "adapter")
    assert (await say(taught, request_id=fused.json()["id"], score=1, adapter="sum"))[0] == 200


async def test_scores_are_uploaded_by_line(taught: Bench) -> None:
    lines = [{"query": "a", "scores": {"spell": 1, BASE: 0}}, {"query": "b", "scores": {"later": 0.5}, "group": "g"}]
    response = await taught.client.post("/v1/router/scores", content="\n".join(map(json.dumps, lines)) + "\n\n")
    assert response.json() == {"object": "router.scores", "queries": 2, "scores": 3, "unknown": ["later"]}
    assert kept(taught) == [ScoredQuery("a", {BASE_KEY: 0.0, "spell": 1.0})]
    for wrong in ("", "{", '{"query": "a", "scores": {"spell": 2}}', json.dumps(lines[0]) + "\n[]"):
        response = await taught.client.post("/v1/router/scores", content=wrong)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_scores")
    assert "Line 2" in response.json()["error"]["message"]
    assert len(kept(taught)) == 1


async def trained(bench: Bench) -> Any:
    """Waits for the training to end; the scores rung's state."""
    while (state := (await bench.client.get("/v1/router")).json()["rungs"]["scores"])["training"][
        "status"
    ] == "running":
        await asyncio.sleep(0.05)
    return state


async def test_training_needs_scores(taught: Bench) -> None:
    response = await taught.client.post("/v1/router/train", json={})
    assert (response.status_code, response.json()["status"]) == (202, "running")
    training = (await trained(taught))["training"]
    assert training["status"] == "failed"
    assert "/v1/feedback" in training["error"]


async def test_training_makes_a_rung_that_lasts(tmp_path: Path) -> None:
    """Scores say the opposite of the examples, so that it shows which of the two decides."""
    rows = [{"query": q, "scores": {"spell": 0, "sum": 1, "base": 0.5}} for q in SPELL]
    rows += [{"query": q, "scores": {"spell": 1, "sum": 0, "base": 0.5}} for q in SUM]
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1)
        await teach(bench, "sum", SUM, 2)
        await bench.client.post("/v1/router/scores", content="\n".join(map(json.dumps, rows)))
        assert (await bench.client.post("/v1/router/train", json={"seed": 3})).status_code == 202
        response = await bench.client.post("/v1/router/train", json={})
        assert (response.status_code, response.json()["error"]["code"]) == (409, "already_training")
        state = await trained(bench)
        assert state["training"] == {"status": "done", "error": None, "rows": 16, "rows_left_out": 0}
        assert (state["scorer"]["version"], state["scorer"]["adapters"], state["scorer"]["rows"]) == (1, 2, 16)
        assert state["scorer"]["chosen"]
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("scores", "sum")
        (decision,) = await route(bench, policy="examples")
        assert decision["chosen"][0]["name"] == "spell"
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("scores", "sum")
        await bench.client.delete("/v1/adapters/sum")
        await teach(bench, "sum", SUM, 7)
        (decision,) = await route(bench, policy="scores", threshold=-10)
        assert [s["name"] for s in decision["scores"]] == ["spell"]
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:  # the new `sum` is not the old one
        await ready(bench)
        (decision,) = await route(bench, policy="scores", threshold=-10)
        assert [s["name"] for s in decision["scores"]] == ["spell"]
        assert {name for row in kept(bench) for name in row.scores} == {"spell", BASE_KEY}


def opposite() -> list[str]:
    """Scores that say the opposite of the examples, so that it shows which of the two decides."""
    rows = [{"query": q, "scores": {"spell": 0, "sum": 1, "base": 0.5}} for q in SPELL]
    rows += [{"query": q, "scores": {"spell": 1, "sum": 0, "base": 0.5}} for q in SUM]
    return [json.dumps(row) for row in rows]


async def learn_opposite(bench: Bench) -> None:
    await ready(bench)
    await teach(bench, "spell", SPELL, 1)
    await teach(bench, "sum", SUM, 2)
    await bench.client.post("/v1/router/scores", content="\n".join(opposite()))
    await bench.client.post("/v1/router/train", json={"seed": 3})
    assert (await trained(bench))["training"]["status"] == "done"


async def test_feedback_counts_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        state = await trained(bench)
        assert (state["scorer"]["can_grow"], state["scorer"]["rows_since_training"]) == (True, 0)
        (before,) = await route(bench, policy="scores", threshold=-10)
        assert before["chosen"][0]["name"] == "sum"
        for number in range(12):
            query = f"Spell the word river{number} backwards"
            for adapter, score in (("spell", 1), ("sum", 0)):
                assert (await say(bench, input=query, adapter=adapter, score=score))[1]["learnt"] is True
        (after,) = await route(bench, policy="scores", threshold=-10)
        assert after["chosen"][0]["name"] == "spell"
        assert (await trained(bench))["scorer"]["rows_since_training"] == 24
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        (again,) = await route(bench, policy="scores", threshold=-10)
        assert again["chosen"][0]["name"] == "spell"
        for one, other in zip(after["scores"], again["scores"], strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        await bench.client.post("/v1/router/train", json={"seed": 3})
        state = await trained(bench)
        assert (state["scorer"]["version"], state["scorer"]["rows_since_training"]) == (2, 0)
        assert state["scorer"]["rows"] == 28


async def test_a_new_adapter_needs_some_opinions(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        await teach(bench, "rhyme", ["Find words that rhyme with moon", "What rhymes with cat?"], 3)
        for number in range(MIN_NEW):
            _, answer = await say(bench, input=f"Which word rhymes with {number}?", adapter="rhyme", score=1)
            (decision,) = await route(bench, policy="scores", threshold=-10)
            known = "rhyme" in [s["name"] for s in decision["scores"]]
            assert answer["learnt"] == known == (number == MIN_NEW - 1)
        await bench.client.delete("/v1/adapters/rhyme")
        await teach(bench, "rhyme", ["Find words that rhyme with moon", "What rhymes with cat?"], 4)
        (decision,) = await route(bench, policy="scores", threshold=-10)
        assert "rhyme" not in [s["name"] for s in decision["scores"]]
        assert (await say(bench, input="What rhymes with sea?", adapter="rhyme", score=1))[1]["learnt"] is False
        assert (await say(bench, input=QUERY, adapter="sum", score=1))[1]["learnt"] is True


async def test_many_scores_are_taken_in_behind_the_answer(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        rows = [json.dumps({"query": f"{QUERY} {i}", "scores": {"spell": 1, "sum": 0}}) for i in range(40)]
        assert (await bench.client.post("/v1/router/scores", content="\n".join(rows))).status_code == 200
        while (await trained(bench))["scorer"]["rows_since_training"] != 40:
            await asyncio.sleep(0.005)
        (decision,) = await route(bench, policy="scores", threshold=-10)
        assert decision["chosen"][0]["name"] == "spell"


async def test_a_newer_version_is_used_whoever_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.server.api.auto.scoring.WATCH_SECONDS", 0.01)
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await learn_opposite(bench)
        folder = tmp_path / "store" / "router" / "scorers"
        found = artifacts.load(folder)
        turned = Neighbours(np.zeros((10, found.dim), np.float32), np.tile([0.2, 0.9, 0.1], (10, 1)),
                            (BASE_KEY, "spell", "sum"), 3, 0.1)  # fmt: skip
        artifacts.save(folder, artifacts.Artifact(turned, found.encoder, found.dim))
        while (await trained(bench))["scorer"]["version"] != 2:
            await asyncio.sleep(0.005)
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("scores", "spell")
        artifacts.save(folder, artifacts.Artifact(turned, "another", found.dim))
        while not (state := await trained(bench))["training"]["error"]:
            await asyncio.sleep(0.005)
        assert state["scorer"]["version"] == 2
        assert "trained on embeddings of another" in state["training"]["error"]
        (decision,) = await route(bench)
        assert decision["rung"] == "scores"


async def test_a_scorer_of_another_encoder_is_not_used(tmp_path: Path) -> None:
    made = make_bench(tmp_path)
    folder = tmp_path / "store" / "router" / "scorers" / "v000001"
    folder.mkdir(parents=True)
    (folder / "scorer.json").write_text("{}")
    (folder / "scorer.safetensors").write_bytes(b"")
    made.put("spell", 1, examples=SPELL)
    async with in_process(made) as bench:
        while (await bench.client.get("/v1/router")).json()["rungs"]["examples"]["adapters"] != 1:
            await asyncio.sleep(0.005)
        state = (await bench.client.get("/v1/router")).json()["rungs"]["scores"]
        assert state["scorer"] is None
        assert "v000001" in state["training"]["error"]
        assert (await route(bench, threshold=-10))[0]["rung"] == "examples"


def test_the_ledger_is_bounded_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite3"
    ledger = ScoreLedger(path, max_bytes=100)
    for number in range(30):
        ledger.add([ScoredQuery(f"query {number:04d}", {"a": 1})])
    assert ledger.counts()[0] <= 10
    assert ledger.rows(["a"])[-1].query == "query 0029"
    ledger.add([ScoredQuery("x" * 200, {"a": 1})])
    assert ledger.counts() == (0, 0)
    ledger.add([ScoredQuery("left", {"a": 1, "b": 0.5}), ScoredQuery("gone", {"b": 1})])
    with pytest.raises(AttributeError):
        ledger.add([ScoredQuery("half", {"a": 1}), None])  # type: ignore[list-item]
    ledger.forget("b", 3)
    again = ScoreLedger(path, max_bytes=100)  # as after a kill: nobody closed the first
    assert again.rows(["a", "b"]) == again.rows(["a", "b"], fresh=True) == [ScoredQuery("left", {"a": 1.0})]
    assert (again.retired(3), again.retired(4)) == (["b"], [])
    again.forget("b", 2)
    assert again.retired(3) == ["b"]
    again.close()
    ledger.close()
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(LedgerError, match=r"scores\.sqlite3"):
        ScoreLedger(path, max_bytes=100)


def test_recent_requests_are_bounded() -> None:
    recent = RecentRequests(max_requests=3, max_chars=10)
    for id in "abcd":
        recent.add(id, Served(id, ()))
    assert [recent.get(id) is not None for id in "abcd"] == [False, True, True, True]
    recent.add("d", Served("xxxxxxxx", ("s",)))
    assert recent.get("d") == Served("xxxxxxxx", ("s",))
    recent.add("e", Served("yyyy", ()))
    assert [recent.get(id) is not None for id in "bcde"] == [False, False, False, True]
