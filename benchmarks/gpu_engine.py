"""The engine's decode step: the base alone, the same batch with 1 to 128 distinct adapters, and what switches cost.

A step is taken as the engine takes it, sampling and scheduling included: seconds are those between two returns of
`EngineCore.step` with every sequence decoding. Ratios are against the base step of the same batch in the same run, and
floors are `kernels/cost.py`'s bytes and FLOPs at this run's ceilings. Models have random weights, adapters are random,
of rank 16 on every linear.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_models import (
    LLAMA_8B,
    QWEN_05B,
    TINY_LLAMA,
    TINY_QWEN,
    Shape,
    engine_model,
    names_of,
    random_prompt,
    transformers_model,
    write_adapters,
)
from gpu_timing import Bench, Deadline, OutOfTimeError, Result, ms, percent, ratio, times
from report import table

from loramux.adapters_store.canonical import read_canonical
from loramux.adapters_store.digests import blob_path
from loramux.kernels.cost import Step, adapter_bytes, step_costs, step_floor
from loramux.kernels.lora import Segment
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import LoadedModel, UnsupportedModelError
from loramux.server.engine.protocol import AdapterRef, EngineRequest, SamplingParams

RANK = 16
WARMUP_STEPS = 10
POLL_SECONDS = 0.0005
ADAPTER_FILES = 8
ARENA_SHARE = 0.35
CHECK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the decode measurements are."""

    context: int
    steps: int
    arms: tuple[tuple[int, int], ...]
    """(sequences, distinct adapters), the base first in each batch."""

    @property
    def rows(self) -> int:
        """Sequences of the largest batch."""
        return max(rows for rows, _ in self.arms)

    @property
    def adapters(self) -> int:
        """Distinct adapters of the largest arm."""
        return max(distinct for _, distinct in self.arms)

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence may decode before the last step: while others are prefilled, and afterwards."""
        return self.context + WARMUP_STEPS + self.steps + 64


FULL = Sizes(512, 60, ((32, 0), (32, 1), (32, 8), (32, 32), (1, 0), (1, 1), (128, 0), (128, 32), (128, 128)))
SMALL = Sizes(8, 4, ((3, 0), (3, 1), (3, 3)))
SWITCHED = Sizes(512, 60, ((32, 0), (32, 32)))


@dataclass(frozen=True, slots=True)
class Switch:
    """Settings that turn one thing from its default. What needs a card, or minutes at toy sizes, is not `small`."""

    name: str
    settings: dict[str, Any]
    small: bool = True


SWITCHES = (
    Switch("default", {}),
    Switch("no CUDA graphs", {"cuda_graphs": False}),
    Switch("no overlap", {"overlap": False}),
    Switch("compiled layers", {"compile_layers": True}, small=False),
    Switch("deterministic", {"deterministic": True}),
    Switch("projections apart", {"packed_projections": False}),
    Switch("torch attention", {"attention_implementation": "torch"}),
    Switch("torch LoRA", {"lora_implementation": "torch"}),
    Switch("LoRA folded", {"lora_fold": True}, small=False),
    Switch("shrink on a side stream", {"lora_overlap": "stream"}, small=False),
    Switch("expand launched early", {"lora_overlap": "launch"}, small=False),
    Switch("LoRA folded, launched early", {"lora_overlap": "launch", "lora_fold": True}, small=False),
)


def shapes(small: bool) -> tuple[Shape, ...]:
    """The models to run; the smaller one, whose steps are bound by the host, last."""
    return (TINY_LLAMA, TINY_QWEN) if small else (LLAMA_8B, QWEN_05B)


def make_core(
    bench: Bench, model: LoadedModel, *, rows: int, tokens: int, arena_bytes: int, adapters: int, **settings: Any
) -> EngineCore:
    """A core for up to `rows` sequences of `tokens` tokens and `adapters` adapters in `arena_bytes`."""
    options: dict[str, Any] = {
        "model_path": "", "blob_dir": str(bench.folder), "max_num_seqs": rows, "max_batched_tokens": max(2048, rows),
        "max_model_len": tokens, "kv_cache_bytes": model.kv_bytes_per_token * (rows + 1) * (tokens + 16),
        "device_adapter_bytes": arena_bytes, "max_device_adapters": max(adapters, 1), "max_adapters_per_set": 1,
        "max_set_rank": 64, "threads": 1 if bench.small else None, **settings,
    }  # fmt: skip
    if bench.small:
        options["max_batched_tokens"] = 64
    return EngineCore(EngineConfig(**options), model)


def request(request_id: str, prompt: tuple[int, ...], tokens: int, adapter: str | None) -> EngineRequest:
    """A greedy request that ends with its length."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id, prompt, sampling, (AdapterRef(adapter),) if adapter else ())


