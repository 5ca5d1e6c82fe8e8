"""What `model: "auto"` costs: milliseconds of a decision, and time to first token over a named adapter, over HTTP.

Decisions: `RouterPolicy.plan` and `Plan.decide` among ten thousand adapters of three centroids of 384 numbers each, the
query's embedding being there. Time to first token: the embedded demo on servers that have 8, 100 and 10,000 registered
adapters. Those beside the demo's eight are rank-1 cuts of them, of distinct contents, registered before the server
starts through the store's own API with one example each; a candidate takes the room of three centroids whatever it
has, so all count in full. Every prompt is asked once, so that no cache answers for the router.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from report import table
from router_demo import Demo, demo
from safetensors.torch import load_file, save

from loramux.adapters_store.base_spec import base_spec_from_config
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore
from loramux.router.gallery import Gallery
from loramux.router.interface import BASE, Floats, Progress
from loramux.router.policy import Pool, RouterPolicy
from loramux.server.api.serve import register, structure_of
from loramux.server.bench.http_client import find_target
from loramux.server.bench.latency import percentile, ttfts
from loramux.server.bench.openai_stream import Call, Outcome, ask
from loramux.server.demo.assets import demo_adapters, demo_base_path
from loramux.server.demo.skills import adapter_skills, phrase
from loramux.server.engine.loading import load_config
from loramux.server.settings import Settings

ADAPTERS, DIM, EXAMPLES = 10_000, 384, 12  # twelve examples make three centroids
QUERIES = 200
DECISION_BAR_MS = 5.0
REGISTERED = (8, 100, 10_000)
BATCHES: Mapping[int, int] = {1: 64, 16: 12}  # requests at once: rounds
TIMEOUT = 120.0
MAX_TOKENS = 4
KINDS = (
    "limerick", "contract clause", "press release", "bug report", "recipe", "haiku", "product review", "sermon",
    "job advert", "lab protocol", "travel plan", "eulogy", "quiz", "patent claim", "lullaby", "weather report",
    "menu", "lesson plan", "film plot", "court ruling",
)  # fmt: skip
TOPICS = (
    "otters", "tax law", "diesel engines", "the Alps", "sourdough", "jazz", "vaccines", "chess", "tulips", "beekeeping",
    "satellites", "knitting", "glaciers", "cricket", "cement", "tea", "mortgages", "violins", "drought", "ferries",
    "robots", "cheese", "marathons", "opera", "lighthouses",
)  # fmt: skip
READERS = (
    "nurses", "pilots", "farmers", "toddlers", "judges", "sailors", "bankers", "monks", "divers", "voters", "miners",
    "bakers", "tourists", "editors", "plumbers", "spies", "poets", "tenants", "referees", "astronauts",
)  # fmt: skip


def clouds(count: int, examples: int, dim: int, seed: int = 0) -> Floats:
    """Examples of `count` made-up adapters: unit rows around a centre each, float32 [count, examples, dim]."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, 1, dim)) + 0.7 * generator.normal(size=(count, examples, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def measure_decisions(adapters: int, queries: int, dim: int = DIM) -> dict[str, Any]:
    """Milliseconds from an embedding to the decision, all adapters being candidates."""
    rows = clouds(adapters, EXAMPLES, dim)
    names = [f"adapter-{i}" for i in range(adapters)]
    gallery = Gallery(dim)
    start = time.perf_counter()
    gallery.put_many((name, found, "examples") for name, found in zip(names, rows, strict=True))
    gallery.put(BASE, clouds(1, 144, dim, seed=1)[0])
    built = time.perf_counter() - start
    policy = RouterPolicy()
    policy.use_gallery(gallery, "made up")
    pool = Pool(names)
    own = np.random.default_rng(2).integers(0, adapters, queries)
    seconds, hits = [], 0
    for row, place in zip(clouds(adapters, 1, dim, seed=3)[own, 0] * 0.5 + rows[own, 0], own, strict=True):
        start = time.perf_counter()
        decision = policy.plan(pool).decide(row)
        seconds.append(time.perf_counter() - start)
        hits += decision.scores[0][0] == names[place]
    return {
        "adapters": adapters,
        "centroids": 3,
        "dim": dim,
        "queries": queries,
        "build_seconds": built,
        "own_adapter_first": hits / queries,
        "ms": points(seconds),
        "bar_ms": DECISION_BAR_MS,
    }


def points(seconds: Sequence[float]) -> dict[str, float]:
    """p10, p50 and p90 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{q}": 1e3 * percentile(ordered, q) for q in (10, 50, 90)}


def topics(count: int) -> list[str]:
    """`count` distinct prompts that no skill of the demo has to do with."""
    made = [f"Draft a {kind} about {topic} for {reader}." for kind, topic, reader in product(KINDS, TOPICS, READERS)]
    Random(0).shuffle(made)
    return made[:count]


def fill(store_dir: Path, count: int, progress: Progress) -> None:
    """Registers the demo's adapters and tiny ones in a server's store, `count` in all."""
    path = demo_base_path()
    settings = Settings.model_validate({"model": str(path), "store_dir": store_dir})
    spec = base_spec_from_config(load_config(path), name=settings.base_name)
    store = AdapterStore(settings.store_root(structure_of(spec)), spec, StoreLimits(max_adapters=count))
    try:
        own = demo_adapters()
        register(store, own)
        cuts = [_cut(adapter.path) for adapter in own]
        for i, text in enumerate(topics(count - len(own))):
            if i % 500 == 0:
                progress(f"registering {count} adapters", i, count)
            config, weights = cuts[i % len(cuts)]
            scale = 1 + i / count  # distinct contents
            with store.begin_upload() as upload:
                for name, data in (
                    ("adapter_config.json", config),
                    ("adapter_model.safetensors", save({key: tensor * scale for key, tensor in weights.items()})),
                ):
                    sink = upload.open_file(name)
                    sink.write(data)
                    sink.close()
                store.commit(upload, name=f"tiny-{i}", examples=[text])
    finally:
        store.close()


def _cut(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The first rank of one module of an adapter, in float32: PEFT's configuration, and its tensors."""
    weights = load_file(folder / "adapter_model.safetensors")
    (first,) = [key for key in weights if key.endswith("layers.0.self_attn.q_proj.lora_A.weight")]
    second = first.replace("lora_A", "lora_B")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "layers_to_transform": [0],
               "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    return json.dumps(config).encode(), {
        first: weights[first][:1].float().contiguous(),
        second: weights[second][:, :1].float().contiguous(),
    }


