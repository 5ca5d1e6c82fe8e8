"""`model: "auto"` and `/v1/route`: what is chosen, how it is explained, and what happens when the ground moves."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.harness import (
    BASE,
    END,
    TEMPLATE,
    WIDTH,
    Bench,
    adapter_files,
    byte_tokenizer,
    in_process,
    make_bench,
    parts,
    sse,
)
from safetensors.numpy import load, save

from loramux.adapters_store.tenants import TenantLimits
from loramux.router.options import RouteOptions, RouterError
from loramux.server.api.admission import Admission
from loramux.server.api.auto.base_states import BaseStates, base_identity
from loramux.server.api.auto.parts import RouterSetupError, read_examples
from loramux.server.api.auto.service import RouterService
from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import EngineError, EngineInfo, PoolingParams

pytestmark = pytest.mark.anyio

SPELL = [f"Spell the word {w} backwards" for w in ("cat", "horse", "lamp", "tree", "cloud", "stone", "fish", "bread")]
SUM = [f"{n} + {n + 3} = ?" for n in (12, 85, 40, 7, 61, 93, 28, 54)]
TALK = [
    f"Who was {w}, and why is he known?" for w in ("Plato", "Bach", "Euler", "Gauss", "Homer", "Ovid", "Kant", "Mill")
]
QUERY = "Spell the word river backwards"
NOBODYS = "Who was Hegel, and why is he known?"


async def teach(bench: Bench, name: str, examples: list[str], seed: int = 0, **fields: str) -> Any:
    """Uploads an adapter with examples, and waits until the router counts them."""
    response = await bench.upload(name, seed, examples=json.dumps(examples), **fields)
    assert response.status_code == 201, response.text
    assert response.headers["x-loramux-router"] == "ready"
    return response.json()


async def started(bench: Bench) -> None:
    """Waits until there is an encoder."""
    while (await bench.client.get("/v1/router")).json()["encoder"] is None:
        await asyncio.sleep(0.005)


async def ready(bench: Bench) -> None:
    """Waits until nothing is left to embed."""
    for _ in range(1000):
        state = (await bench.client.get("/v1/router")).json()
        if (
            state["encoder"] is not None
            and not state["adapters"]["pending"]
            and state["rungs"]["examples"]["knows_base"]
        ):
            return
        await asyncio.sleep(0.005)
    raise AssertionError(state)


async def route(bench: Bench, text: Any = QUERY, **router: Any) -> Any:
    response = await bench.client.post("/v1/route", json={"input": text, "router": router})
    assert response.status_code == 200, response.text
    return response.json()["data"]


@pytest.fixture
async def taught(tmp_path: Path) -> AsyncIterator[Bench]:
    """A server with two skills and the base's own examples; adapters without texts are known by nothing."""
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_weights_bytes=0)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1)
        await teach(bench, "sum", SUM, 2)
        yield bench


async def test_the_right_adapter_answers(taught: Bench) -> None:
    for text, name in ((QUERY, "spell"), ("33 + 14 = ?", "sum")):
        response = await taught.chat(model="auto", messages=[{"role": "user", "content": text}])
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["model"] == "auto"
        assert body["loramux"]["adapters"] == [{"name": name, "version": 1, "weight": 1.0}]
        report = body["loramux"]["router"]
        assert set(report) == {"chosen", "rung", "threshold", "abstained", "milliseconds", "scores"}
        assert report["scores"][0]["name"] == name
        assert (report["chosen"], report["rung"]) == ([{"name": name, "weight": 1.0}], "examples")
        assert report["abstained"] is False
        assert report["milliseconds"] > 0
        assert response.headers["x-loramux-adapters"] == f"{name}@1;w=1"
        assert response.headers["x-loramux-router-rung"] == "examples"
        (ref,) = taught.engine.requests[-1].adapters
        assert ref.digest == taught.store.get(name).digest
    assert taught.leases() == {}


