"""`model: "auto"` on the embedded demo, from HTTP to the right answer."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from support.live import LiveServer, live_server

from loramux.server.demo.assets import demo_adapters
from loramux.server.demo.skills import adapter_skills, ask, base_skills

EACH = 4
EXAMPLES_RUNG = 'loramux_router_rung_total{rung="examples"}'


def wait_known(server: LiveServer) -> dict[str, Any]:
    """The router's state once it has embedded everything; the bound only ends a test that has failed."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state: dict[str, Any] = httpx.get(server.url + "/v1/router", timeout=30).json()
        examples = state["rungs"]["examples"]
        if state["encoder"] and not state["adapters"]["pending"] and examples["knows_base"]:
            return state
        time.sleep(0.05)
    raise AssertionError(state)


def ask_auto(server: LiveServer, prompt: str) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 40}
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    with live_server(root) as made:
        wait_known(made)
        yield made


@pytest.mark.parametrize(("held_out", "least_routed", "least_right"), [(False, 0.85, 0.75), (True, 0.65, 0.5)])
def test_fresh_prompts_are_answered(
    server: LiveServer, held_out: bool, least_routed: float, least_right: float
) -> None:
    """The bars of held-out wordings, which are far from all others on purpose, are a little below what was measured."""
    rng = Random(21)
    routed = answered = 0
    before = server.metrics().get(EXAMPLES_RUNG, 0)
    for skill in adapter_skills():
        for _ in range(EACH):
            question = ask(skill, rng, "fresh", held_out=held_out)
            answer = ask_auto(server, question.prompt)
            routed += [a["name"] for a in answer["loramux"]["adapters"]] == [skill.name]
            answered += answer["choices"][0]["message"]["content"].strip() == question.answer
    asked = EACH * len(adapter_skills())
    assert routed >= least_routed * asked
    assert answered >= least_right * asked
    assert server.metrics()[EXAMPLES_RUNG] - before == asked


def test_the_bases_own_skills_stay_with_it_and_reuse_the_probe(server: LiveServer) -> None:
    rng = Random(22)
    mine = cached = 0
    for skill in base_skills():
        for _ in range(EACH):
            answer = ask_auto(server, ask(skill, rng, "fresh").prompt)
            if not answer["loramux"]["adapters"]:
                mine += 1
                cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert mine >= 0.75 * EACH * len(base_skills())
    assert cached == mine


def test_a_ninth_adapter_is_routed_at_once_and_not_after_its_end(server: LiveServer) -> None:
    folder = demo_adapters()[0].path
    examples = [f'How many syllables has "{word}"?' for word in ("lemon", "paper", "river", "summer", "window")]
    examples += [f'Count the syllables of "{word}".' for word in ("garden", "silver", "monkey", "pocket", "yellow")]
    response = server.upload("syllables", folder, examples=json.dumps(examples))
    assert response.headers["x-loramux-router"] == "ready"
    question = 'How many syllables has "button"?'
    body = {"input": question}
    (decision,) = httpx.post(server.url + "/v1/route", json=body, timeout=60).json()["data"]
    assert [m["name"] for m in decision["chosen"]] == ["syllables"]
    httpx.delete(server.url + "/v1/adapters/syllables", timeout=60).raise_for_status()
    (decision,) = httpx.post(server.url + "/v1/route", json=body, timeout=60).json()["data"]
    assert "syllables" not in [s["name"] for s in decision["scores"]]


def test_adapters_that_nobody_described_are_told_apart_by_their_weights(server: LiveServer) -> None:
    """Much better than chance, and no more is claimed."""
    url = server.url + "/v1/adapters"
    texts = {a["name"]: a["examples"] for a in httpx.get(url, params={"limit": 100}, timeout=60).json()["data"]}
    for name in texts:
        silent = {"examples": None, "description": None}
        httpx.patch(f"{url}/{name}", json=silent, timeout=60).raise_for_status()
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            state = httpx.get(server.url + "/v1/router", timeout=60).json()["rungs"]
            if state["weights"]["adapters"] == len(texts) and not state["weights"]["pending"]:
                break
            time.sleep(0.1)
        rng = Random(23)
        asked = [(s.name, ask(s, rng, "train", held_out=True).prompt) for s in adapter_skills() for _ in range(8)]
        body = {"input": [prompt for _, prompt in asked], "router": {"policy": "weights", "threshold": -1000}}
        decisions = httpx.post(server.url + "/v1/route", json=body, timeout=120).json()["data"]
        assert {decision["rung"] for decision in decisions} == {"weights"}
        right = sum(d["chosen"][0]["name"] == name for d, (name, _) in zip(decisions, asked, strict=True))
        assert right >= 0.3 * len(asked)
    finally:
        for name, examples in texts.items():
            httpx.patch(f"{url}/{name}", json={"examples": examples}, timeout=60).raise_for_status()
