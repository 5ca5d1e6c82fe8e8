"""What the router answers while it starts, and when a part of it does not."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.harness import Bench, in_process, make_bench
from api.test_routing import NOBODYS, QUERY, SPELL, TALK, ready, route, teach

from loramux.router import artifacts
from loramux.router.interface import BASE as BASE_KEY
from loramux.router.scores.knn import Neighbours

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": QUERY}]


async def scored(root: Path) -> Bench:
    """A server that is to start over a store with one skill and a scorer that prefers it."""
    async with in_process(make_bench(root, base_examples=TALK)) as bench:
        await ready(bench)
        await teach(bench, "spell", SPELL, 1)
        encoder = (await bench.client.get("/v1/router")).json()["encoder"]
    scorer = Neighbours(np.zeros((1, encoder["dim"]), np.float32), np.array([[0.1, 0.9]]), (BASE_KEY, "spell"), 1, 1.0)
    artifacts.save(root / "store" / "router" / "scorers", artifacts.Artifact(scorer, encoder["name"], encoder["dim"]))
    return make_bench(root, base_examples=TALK)


async def test_a_scorer_that_still_takes_scores_in_decides_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await scored(tmp_path)
    assert made.state.router is not None
    growing, go_on = asyncio.Event(), asyncio.Event()

    async def held(*args: Any) -> bool:
        growing.set()
        await go_on.wait()
        return True

    monkeypatch.setattr(made.state.router.scores, "_grow", held)
    async with in_process(made) as bench:
        await growing.wait()
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == ("scores", "spell")
        assert (await bench.chat(model="auto", messages=USER)).status_code == 200
        assert (await bench.client.get("/v1/router")).json()["encoder"] is None
        go_on.set()
        await ready(bench)


@pytest.mark.parametrize(
    ("method", "part", "rung"), [("scores.load", "router-scores", "examples"), ("_restored", "router", "scores")]
)
async def test_what_fails_at_the_start_is_shown_and_the_rest_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str, rung: str
) -> None:
    made = await scored(tmp_path)
    service: Any = made.state.router

    async def broken(*args: Any) -> None:
        raise RuntimeError("the file is not what it was")

    monkeypatch.setattr(service.scores if "." in method else service, method.rpartition(".")[2], broken)
    async with in_process(made) as bench:
        while not (state := (await bench.client.get("/v1/router")).json())["ended"]:
            await asyncio.sleep(0.001)
        assert state["ended"] == {part: "RuntimeError: the file is not what it was"}
        if rung == "examples":
            await ready(bench)
        (decision,) = await route(bench)
        assert (decision["rung"], decision["chosen"][0]["name"]) == (rung, "spell")
        assert (await bench.chat(model="auto", messages=[{"role": "user", "content": NOBODYS}])).status_code == 200