async def test_what_fits_none_is_the_bases(taught: Bench) -> None:
    response = await taught.chat(
        model="auto",
        router={"explain": True},
        messages=[{"role": "user", "content": "Who was Hegel, and why is he known?"}],
    )
    report = response.json()["loramux"]
    assert report["adapters"] == []
    assert report["router"]["abstained"] is True
    assert [s["name"] for s in report["router"]["scores"]] == ["spell", "sum"]
    assert "below the threshold" in report["router"]["reason"]
    assert "x-loramux-adapters" not in response.headers
    assert response.headers["x-loramux-router-rung"] == "examples"
    assert taught.engine.requests[-1].adapters == ()


async def test_the_last_user_turn_is_routed(taught: Bench) -> None:
    turns = [
        {"role": "system", "content": "You add numbers. 1 + 1 = ?"},
        {"role": "user", "content": "12 + 15 = ?"},
        {"role": "assistant", "content": "27"},
        {"role": "user", "content": QUERY},
    ]
    for messages in (turns, [*turns, {"role": "assistant", "content": "40 + 4 = ?"}]):
        response = await taught.chat(model="auto", messages=messages)
        assert response.json()["loramux"]["adapters"][0]["name"] == "spell"
    assert (await route(taught, turns))[0]["chosen"] == [{"name": "spell", "weight": 1.0}]


async def test_the_probe_is_the_answers_prompt(taught: Bench) -> None:
    messages = [{"role": "user", "content": "Who was Tycho, and why is he known?"}]
    await taught.chat(model="auto", messages=messages, cache_salt="mine")
    probe, answer = taught.engine.probes[-1], taught.engine.requests[-1]
    assert probe.prompt_token_ids == answer.prompt_token_ids
    assert probe.salt == answer.salt == "mine"
    assert probe.adapters == ()


async def test_probes_are_not_repeated_for_one_caller(taught: Bench) -> None:
    before = len(taught.engine.probes)
    for salt in ("a", "a", "b"):
        await taught.chat(model="auto", messages=[{"role": "user", "content": QUERY}], cache_salt=salt)
    assert len(taught.engine.probes) == before + 2


async def test_streams_say_it_first(taught: Bench) -> None:
    messages = [{"role": "user", "content": QUERY}]
    response = await taught.chat(model="auto", stream=True, messages=messages)
    assert response.headers["x-loramux-router-rung"] == "examples"
    events = sse(response.text)
    assert events[0]["loramux"]["router"]["chosen"] == [{"name": "spell", "weight": 1.0}]
    assert all("loramux" not in event for event in events[1:-1])
    response = await taught.complete(model="auto", prompt=QUERY, stream=True)
    assert sse(response.text)[0]["loramux"]["router"]["rung"] == "examples"


async def test_text_completions(taught: Bench) -> None:
    for prompt in (QUERY, list(QUERY.encode())):
        body = (await taught.complete(model="auto", prompt=prompt)).json()
        assert body["loramux"]["adapters"][0]["name"] == "spell"
    response = await taught.complete(model="auto", prompt=[QUERY, QUERY])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    response = await taught.complete(model="auto", prompt=[99999])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_sets_have_quantised_weights(taught: Bench) -> None:
    response = await taught.chat(
        model="auto", router={"top_k": 2, "threshold": -10, "temperature": 0.5},
        messages=[{"role": "user", "content": QUERY}],
    )  # fmt: skip
    chosen = response.json()["loramux"]["router"]["chosen"]
    assert [member["name"] for member in chosen] == ["spell", "sum"]
    assert sum(member["weight"] for member in chosen) == 1.0
    assert all((member["weight"] * 16).is_integer() for member in chosen)
    refs = {ref.digest: ref.weight for ref in taught.engine.requests[-1].adapters}
    assert refs == {taught.store.get(m["name"]).digest: m["weight"] for m in chosen}
    (alone,) = await route(taught, top_p=0.1, threshold=-10)
    assert [member["name"] for member in alone["chosen"]] == ["spell"]