def bring(core: EngineCore, adapters: Sequence[str], deadline: Deadline) -> None:
    """Loads the adapters and pins them."""
    for digest in adapters:
        core.pin_adapter(digest, True)
    wanted = set(adapters)
    while not wanted <= {a.digest for a in core.stats().adapters if a.device}:
        deadline.check()
        core.step()
        time.sleep(POLL_SECONDS)


def drain(core: EngineCore, request_ids: Sequence[str]) -> None:
    """Ends the requests and lets go of what is under way."""
    for request_id in request_ids:
        core.abort(request_id)
    while core.has_work():
        core.step()


def start(
    core: EngineCore, vocab: int, names: Sequence[str | None], context: int, tokens: int, deadline: Deadline
) -> list[str]:
    """A batch of which every sequence decodes; the ids of its requests."""
    ids = [f"row-{row}" for row in range(len(names))]
    for row, (request_id, name) in enumerate(zip(ids, names, strict=True)):
        core.add(request(request_id, random_prompt(0, row, context, vocab), tokens, name))
    while core.stats().running < len(names) or core.step().event.scheduled_tokens != len(names):
        deadline.check()
        if core.stats().running < len(names):
            core.step()
    return ids


def decode(
    bench: Bench, core: EngineCore, vocab: int, names: Sequence[str | None], sizes: Sizes, deadline: Deadline
) -> Result:
    """Seconds per step over `sizes.steps` steps in which every sequence decodes."""
    ids = start(core, vocab, names, sizes.context, sizes.max_tokens, deadline)
    gaps: list[float] = []
    try:
        for number in range(WARMUP_STEPS + sizes.steps):
            deadline.check()
            if number == WARMUP_STEPS:
                bench.synchronize()
            started = time.perf_counter()
            result = core.step()
            if number >= WARMUP_STEPS:
                gaps.append(time.perf_counter() - started)
            if result.event.scheduled_tokens != len(names):
                raise RuntimeError(f"a step of {result.event.scheduled_tokens} tokens among decodes of {len(names)}")
        bench.synchronize()
    finally:
        drain(core, ids)
    return {"seconds": statistics.fmean(gaps), "median_seconds": statistics.median(gaps), "worst_seconds": max(gaps)}