def prompts(count: int, rng: Random) -> list[tuple[str, str]]:
    """(adapter, prompt) pairs in trained wordings, the adapters in turn, arguments at random."""
    skills = adapter_skills()
    chosen = [skills[i % len(skills)] for i in range(count)]
    return [(skill.name, phrase(rng.choice(skill.wordings), skill.argument(rng, "fresh"))) for skill in chosen]


def measure_first_tokens(demo: Demo, batch: int, rounds: int, rng: Random) -> dict[str, Any]:
    """Seconds to the first token of `batch` requests at once, named and by `auto` in turns, and what `auto` chose."""
    target = find_target(f"http://{demo.server.host}:{demo.server.port}")
    seconds: dict[str, list[float]] = {"named": [], "auto": []}
    asked: list[tuple[str, str]] = []

    async def together(calls: list[Call]) -> list[Outcome]:
        outcomes = [Outcome(call, time.perf_counter()) for call in calls]
        await asyncio.gather(*(ask(target, outcome, timeout=TIMEOUT) for outcome in outcomes))
        return outcomes

    for turn in range(rounds):
        for arm in ("named", "auto") if turn % 2 else ("auto", "named"):
            drawn = prompts(batch, rng)
            if arm == "auto":
                asked += drawn
            calls = [_call("auto" if arm == "auto" else name, text) for name, text in drawn]
            outcomes = asyncio.run(together(calls))
            failed = [f"{o.error} {o.detail}" for o in outcomes if not o.completed]
            if failed:
                raise RuntimeError(f"a request of the measurement failed: {failed[0]}")
            seconds[arm] += ttfts(outcomes)
    chosen = demo.route([text for _, text in asked])
    named, auto = (statistics.median(seconds[arm]) for arm in ("named", "auto"))
    return {
        "batch": batch,
        "requests": len(asked),
        "named_ms": points(seconds["named"]),
        "auto_ms": points(seconds["auto"]),
        "auto_over_named_ms": 1e3 * (auto - named),
        "auto_over_named": auto / named,
        "chose_the_named": sum(r.chosen == name for r, (name, _) in zip(chosen, asked, strict=True)) / len(asked),
    }


def _call(model: str, text: str) -> Call:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True,
            "max_tokens": MAX_TOKENS}  # fmt: skip
    return Call(0.0, model, "/v1/chat/completions", json.dumps(body).encode())


def measure_server(count: int, batches: Mapping[int, int], progress: Progress) -> list[dict[str, Any]]:
    """Times to first token on a server with `count` registered adapters, by batch."""
    rng = Random(count)
    with TemporaryDirectory() as folder:
        fill(Path(folder), count, progress)
        with demo("--store-dir", folder, registered=True) as server:
            for batch in batches:
                measure_first_tokens(server, batch, 4, rng)  # adapters onto the device, first shapes
            rows = []
            for batch, rounds in batches.items():
                progress(f"{count} adapters, {batch} at once", 0, 1)
                row = measure_first_tokens(server, batch, rounds, rng)
                rows.append({"adapters": count, "known_seconds": server.known_seconds, **row})
            progress(f"{count} adapters", 1, 1)
            return rows


def run(
    progress: Progress,
    *,
    adapters: int = ADAPTERS,
    registered: Sequence[int] = REGISTERED,
    batches: Mapping[int, int] = BATCHES,
) -> dict[str, Any]:
    """Measures, prints the tables and one JSON object; returns it."""
    progress("decisions", 0, 1)
    decisions = measure_decisions(adapters, QUERIES)
    progress("decisions", 1, 1)
    first = [row for count in registered for row in measure_server(count, batches, progress)]
    ms = decisions["ms"]
    rows = [["decision after encoding", "p10 ms", "p50 ms", "p90 ms", "bar"]]
    size = f"{decisions['adapters']} adapters x {decisions['centroids']} centroids x {decisions['dim']}"
    rows.append([size, *(f"{ms[key]:.2f}" for key in ("p10", "p50", "p90")), f"{DECISION_BAR_MS:g}"])
    times = [["time to first token, ms", "at once", "named p10", "p50", "p90", "auto p10", "p50", "p90", "over named",
              "same adapter"]]  # fmt: skip
    for row in first:
        cells = [f"{row[arm][key]:.1f}" for arm in ("named_ms", "auto_ms") for key in ("p10", "p50", "p90")]
        over = f"{row['auto_over_named_ms']:+.1f}"
        same = f"{100 * row['chose_the_named']:.0f}%"
        times.append([f"{row['adapters']} registered", str(row["batch"]), *cells, over, same])
    sys.stdout.write(f"{table(rows)}\n\n{table(times)}\n\n")
    parts = {"decisions": decisions, "first_tokens": first, "passed": ms["p50"] < DECISION_BAR_MS}
    sys.stdout.write(json.dumps({"section": "latency", **parts}) + "\n")
    return parts