@pytest.mark.parametrize(
    ("router", "param"),
    [
        ({"policy": "best"}, "router.policy"), ({"policy": "scores"}, "router.policy"),
        ({"policy": "weights"}, "router.policy"), ({"policy": 3}, "router.policy"), ({"top_k": 0}, "router.top_k"),
        ({"top_k": 9}, "router.top_k"), ({"top_k": 1.5}, "router.top_k"), ({"top_p": 0}, "router.top_p"),
        ({"top_p": 1.1}, "router.top_p"), ({"top_p": "x"}, "router.top_p"), ({"threshold": "low"}, "router.threshold"),
        ({"temperature": 0}, "router.temperature"), ({"candidates": []}, "router.candidates"),
        ({"candidates": ["spell", "gone"]}, "router.candidates"), ({"candidates": "spell"}, "router.candidates"),
        ({"candidates": [BASE]}, "router.candidates"), ({"explain": "yes"}, "router.explain"),
        ({"topk": 2}, "router.topk"), ("spell", "router"), ([], "router"),
    ],
)  # fmt: skip
async def test_wrong_options_are_named(taught: Bench, router: Any, param: str) -> None:
    for response in (
        await taught.chat(model="auto", router=router),
        await taught.client.post("/v1/route", json={"input": QUERY, "router": router}),
    ):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
    assert not taught.engine.requests
    assert taught.leases() == {}


