"""`model: "auto"` on the embedded demo, measured over HTTP: which adapter, which answer, and when none.

One server, started for this; every decision is `POST /v1/route`'s, every answer `POST /v1/chat/completions`', greedy,
checked as the demo's own evaluation does. Prompts are `router_prompts`'. Five tables: fresh wordings (with the adapter
named explicitly as the oracle), what passes for an adapter and is none, each adapter taken away, each adapter added to
the others by ten examples, and several questions in one prompt.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from report import table
from router_prompts import Prompt, composites, examples_of, fresh_prompts
from server_process import Server, serve

from loramux.router.interface import Progress
from loramux.server.demo.assets import demo_adapters, demo_base_path
from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.demo.evaluate import Case, is_right
from loramux.server.demo.skills import adapter_skills

BASE = "base"
AT_ONCE = 16
INPUTS = 128  # of one POST /v1/route
MAX_TOKENS = 48
HOT_EXAMPLES = 10
TOP_P = 0.9
SHARE_BAR, AUROC_BAR = 0.98, 0.95
KNOWN_SECONDS = 600.0
ENGINE_THREADS = "1"
"""The demo is tiny: a second thread would take the core of the API and of the client."""


@dataclass(frozen=True, slots=True)
class Routed:
    """One decision: the adapter chosen ("" for the base), the likeliest one, and by how much it is above the threshold.

    `margin` orders queries by how much speaks for some adapter, as the decision does: they are turned away below 0.
    """

    chosen: str
    likeliest: str
    margin: float
    milliseconds: float


class Demo:
    """The demo behind a server that runs: its adapters by upload, its questions by HTTP."""

    def __init__(self, server: Server) -> None:
        """Returns when everything that is registered is known; `known_seconds` is how long that took."""
        self.server = server
        start = time.perf_counter()
        self.wait_known()
        self.known_seconds = time.perf_counter() - start
        self.base = next(e["id"] for e in server.call("GET", "/v1/models")["data"] if e.get("parent") is None)

    def learn(self, name: str, examples: Sequence[str]) -> float:
        """Uploads a demo adapter under its name, then its examples; seconds from these to being known by them."""
        self.server.upload(name, demo_base_path().parent / "adapters" / name)
        start = time.perf_counter()
        self.server.call("PATCH", f"/v1/adapters/{name}", json.dumps({"examples": list(examples)}).encode())
        self.wait_known()
        return time.perf_counter() - start

    def remove(self, name: str) -> None:
        """Deletes an adapter."""
        self.server.call("DELETE", f"/v1/adapters/{name}")

    def wait_known(self) -> None:
        """Returns when the router has embedded everything. RuntimeError with its state when that takes too long."""
        deadline = time.monotonic() + KNOWN_SECONDS
        while time.monotonic() < deadline:
            state = self.server.call("GET", "/v1/router")
            known = state["encoder"] and not state["adapters"]["pending"] and not state["adapters"]["failed"]
            if known and state["rungs"]["examples"]["knows_base"]:
                return
            time.sleep(0.01)
        raise RuntimeError(f"the router has not embedded its examples: {state}")

    def calibration(self) -> str:
        """What the router says of its threshold."""
        examples = self.server.call("GET", "/v1/router")["rungs"]["examples"]
        return f"threshold {examples['threshold']}, {examples['calibration']}"

    def route(self, texts: Sequence[str]) -> list[Routed]:
        """The decisions at the server's own threshold."""
        found = []
        for start in range(0, len(texts), INPUTS):
            body = json.dumps({"input": list(texts[start : start + INPUTS])}).encode()
            for row in self.server.call("POST", "/v1/route", body)["data"]:
                chosen, best = row["chosen"], row["scores"][0]
                margin = best["score"] - row["threshold"]
                name = chosen[0]["name"] if chosen else ""
                found.append(Routed(name, best["name"], margin, row["milliseconds"]))
        return found

    def answer(self, asked: Sequence[tuple[str, str]], **options: Any) -> list[str]:
        """Greedy answers to (model, prompt) pairs, each a chat of one turn; `options` are further fields of all."""

        def one(pair: tuple[str, str]) -> str:
            model, prompt = pair
            body = {
                "model": self.base if model == BASE else model, "messages": [{"role": "user", "content": prompt}],
                "temperature": 0, "max_tokens": MAX_TOKENS, **options,
            }  # fmt: skip
            answer = self.server.call("POST", "/v1/chat/completions", json.dumps(body).encode())
            return str(answer["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(one, asked))


@contextmanager
def demo(*flags: str, registered: bool = False) -> Iterator[Demo]:
    """The demo's base, adapters and examples on a server of its own, as `loramux serve` has them without a model.

    `registered`: the flags name a store that has the adapters already.
    """
    with TemporaryDirectory() as folder:
        examples = Path(folder) / "base.jsonl"
        examples.write_text("".join(json.dumps(text) + "\n" for text in demo_base_examples()), encoding="utf-8")
        given = ("--threads", ENGINE_THREADS, "--router-base-examples", str(examples))
        with serve(demo_base_path(), *given, *flags) as server:
            made = Demo(server)
            if not registered:
                for adapter in demo_adapters():
                    made.learn(adapter.name, adapter.examples)
            yield made


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(positive > negative) + P(equal) / 2."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def share(hits: Sequence[bool]) -> float:
    """The share that is true; 0 of none."""
    return sum(hits) / len(hits) if hits else 0.0


def lines_right(prompt: Prompt, answer: str) -> list[bool]:
    """Whether each line of the answer is right, as the demo's own evaluation sees it."""
    count = len(prompt.question.skills)
    return [is_right(Case(prompt.skill, prompt.kind, prompt.adapter, prompt.question, i), answer) for i in range(count)]


def right(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right in all its lines."""
    return [all(lines_right(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def measure_fresh(demo: Demo, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Routing, answers against the oracle's, and abstention, on questions of each kind."""
    routed = demo.route([p.question.prompt for p in prompts])
    own = [i for i, p in enumerate(prompts) if p.kind == "adapter"]
    answerable = [i for i, p in enumerate(prompts) if p.kind != "near"]
    asked = [prompts[i] for i in answerable]
    texts = [p.question.prompt for p in asked]
    oracle = dict(zip(answerable, right(asked, demo.answer([(p.adapter or BASE, p.question.prompt) for p in asked])),
                      strict=True))  # fmt: skip
    auto = dict(zip(answerable, right(asked, demo.answer([("auto", text) for text in texts])), strict=True))
    kinds = {kind: [i for i, p in enumerate(prompts) if p.kind == kind] for kind in ("adapter", "base", "near")}
    margins = {kind: [routed[i].margin for i in places] for kind, places in kinds.items()}
    halves = {kind: auroc(margins["adapter"], margins[kind]) for kind in ("base", "near")}
    rows = []
    for kind in ("adapter", "base"):
        for skill in dict.fromkeys(prompts[i].skill for i in kinds[kind]):
            places = [i for i in kinds[kind] if prompts[i].skill == skill]
            rows.append(
                {
                    "kind": kind,
                    "skill": skill,
                    "prompts": len(places),
                    "likeliest": share([routed[i].likeliest == prompts[i].adapter for i in places]),
                    "chosen": share([routed[i].chosen == prompts[i].adapter for i in places]),
                    "abstained": share([not routed[i].chosen for i in places]),
                    "oracle": share([oracle[i] for i in places]),
                    "auto": share([auto[i] for i in places]),
                }
            )
    near = []
    for skill in dict.fromkeys(prompts[i].skill for i in kinds["near"]):
        places = [i for i in kinds["near"] if prompts[i].skill == skill]
        near.append(
            {
                "skill": skill,
                "prompts": len(places),
                "passed": share([bool(routed[i].chosen) for i in places]),
                "auroc": auroc(margins["adapter"], [routed[i].margin for i in places]),
                "auroc_own": auroc(
                    [routed[i].margin for i in own if prompts[i].skill == skill], [routed[i].margin for i in places]
                ),
            }
        )
    best, by_auto = share([oracle[i] for i in own]), share([auto[i] for i in own])
    overall = auroc(margins["adapter"], margins["base"] + margins["near"])
    return {
        "calibration": demo.calibration(),
        "prompts": {kind: len(places) for kind, places in kinds.items()},
        "likeliest": share([routed[i].likeliest == prompts[i].adapter for i in own]),
        "chosen": share([routed[i].chosen == prompts[i].adapter for i in own]),
        "oracle": best,
        "auto": by_auto,
        "share_of_oracle": by_auto / best if best else 0.0,
        "base_oracle": share([oracle[i] for i in kinds["base"]]),
        "base_auto": share([auto[i] for i in kinds["base"]]),
        "auroc": overall,
        "auroc_base": halves["base"],
        "auroc_near": halves["near"],
        "false_abstentions": share([not routed[i].chosen for i in own]),
        "passed_base": share([bool(routed[i].chosen) for i in kinds["base"]]),
        "passed_near": share([bool(routed[i].chosen) for i in kinds["near"]]),
        "skills": rows,
        "near_misses": near,
        "wordings": by_wording(prompts, routed, oracle, auto),
        "bars": {"share_of_oracle": SHARE_BAR, "auroc": AUROC_BAR},
        "passed": by_auto >= SHARE_BAR * best and overall >= AUROC_BAR,
    }


def by_wording(
    prompts: Sequence[Prompt], routed: Sequence[Routed], oracle: dict[int, bool], auto: dict[int, bool]
) -> list[dict[str, Any]]:
    """Wordings with anything wrong: how often what was chosen ("" is the base), how often answers were right."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.kind, prompt.skill, prompt.wording].append(i)
    found = []
    for (kind, skill, wording), places in groups.items():
        chosen = Counter(routed[i].chosen for i in places)
        row: dict[str, Any] = {
            "kind": kind, "skill": skill, "wording": wording, "prompts": len(places), "chosen": dict(chosen),
            "likeliest": dict(Counter(routed[i].likeliest for i in places)),
            "margin": float(np.mean([routed[i].margin for i in places])),
        }  # fmt: skip
        wrong = chosen[prompts[places[0]].adapter] < len(places)
        if kind != "near":
            row["oracle"], row["auto"] = (sum(r[i] for i in places) for r in (oracle, auto))
            wrong = wrong or row["oracle"] < len(places) or row["auto"] < len(places)
        if wrong:
            found.append(row)
    return found


def measure_changes(
    demo: Demo, prompts: Sequence[Prompt], changed: Sequence[str] | None, progress: Progress
) -> list[dict[str, Any]]:
    """For each adapter of `changed` (None: all): where its prompts go without it, and with ten examples of it again.

    `others_*` are the other adapters' prompts that reach their own: without it, and beside it.
    """
    asked = [p for p in prompts if p.kind == "adapter"]
    texts = [p.question.prompt for p in asked]
    cards = {adapter.name: adapter.examples for adapter in demo_adapters()}
    skills = {skill.name: skill for skill in adapter_skills()}
    names = tuple(cards) if changed is None else changed
    rows = []
    for done, name in enumerate(names):
        progress("adapters taken away and added", done, len(names))
        own = [p.adapter == name for p in asked]
        demo.remove(name)
        without = demo.route(texts)
        seconds = demo.learn(name, examples_of(skills[name], HOT_EXAMPLES))
        back = demo.route(texts)
        demo.learn(name, cards[name])
        gone = Counter(r.chosen for r, mine in zip(without, own, strict=True) if mine)
        count = sum(own)

        def others(routed: list[Routed], own: list[bool] = own) -> float:
            found = [r.chosen == p.adapter for r, p, mine in zip(routed, asked, own, strict=True) if not mine]
            return share(found)

        rows.append(
            {
                "adapter": name,
                "abstained": gone.pop("", 0) / count,
                "misrouted": {other: n / count for other, n in gone.most_common()},
                "others_without": others(without),
                "hot_examples": HOT_EXAMPLES,
                "hot_seconds": seconds,
                "hot_likeliest": share([r.likeliest == name for r, mine in zip(back, own, strict=True) if mine]),
                "hot_chosen": share([r.chosen == name for r, mine in zip(back, own, strict=True) if mine]),
                "others_beside": others(back),
            }
        )
    progress("adapters taken away and added", len(names), len(names))
    return rows


def measure_composites(demo: Demo, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Lines and whole answers that are right: by the base, the best named adapter, `auto`, and `auto` by a nucleus."""
    arms: dict[str, Callable[[Prompt], str]] = {
        "base": lambda p: BASE,
        "named adapter": lambda p: p.adapter,
        "auto, top 1": lambda p: "auto",
        f"auto, top_p {TOP_P:g}": lambda p: "auto",
    }
    rows = []
    for kind in ("mixed", "two"):
        asked = [p for p in prompts if p.kind == kind]
        for arm, model in arms.items():
            options = {"router": {"top_p": TOP_P}} if "top_p" in arm else {}
            answers = demo.answer([(model(p), p.question.prompt) for p in asked], **options)
            lines = [lines_right(p, answer) for p, answer in zip(asked, answers, strict=True)]
            rows.append(
                {
                    "kind": kind,
                    "arm": arm,
                    "prompts": len(asked),
                    "lines": share([line for found in lines for line in found]),
                    "whole": share([all(found) for found in lines]),
                }
            )
    return rows


def run(
    progress: Progress,
    prompts: Sequence[Prompt] | None = None,
    several_in_one: Sequence[Prompt] | None = None,
    changed: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures all of it, prints tables and a JSON object per part.

    By default on all of `router_prompts`, each adapter being taken away and added (`changed` names some).
    """
    prompts = fresh_prompts() if prompts is None else prompts
    several_in_one = composites() if several_in_one is None else several_in_one
    with demo() as running:
        progress("fresh prompts", 0, 1)
        fresh = measure_fresh(running, prompts)
        progress("fresh prompts", 1, 1)
        changes = measure_changes(running, prompts, changed, progress)
        several = measure_composites(running, several_in_one)
    sys.stdout.write(_fresh_tables(fresh) + _change_table(changes) + _composite_table(several))
    parts = {"demo, fresh": fresh, "demo, changes": {"adapters": changes}, "demo, composites": {"arms": several}}
    for name, part in parts.items():
        sys.stdout.write(json.dumps({"section": name, **part}) + "\n")
    return {"fresh": fresh, "changes": changes, "composites": several, "passed": fresh["passed"]}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _fresh_tables(fresh: dict[str, Any]) -> str:
    heading = ["fresh wordings, %", "prompts", "likeliest", "chosen", "abstained", "oracle right", "auto right"]
    rows = [heading]
    for row in fresh["skills"]:
        likeliest = _percent(row["likeliest"]) if row["kind"] == "adapter" else ""
        numbers = [_percent(row[key]) for key in ("chosen", "abstained", "oracle", "auto")]
        name = row["skill"] if row["kind"] == "adapter" else f"base: {row['skill']}"
        rows.append([name, str(row["prompts"]), likeliest, *numbers])
    numbers = [_percent(fresh[key]) for key in ("likeliest", "chosen", "false_abstentions", "oracle", "auto")]
    rows.append(["all adapters", str(fresh["prompts"]["adapter"]), *numbers])
    near = [["near misses", "prompts", "passed, %", "AUROC", "AUROC against its own"]]
    for row in fresh["near_misses"]:
        cells = [_percent(row["passed"]), f"{row['auroc']:.3f}", f"{row['auroc_own']:.3f}"]
        near.append([row["skill"], str(row["prompts"]), *cells])
    notes = (
        f"answers by auto are {_percent(fresh['share_of_oracle'])}% of the oracle's (bar {_percent(SHARE_BAR)}%)\n"
        f"AUROC {fresh['auroc']:.3f} (bar {AUROC_BAR:g}); base's own {fresh['auroc_base']:.3f}, near misses "
        f"{fresh['auroc_near']:.3f}\nat the default threshold: {_percent(fresh['false_abstentions'])}% of adapters' "
        f"prompts turned away, {_percent(fresh['passed_base'])}% of the base's own and "
        f"{_percent(fresh['passed_near'])}% of near misses passed to an adapter\n{fresh['calibration']}\n\n"
    )
    return f"{table(rows)}\n\n{table(near)}\n\n{notes}"


def _change_table(changes: list[dict[str, Any]]) -> str:
    rows = [["adapter, %", "gone: abstained", "misrouted", "others", f"{HOT_EXAMPLES} examples: likeliest", "chosen",
             "others", "ms", "misrouted to"]]  # fmt: skip
    for row in changes:
        left = [_percent(row["abstained"]), _percent(sum(row["misrouted"].values())), _percent(row["others_without"])]
        added = [_percent(row[key]) for key in ("hot_likeliest", "hot_chosen", "others_beside")]
        where = ", ".join(f"{name} {_percent(part)}" for name, part in row["misrouted"].items())
        rows.append([row["adapter"], *left, *added, f"{1e3 * row['hot_seconds']:.0f}", where])
    return f"{table(rows)}\n\n"


def _composite_table(several: list[dict[str, Any]]) -> str:
    rows = [["several questions in one prompt, %", "prompts", "lines right", "all lines right"]]
    names = {"mixed": "one adapter's and the base's", "two": "two adapters'"}
    for row in several:
        cells = [str(row["prompts"]), _percent(row["lines"]), _percent(row["whole"])]
        rows.append([f"{names[row['kind']]}: {row['arm']}", *cells])
    return f"{table(rows)}\n\n"