def floor(bench: Bench, shape: Shape, rows: int, distinct: int, sizes: Sizes, *, fold: bool = False) -> float | None:
    """The least seconds of such a step, in the middle of the measurement."""
    if bench.peaks is None:
        return None
    context = sizes.context + WARMUP_STEPS + sizes.steps // 2
    segments = [
        Segment(slot * rows // distinct, (slot + 1) * rows // distinct, ((slot, 1.0),)) for slot in range(distinct)
    ]
    ranks = dict.fromkeys(shape.modules(), RANK)
    costs = step_costs(
        shape.costs(bench.itemsize),
        Step(((1, context),) * rows, tuple(segments)),
        dict.fromkeys(range(distinct), ranks),
        fold=fold,
    )
    return step_floor(costs, bench.peaks)


def arena_for(bench: Bench, shape: Shape, wanted: int) -> tuple[int, int]:
    """(adapters that the arena holds, its bytes): as many as wanted, or as fit into a share of the free memory."""
    each = adapter_bytes(shape.costs(bench.itemsize).sites, RANK, bench.itemsize)
    each += 32 * len(shape.modules())  # each matrix is rounded up
    count = min(wanted, int(bench.free_bytes() * ARENA_SHARE) // each)
    return count, max(count, 1) * each


def run_decode(bench: Bench, result: Result, deadline: Deadline) -> None:
    """Both models, all arms."""
    sizes = SMALL if bench.small else FULL
    result["rows"], result["left_out"] = [], [shape.name for shape in shapes(bench.small)]
    for number, shape in enumerate(shapes(bench.small)):
        share = deadline.part(1 / (len(shapes(bench.small)) - number))
        try:
            _decode_shape(bench, shape, sizes, result["rows"], share)
            result["left_out"].remove(shape.name)
        except (torch.OutOfMemoryError, UnsupportedModelError) as error:
            result["rows"].append({"shape": shape.name, "error": f"{type(error).__name__}: {error}"})
        bench.release()
        deadline.check()


def _decode_shape(bench: Bench, shape: Shape, sizes: Sizes, rows: list[Result], deadline: Deadline) -> None:
    model = engine_model(shape, dtype=bench.dtype, device=bench.device)
    adapters, arena = arena_for(bench, shape, sizes.adapters)
    digests = write_adapters(
        bench.folder, shape.modules(), rank=RANK, count=adapters, files=ADAPTER_FILES, dtype=bench.dtype,
        device=bench.device, seed=1000,
    )  # fmt: skip
    tokens = sizes.context + sizes.max_tokens
    with closing(make_core(bench, model, rows=sizes.rows, tokens=tokens, arena_bytes=arena, adapters=adapters)) as core:
        base: dict[int, float] = {}
        first_rows = sizes.arms[0][0]
        found = decode(bench, core, shape.vocab, [None] * first_rows, sizes, deadline)
        alone = found["seconds"]
        _row(bench, shape, rows, first_rows, 0, found, alone, sizes, "base, before any adapter is loaded")
        bring(core, digests, deadline)
        for batch, distinct in sizes.arms:
            name = f"{distinct} adapters" if distinct else "base, adapters are loaded"
            if distinct > adapters:
                rows.append({"shape": shape.name, "arm": name, "sequences": batch, "error": "out of device memory"})
                continue
            found = decode(bench, core, shape.vocab, names_of(digests, batch, distinct), sizes, deadline)
            if not distinct:
                base[batch] = found["seconds"]
            reference = alone if batch == first_rows else base[batch]
            _row(bench, shape, rows, batch, distinct, found, reference, sizes, name)


def _row(
    bench: Bench, shape: Shape, rows: list[Result], batch: int, distinct: int, found: Result, base: float, sizes: Sizes,
    name: str,
) -> None:  # fmt: skip
    least = floor(bench, shape, batch, distinct, sizes)
    rows.append(
        {
            "shape": shape.name, "arm": name, "sequences": batch, "adapters": distinct, **found,
            "tokens_per_second": batch / found["seconds"], "base_ratio": found["seconds"] / base,
            "floor_seconds": least, "floor_share": ratio(least, found["seconds"]),
        }
    )  # fmt: skip


def run_switches(bench: Bench, result: Result, deadline: Deadline) -> None:
    """Each switch beside the default, for a base batch and one of distinct adapters; the smaller model first."""
    sizes = replace(SMALL, arms=((3, 0), (3, 3))) if bench.small else SWITCHED
    switches = [switch for switch in SWITCHES if switch.small or not bench.small]
    ordered = tuple(reversed(shapes(bench.small)))[: 1 if bench.small else None]
    result["rows"], result["left_out"] = [], [f"{shape.name}, {s.name}" for shape in ordered for s in switches]
    defaults: dict[tuple[str, int], float] = {}
    for number, shape in enumerate(ordered):
        share = deadline.part(1 / (len(ordered) - number))
        adapters, arena = arena_for(bench, shape, sizes.adapters)
        digests = write_adapters(
            bench.folder, shape.modules(), rank=RANK, count=adapters, files=ADAPTER_FILES, dtype=bench.dtype,
            device=bench.device, seed=2000,
        )  # fmt: skip
        for switch in switches:
            if share.passed:
                break
            try:
                rows = _switch(bench, shape, switch, digests, arena, sizes, deadline)
            except OutOfTimeError:
                raise
            except Exception as error:  # a setting that this model, card or machine refuses is a result, too
                rows = [{"error": f"{type(error).__name__}: {error}"}]
            for row in rows:
                row |= {"shape": shape.name, "switch": switch.name}
                if "seconds" in row:
                    default = defaults.setdefault((shape.name, row["adapters"]), row["seconds"])
                    row["default_ratio"] = row["seconds"] / default
            result["rows"] += rows
            result["left_out"].remove(f"{shape.name}, {switch.name}")
            bench.release()
        deadline.check()


def _switch(
    bench: Bench, shape: Shape, switch: Switch, digests: Sequence[str], arena: int, sizes: Sizes, deadline: Deadline
) -> list[Result]:
    """The rows of one setting, over a model of its own: some settings change it."""
    pack = switch.settings.get("packed_projections", True)
    model = engine_model(shape, dtype=bench.dtype, device=bench.device, pack=pack)
    core = make_core(
        bench, model, rows=sizes.rows, tokens=sizes.context + sizes.max_tokens, arena_bytes=arena,
        adapters=len(digests), **switch.settings,
    )  # fmt: skip
    rows: list[Result] = []
    with closing(core):
        bring(core, digests, deadline)
        for batch, distinct in sizes.arms:
            if distinct <= len(digests):
                found = decode(bench, core, shape.vocab, names_of(digests, batch, distinct), sizes, deadline)
                fold = bool(switch.settings.get("lora_fold"))
                least = floor(bench, shape, batch, distinct, sizes, fold=fold)
                share = ratio(least, found["seconds"])
                rows.append(
                    {"sequences": batch, "adapters": distinct, **found, "floor_seconds": least, "floor_share": share}
                )
    return rows


def check_tokens(bench: Bench, rows: list[Result], deadline: Deadline) -> None:
    """Greedy tokens of a mixed batch of tiny float32 models against transformers on the merged weights W + s B A."""
    for shape in (TINY_LLAMA, TINY_QWEN):
        deadline.check()
        digests = write_adapters(
            bench.folder, shape.modules(), rank=4, count=3, files=3, dtype=torch.float32, device=bench.device, std=0.3,
            seed=3000,
        )  # fmt: skip
        names: list[str | None] = [None, *digests]
        prompts = [random_prompt(1, row, 9 + 7 * row, shape.vocab) for row in range(len(names))]
        model = engine_model(shape, dtype=torch.float32, device=bench.device)
        found: dict[str, list[int]] = {}
        core = make_core(
            bench, model, rows=8, tokens=128, arena_bytes=1 << 24, adapters=8, max_batched_tokens=64, block_size=8
        )  # fmt: skip
        with closing(core):
            for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
                core.add(request(str(row), prompt, CHECK_TOKENS, name))
            while core.has_work():
                deadline.check()
                for output in core.step().outputs:
                    found.setdefault(output.request_id, []).extend(output.token_ids)
        expected = [_merged(bench, shape, name, prompt) for name, prompt in zip(names, prompts, strict=True)]
        base = [_merged(bench, shape, None, prompt) for prompt in prompts]
        equal = sum(found.get(str(row)) == tokens for row, tokens in enumerate(expected))
        changed = sum(a != b for a, b in zip(expected[1:], base[1:], strict=True))
        rows.append(
            {
                "case": f"{shape.name}, tokens of {len(names)} requests", "equal": equal, "of": len(names),
                "changed_by_adapters": changed, "good": equal == len(names) and changed == len(digests),
            }
        )  # fmt: skip


@torch.inference_mode()
def _merged(bench: Bench, shape: Shape, digest: str | None, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens of transformers' own model with the adapter added to its weights."""
    model = transformers_model(shape, dtype=torch.float32, device=bench.device, attention="sdpa")
    if digest is not None:
        for module, pair in read_canonical(blob_path(bench.folder, digest), dtype=torch.float32).items():
            weight = model.get_submodule(module).weight
            weight += pair.scale * (pair.B.to(bench.device) @ pair.A.to(bench.device))
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt], device=bench.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=CHECK_TOKENS, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def show_decode(result: Result) -> str:
    """The arms."""
    lines = [["decode step", "sequences", "ms", "of base", "floor ms", "floor/ours", "tokens/s"]]
    for row in result["rows"]:
        if "error" in row:
            lines.append([f"{row['shape']}: {row.get('arm', '')} {row['error']}", "", "", "", "", "", ""])
            continue
        lines.append(
            [
                f"{row['shape']}, {row['arm']}", str(row["sequences"]), ms(row["seconds"]), times(row["base_ratio"]),
                ms(row["floor_seconds"]), percent(row["floor_share"]), f"{row['tokens_per_second']:.0f}",
            ]
        )  # fmt: skip
    return table(lines)


def show_switches(result: Result) -> str:
    """The switches."""
    lines = [["switch turned", "adapters", "ms", "of default", "floor ms", "floor/ours"]]
    for row in result["rows"]:
        if "error" in row:
            lines.append([f"{row['shape']}, {row['switch']}: {row['error'][:100]}", "", "", "", "", ""])
            continue
        lines.append(
            [
                f"{row['shape']}, {row['switch']}", str(row["adapters"]), ms(row["seconds"]),
                times(row["default_ratio"]), ms(row["floor_seconds"]), percent(row["floor_share"]),
            ]
        )  # fmt: skip
    return table(lines)