async def test_a_decision_counts_as_a_request(taught: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = taught.state.gate
    monkeypatch.setattr(gate, "admit", lambda caller: Admission(gate, replace(caller, limits=TenantLimits(requests=0))))
    response = await taught.client.post("/v1/route", json={"input": QUERY})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_nan_is_no_threshold(taught: Bench) -> None:
    body = '{"input": "x", "router": {"threshold": NaN}}'
    response = await taught.client.post("/v1/route", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


async def test_candidates_and_thresholds(taught: Bench) -> None:
    (decision,) = await route(taught, candidates=["sum"], threshold=-10)
    assert decision["chosen"] == [{"name": "sum", "weight": 1.0}]
    assert [s["name"] for s in decision["scores"]] == ["sum"]
    assert decision["threshold"] == -10
    (decision,) = await route(taught, threshold=5)
    assert (decision["chosen"], decision["abstained"]) == ([], True)


async def test_options_go_with_auto(taught: Bench) -> None:
    for model in (BASE, "spell"):
        response = await taught.chat(model=model, router={"top_k": 1})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "router")
        assert (await taught.chat(model=model, router=None)).status_code == 200
    response = await taught.chat(model="auto", adapters=[{"name": "spell"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapters")


async def test_route_takes_texts_and_conversations(taught: Bench) -> None:
    before = len(taught.engine.requests)
    decisions = await route(taught, [QUERY, "33 + 14 = ?", NOBODYS])
    assert [d["index"] for d in decisions] == [0, 1, 2]
    assert [[m["name"] for m in d["chosen"]] for d in decisions] == [["spell"], ["sum"], []]
    assert all(d["rung"] == "examples" and d["scores"] and d["reason"] for d in decisions)
    (short,) = await route(taught, explain=False)
    assert [s["name"] for s in short["scores"]] == ["spell", "sum"]
    assert "reason" not in short
    assert len(taught.engine.requests) == before
    for wrong in ({}, {"input": []}, {"input": ["a", 3]}, {"input": ["a"] * 129}, {"input": "a", "model": "b"}):
        assert (await taught.client.post("/v1/route", json=wrong)).status_code == 400


async def test_nothing_known_is_the_base_with_a_reason(make: Callable[..., Any]) -> None:
    bench = await make(router_weights_bytes=0)
    for count in (0, 1):
        if count:
            assert "x-loramux-router" not in (await bench.upload("silent")).headers
        response = await bench.chat(model="auto", router={"explain": True})
        assert response.status_code == 200
        report = response.json()["loramux"]
        assert report["adapters"] == []
        assert (report["router"]["rung"], report["router"]["abstained"]) == ("none", False)
        assert report["router"]["reason"]
        assert response.headers["x-loramux-router-rung"] == "none"
    assert not bench.engine.probes


async def test_a_description_is_enough(taught: Bench) -> None:
    response = await taught.upload("rhyme", 5, description="Finds words that rhyme with a given word")
    assert response.headers["x-loramux-router"] == "ready"
    (decision,) = await route(taught, "Find words that rhyme with moon", threshold=-10)
    assert decision["chosen"][0]["name"] == "rhyme"


async def test_changes_count_at_once(taught: Bench) -> None:
    assert (await route(taught))[0]["chosen"][0]["name"] == "spell"
    response = await taught.client.patch("/v1/adapters/spell", json={"examples": None, "description": None})
    assert response.status_code == 200
    (decision,) = await route(taught)
    assert [s["name"] for s in decision["scores"]] == ["sum"]
    assert "spell" in decision["reason"]  # named as not considered
    response = await taught.client.patch("/v1/adapters/sum", json={"examples": SPELL})
    assert response.headers["x-loramux-router"] == "ready"
    assert (await route(taught))[0]["chosen"][0]["name"] == "sum"
    assert (await taught.client.delete("/v1/adapters/sum")).status_code == 200
    (decision,) = await route(taught)
    assert (decision["chosen"], decision["rung"]) == ([], "none")
    await teach(taught, "again", SPELL, 7)
    assert (await route(taught))[0]["chosen"][0]["name"] == "again"


async def test_a_restart_knows_the_same_without_embedding_again(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1)
        await teach(bench, "sum", SUM, 2)
        await teach(bench, "gone", TALK, 3)
        await bench.client.delete("/v1/adapters/gone")
        before = await route(bench)
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        assert not bench.engine.probes
        after = await route(bench)
    for one in (*before, *after):
        one.pop("milliseconds")
    assert [s["name"] for s in after[0]["scores"]] == ["spell", "sum"]
    assert after[0]["chosen"] == before[0]["chosen"]
    assert after[0]["scores"][0]["score"] == pytest.approx(before[0]["scores"][0]["score"], abs=1e-5)


async def test_a_restart_notices_what_has_changed(tmp_path: Path) -> None:
    """The gallery was saved at the end; what was changed behind it is embedded, removed or kept as it must be."""
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        for seed, (name, examples) in enumerate((("spell", SPELL), ("sum", SUM), ("gone", TALK), ("mute", TALK))):
            await teach(bench, name, examples, seed)
    made = make_bench(tmp_path, base_examples=[*TALK, NOBODYS])
    made.store.delete("gone")
    made.store.update("mute", examples=None)
    made.store.update("sum", examples=["Add two and two", *SUM])
    async with in_process(made) as bench:
        await ready(bench)
        texts = {
            bytes(t for t in probe.prompt_token_ids if t < 256).decode()
            for probe in bench.engine.probes
            if probe.request_id.startswith("probe-")
        }
        assert {"Add two and two", NOBODYS} <= texts
        assert not texts & {*SPELL, *SUM, *TALK}
        (decision,) = await route(bench, threshold=-10)
        assert [s["name"] for s in decision["scores"]] == ["spell", "sum"]
    (folder,) = (tmp_path / "store" / "router" / "gallery").glob("v*2")
    (folder / "gallery.safetensors").write_bytes(b"")
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        (again,) = await route(bench, threshold=-10)
        assert [s["name"] for s in again["scores"]] == ["spell", "sum"]


async def test_embeddings_go_with_their_adapter(taught: Bench, tmp_path: Path) -> None:
    path = tmp_path / "store" / "router" / "embeddings.sqlite3"

    def kept() -> int:
        with closing(sqlite3.connect(path)) as database:
            return int(database.execute("SELECT count(*) FROM rows").fetchone()[0])

    assert kept() == len(SPELL) + len(SUM) + len(TALK)
    await taught.client.delete("/v1/adapters/sum")
    assert kept() == len(SPELL) + len(TALK)


async def test_auto_says_what_it_waits_for(tmp_path: Path) -> None:
    made = make_bench(tmp_path)
    made.put("spell", 1, examples=SPELL)
    made.engine.probe_gate = asyncio.Event()
    async with in_process(made) as bench:
        while not bench.engine.probes:
            await asyncio.sleep(0.001)
        response = await bench.chat(model="auto", router={"explain": True})
        assert response.json()["loramux"]["adapters"] == []
        assert "1 adapters wait to be embedded" in response.json()["loramux"]["router"]["reason"]
        made.engine.probe_gate.set()
        while (await bench.client.get("/v1/router")).json()["adapters"]["pending"]:
            await asyncio.sleep(0.005)
        (decision,) = await route(bench, threshold=-10)
        assert decision["chosen"][0]["name"] == "spell"
        assert "wait to be" not in decision["reason"]


async def test_what_is_deleted_while_it_is_embedded_stays_out(taught: Bench) -> None:
    taught.engine.probe_gate = asyncio.Event()
    before = len(taught.engine.probes)
    upload = asyncio.create_task(taught.upload("late", 9, examples=json.dumps([QUERY])))
    while len(taught.engine.probes) == before:
        await asyncio.sleep(0.001)
    assert (await taught.client.delete("/v1/adapters/late")).status_code == 200
    taught.engine.probe_gate.set()
    assert (await upload).headers["x-loramux-router"] == "pending"
    state = (await taught.client.get("/v1/router")).json()
    assert (state["adapters"]["registered"], state["rungs"]["examples"]["adapters"]) == (2, 2)


async def test_an_engine_that_fails_is_waited_for(tmp_path: Path) -> None:
    made = make_bench(tmp_path)
    made.put("spell", 1, examples=SPELL)
    made.engine.probe_error = EngineError("busy")
    async with in_process(made) as bench:
        while not bench.engine.probes:
            await asyncio.sleep(0.001)
        assert (await bench.client.get("/v1/router")).json()["adapters"]["pending"] == 1
        made.engine.probe_error = None
        while (await bench.client.get("/v1/router")).json()["adapters"]["pending"]:
            await asyncio.sleep(0.01)
        assert (await route(bench, threshold=-10))[0]["chosen"][0]["name"] == "spell"
        made.engine.probe_error = EngineError("busy")
        response = await bench.chat(model="auto", messages=[{"role": "user", "content": "new words"}])
        assert response.status_code == 503
        assert bench.leases() == {}


async def test_texts_that_cannot_be_embedded_keep_nobody_else_out(tmp_path: Path) -> None:
    refusal = "{% if 'forbidden' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
    template = "<|begin|>{% for m in messages %}" + refusal + "<|user|>{{ m['content'] }}{% endfor %}"
    made = make_bench(tmp_path, template=template)
    made.put("bad", 3, examples=["forbidden words"])
    made.put("spell", 1, examples=SPELL)
    async with in_process(made) as bench:
        while (await bench.client.get("/v1/router")).json()["rungs"]["examples"]["adapters"] != 1:
            await asyncio.sleep(0.005)
        assert (await bench.client.get("/v1/router")).json()["adapters"]["failed"] == ["bad"]
        (decision,) = await route(bench, threshold=-10)
        assert [s["name"] for s in decision["scores"]] == ["spell"]


async def test_an_adapter_that_is_gone_before_its_lease(taught: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    service = taught.state.router
    assert service is not None
    decide, doomed = service.decide, ["spell", "sum"]

    async def then_delete(*args: Any, **kwargs: Any) -> Any:
        """The decision, after which what it chose is deleted behind the server's back."""
        decision = await decide(*args, **kwargs)
        for name, _ in decision.chosen:
            if name in doomed:
                doomed.remove(name)
                taught.store.delete(name)
        return decision

    monkeypatch.setattr(RouterService, "decide", lambda self, *args, **kwargs: then_delete(*args, **kwargs))
    doomed.remove("sum")
    response = await taught.chat(
        model="auto", router={"threshold": -10, "explain": True}, messages=[{"role": "user", "content": QUERY}]
    )
    assert response.json()["loramux"]["adapters"][0]["name"] == "sum"
    assert (await taught.client.get("/v1/router")).json()["adapters"]["registered"] == 1
    doomed.append("sum")
    response = await taught.chat(model="auto", router={"threshold": -10}, messages=[{"role": "user", "content": QUERY}])
    assert response.json()["loramux"]["adapters"] == []
    assert taught.leases() == {}


async def test_what_the_store_lost_is_no_candidate_of_a_tenants(taught: Bench) -> None:
    service = taught.state.router
    assert service is not None
    options = RouteOptions(threshold=-10)
    for _ in range(2):
        decision = await service.decide(QUERY, options, tenant="default")
        assert [name for name, _ in decision.scores] == ["spell", "sum"]
    taught.store.delete("spell")  # the router does not hear of it: the store's generation says it
    assert [name for name, _ in (await service.decide(QUERY, options, tenant="default")).scores] == ["sum"]
    assert (await service.decide(QUERY, options, tenant="stranger")).rung == "none"
    with pytest.raises(RouterError, match="there is no adapter 'default/sum' that you may use"):
        await service.decide(QUERY, RouteOptions(candidates=("sum",)), tenant="stranger")


async def test_choices_while_adapters_come_and_go(taught: Bench) -> None:
    async def churn() -> None:
        for seed in range(10):
            await teach(taught, "spell", SPELL, 10 + seed)
            await taught.client.delete("/v1/adapters/spell")

    async def ask() -> list[int]:
        found = []
        while not done.is_set():
            response = await taught.chat(model="auto", messages=[{"role": "user", "content": QUERY}])
            found.append(response.status_code)
        return found

    done = asyncio.Event()
    asking = [asyncio.create_task(ask()) for _ in range(4)]
    await churn()
    done.set()
    assert {status for found in await asyncio.gather(*asking) for status in found} == {200}
    assert taught.leases() == {}


async def test_ranks_are_bounded(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path, max_set_rank=3)) as bench:
        await started(bench)
        await teach(bench, "spell", SPELL, 1)
        await teach(bench, "sum", SUM, 2)
        response = await bench.chat(
            model="auto", router={"top_k": 2, "threshold": -10, "temperature": 5, "explain": True},
            messages=[{"role": "user", "content": QUERY}],
        )  # fmt: skip
        report = response.json()["loramux"]
        assert report["router"]["chosen"] == [{"name": "spell", "weight": 1.0}]
        assert "--max-set-rank 3" in report["router"]["reason"]
    async with in_process(make_bench(tmp_path, max_set_rank=1)) as bench:
        assert (await route(bench))[0]["rung"] == "none"
        assert (await bench.client.get("/v1/router")).json()["adapters"]["registered"] == 0


def files_along(axis: int) -> dict[str, bytes]:
    """An adapter that responds to one axis of the states, and a little to all."""
    files = adapter_files(axis)
    tensors = load(files["adapter_model.safetensors"])
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = np.stack([np.eye(WIDTH)[axis], np.full(WIDTH, 0.01)]).astype(np.float32)
        else:
            tensors[name] = np.eye(WIDTH, 2, dtype=np.float32)
    return {**files, "adapter_model.safetensors": save(tensors)}


async def silently(bench: Bench, name: str, axis: int, **fields: str) -> None:
    """Uploads an adapter along an axis that nobody described."""
    response = await bench.client.post("/v1/adapters", data={"name": name, **fields}, files=parts(files_along(axis)))
    assert response.status_code == 201, response.text


async def weighed(bench: Bench, count: int) -> Any:
    """Waits until so many adapters are known by their weights; the rung's state."""
    for _ in range(2000):
        rung = (await bench.client.get("/v1/router")).json()["rungs"]["weights"]
        if rung["adapters"] == count and not rung["pending"]:
            return rung
        await asyncio.sleep(0.005)
    raise AssertionError(rung)


ABC = "abc abc abc"  # bytes 97, 98, 99: of axes 1, 2 and 3 modulo eight


async def test_adapters_that_nobody_described_are_known_by_their_weights(bench: Bench) -> None:
    await silently(bench, "one", 1)
    await silently(bench, "five", 5)
    rung = await weighed(bench, 2)
    assert rung["calibration"].startswith("calibrated on 32 everyday prompts")
    response = await bench.chat(
        model="auto", cache_salt="s", router={"explain": True}, messages=[{"role": "user", "content": "aaaaaaaaaa"}]
    )
    served = response.json()["loramux"]
    assert served["adapters"][0]["name"] == "one"
    assert response.headers["x-loramux-router-rung"] == "weights"
    assert [s["name"] for s in served["router"]["scores"]] == ["one", "five"]
    assert "cannot tell that none fits" in served["router"]["reason"]
    probe = bench.engine.probes[-1]
    assert probe.salt == "s"
    assert probe.pooling == PoolingParams((0,), len(probe.prompt_token_ids) - 1)  # all but the first token
    await bench.client.delete("/v1/adapters/one")
    assert (await route(bench, ABC))[0]["chosen"] == [{"name": "five", "weight": 1.0}]
    assert (await weighed(bench, 1))["bytes"] == rung["bytes"] // 2


async def test_choices_by_weights_while_adapters_come_and_go(bench: Bench) -> None:
    await silently(bench, "stays", 1)
    await weighed(bench, 1)

    async def churn() -> None:
        for axis in range(8):
            await silently(bench, "comes", axis)
            await bench.client.delete("/v1/adapters/comes")

    async def ask() -> set[tuple[int, str]]:
        found = set()
        while not done.is_set():
            response = await bench.chat(model="auto", messages=[{"role": "user", "content": ABC}])
            found.add((response.status_code, response.headers["x-loramux-router-rung"]))
        return found

    done = asyncio.Event()
    asking = [asyncio.create_task(ask()) for _ in range(3)]
    await churn()
    done.set()
    assert set.union(*await asyncio.gather(*asking)) == {(200, "weights")}
    await bench.client.delete("/v1/adapters/stays")
    assert (await route(bench, ABC))[0]["reason"] == "there is no adapter to choose from"
    assert (await weighed(bench, 0))["pending"] == 0
    assert bench.leases() == {}


async def test_a_new_version_is_known_by_its_own_weights(bench: Bench) -> None:
    await silently(bench, "a", 1)
    await silently(bench, "b", 5)
    await weighed(bench, 2)
    assert (await route(bench, "aaaaaaaaaa"))[0]["chosen"][0]["name"] == "a"
    await silently(bench, "a", 6)
    await silently(bench, "b", 1)
    await weighed(bench, 2)
    assert (await route(bench, "aaaaaaaaaa"))[0]["chosen"][0]["name"] == "b"


async def test_examples_are_asked_before_weights(tmp_path: Path) -> None:
    """Those that nobody described get what the calibrated examples leave to the base, if their weights respond."""
    async with in_process(make_bench(tmp_path, base_examples=TALK)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL + [text.lower() for text in SPELL], 1)
        await teach(bench, "sum", SUM, 2)
        await silently(bench, "silent", 1)
        assert "examples of the base" in (await weighed(bench, 1))["calibration"]
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("examples", "spell")
        assert "examples known of 2 of 3 candidates, weights of 1 more" in decision["reason"]
        (decision,) = await route(bench, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("weights", "silent"), decision
        (decision,) = await route(bench, NOBODYS)
        assert (decision["rung"], decision["chosen"]) == ("examples", [])
        (decision,) = await route(bench, policy="weights", threshold=-10)
        assert [s["name"] for s in decision["scores"]] == ["silent"]
        patched = await bench.client.patch("/v1/adapters/silent", json={"description": "About nothing at all"})
        assert patched.headers["x-loramux-router"] == "ready"
        assert (await weighed(bench, 0))["adapters"] == 0
        assert (await route(bench))[0]["reason"].endswith("examples known of all 3 candidates")


async def test_the_weights_rung_is_bounded(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path)) as bench:
        await silently(bench, "a", 1)
        size = (await weighed(bench, 1))["bytes"]
    async with in_process(make_bench(tmp_path, router_weights_bytes=2 * size + 1)) as bench:
        for axis, name in enumerate("bcd"):
            await silently(bench, name, axis)
        rung = await weighed(bench, 2)
        assert (rung["left_out"], rung["bytes"]) == (2, 2 * size)
        (decision,) = await route(bench, ABC)
        assert "weights known of 2 of 4 candidates, not considered: " in decision["reason"]
        for gone in decision["scores"]:
            await bench.client.delete(f"/v1/adapters/{gone['name']}")
        assert (await weighed(bench, 2))["left_out"] == 0
    async with in_process(make_bench(tmp_path, router_weights_bytes=0)) as bench:
        await started(bench)
        assert (await route(bench, ABC))[0]["rung"] == "none"
        assert not bench.engine.probes


async def test_weights_that_cannot_be_read_keep_nobody_else_out(tmp_path: Path) -> None:
    made = make_bench(tmp_path)
    digest = made.put("bad", 1).digest
    made.put("good", 2)
    path = made.store.blob_dir / digest.replace(":", "-")
    path.write_bytes(b"\0" * path.stat().st_size)
    async with in_process(made) as bench:
        rung = await weighed(bench, 1)
        assert rung["failed"] == ["bad"]
        assert [s["name"] for s in (await route(bench, ABC))[0]["scores"]] == ["good"]


async def test_weights_wait_for_an_engine_that_fails(tmp_path: Path) -> None:
    made = make_bench(tmp_path)
    made.put("a", 1)
    made.engine.probe_error = EngineError("busy")
    async with in_process(made) as bench:
        while not bench.engine.probes:
            await asyncio.sleep(0.001)
        made.engine.probe_error = None
        await weighed(bench, 1)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n two \n", ("one", "two")), ("a.jsonl", '"one"\n{"query": "two", "x": 1}\n', ("one", "two")),
        ("b.txt", "".join(f"{i}\n" for i in range(5000)), None), ("c.txt", "\n", "no prompt"),
        ("c.jsonl", '"one"\n{"text": "two"}\n', "line 2"), ("d.jsonl", "{\n", "line 1"), ("e.txt", b"\xff", "cannot"),
    ],
)  # fmt: skip
def test_base_examples_from_a_file(tmp_path: Path, name: str, text: Any, expected: Any) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, str):
        with pytest.raises(RouterSetupError, match=expected) as caught:
            read_examples(path)
        assert "--router-base-examples" in str(caught.value)
    elif expected is None:
        found = read_examples(path)
        assert (len(found), found[0], found[-1]) == (1024, "0", "4995")
    else:
        assert read_examples(path) == expected


def test_wide_states_are_projected_and_keep_their_differences() -> None:
    info = EngineInfo(256, 8, 16, 64, "float32", "cpu", (END,), 1, 1, 4, 2048, 6)
    renderer = Renderer(byte_tokenizer(), chat_template=TEMPLATE)
    states = BaseStates.of(info, renderer, "x", layer=None, max_tokens=32)
    assert (states.layer, states.dim) == (3, 256)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 2048)).astype("<f4")
    rows += 3 * rng.normal(size=2048).astype("<f4")
    projected = np.stack([states.row(row.tobytes()) for row in rows])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert projected @ projected.T == pytest.approx(unit @ unit.T, abs=0.05)
    assert np.linalg.norm(projected, axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    assert len(states.prompts.tokens("y" * 10_000)) == 32
    assert states.pooling.layers == (3,)
    names = {
        BaseStates.of(info, renderer, identity, layer=layer, max_tokens=tokens).name
        for identity, layer, tokens in (("x", None, 32), ("y", None, 32), ("x", 2, 32), ("x", None, 64))
    }
    assert len(names) == 4


def test_bases_are_told_apart(tmp_path: Path) -> None:
    digests = []
    for weights in (b"a" * 300_000, b"a" * 299_999 + b"b", b"a" * 300_001):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(weights)
        digests.append(base_identity(tmp_path, None))
    digests.append(base_identity(tmp_path, "template"))
    assert len(set(digests)) == 4


async def test_the_state_is_shown(taught: Bench, make: Callable[..., Any]) -> None:
    state = (await taught.client.get("/v1/router")).json()
    assert state["enabled"] is True
    assert state["encoder"]["dim"] == 128
    assert state["adapters"] == {"registered": 2, "pending": 0, "failed": []}
    examples = state["rungs"]["examples"]
    assert (examples["adapters"], examples["knows_base"]) == (2, True)
    assert "calibrat" in examples["calibration"]


async def test_without_a_router(make: Callable[..., Any]) -> None:
    bench = await make(router="off")
    assert (await bench.client.get("/v1/router")).json()["enabled"] is False
    response = await bench.client.post("/v1/route", json={"input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_policy")
    assert "x-loramux-router" not in (await bench.upload("spell", examples=json.dumps(SPELL))).headers
