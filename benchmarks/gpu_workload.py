"""S-LoRA's workload through the engine in this process: throughput, first-token and inter-token latency; then PEFT's.

Requests arrive by the wall clock as `workload.py` draws them (Gamma arrivals, power-law adapters, lengths 8 to 512), or
all at once ("burst", for throughput). Adapters have rank 8 on q, k, v and o, as S-LoRA's setting for 7B models; every
run begins with none on the device or in host memory, so loads from disk (through the page cache) are part of it, and
with many adapters also evictions. PEFT runs the same trace in static batches by `adapter_names`, in order of arrival,
each until its longest request ends; its adapters are on the device beforehand, which favours it. Runs end at their
share of the section's time: what has not ended by then is counted as unfinished.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_engine import ARENA_SHARE, POLL_SECONDS, drain, make_core, request
from gpu_models import (
    ATTENTION_PROJECTIONS,
    LLAMA_8B,
    TINY_LLAMA,
    Shape,
    engine_model,
    transformers_model,
    write_adapters,
)
from gpu_timing import Bench, Deadline, OutOfTimeError, Result
from report import table

from loramux.server.bench.latency import Run, summarise
from loramux.server.bench.openai_stream import Call, Outcome
from loramux.server.bench.workload import Request, Workload, generate, prompt_ids
from loramux.server.engine.core import EngineCore

RANK = 8
ADAPTER_FILES = 16
ARENA_BYTES = 4 << 30
HOST_BYTES = 8 << 30
SLO_TTFT_SECONDS = 6.0
SEED = 42
ARRIVAL_SHARE = 0.6
LAST_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: who serves, adapters and their skew, requests per second (0: all at once), its share of the time."""

    server: str
    adapters: int
    alpha: float
    rate: float
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large runs are: sequences at once, PEFT's batch, lengths, requests of a burst, most seconds of arrivals."""

    shape: Shape
    sequences: int
    peft_batch: int
    lengths: tuple[int, int]
    burst: int
    arrivals: float
    arms: tuple[Arm, ...]


def arms() -> tuple[Arm, ...]:
    """Throughput first, then latencies over S-LoRA's skews, then PEFT, whose adapters take a while to add."""
    bursts = [Arm("loramux", adapters, 1.0, 0) for adapters in (0, 5, 100, 1000)]
    rated = [Arm("loramux", adapters, alpha, 8.0) for alpha in (1.0, 0.3, 0.1) for adapters in (5, 100, 1000)]
    return (*bursts, *rated, Arm("peft", 5, 1.0, 0, weight=2), Arm("peft", 100, 1.0, 0, weight=3))


FULL = Sizes(LLAMA_8B, 128, 32, (8, 512), 256, 30.0, arms())
SMALL = Sizes(
    TINY_LLAMA, 4, 4, (4, 8), 6, 0.2, (Arm("loramux", 0, 1.0, 0), Arm("loramux", 3, 0.3, 50.0), Arm("peft", 3, 1.0, 0))
)


def trace_of(arm: Arm, sizes: Sizes, seconds: float) -> list[Request]:
    """The requests of a run that may take so long."""
    requests = sizes.burst if arm.rate == 0 else max(int(arm.rate * min(seconds * ARRIVAL_SHARE, sizes.arrivals)), 1)
    return generate(
        Workload(
            requests=requests, adapters=arm.adapters, rate=arm.rate, alpha=arm.alpha, input=sizes.lengths,
            output=sizes.lengths, seed=SEED,
        )
    )  # fmt: skip


def outcome_of(asked: Request, name: str, started: float) -> Outcome:
    """The record of a request that is due."""
    return Outcome(
        Call(asked.at, name, "", b""), due=started + asked.at, sent=time.perf_counter(),
        prompt_tokens=asked.input_tokens,
    )  # fmt: skip


def finish(outcome: Outcome, now: float) -> None:
    """The request has all its tokens."""
    outcome.ended, outcome.finish_reason, outcome.usage_tokens = now, "length", len(outcome.times)


def serve(core: EngineCore, trace: Sequence[Request], digests: Sequence[str], vocab: int, deadline: Deadline) -> Run:
    """The trace through the engine, in real time, until everything has ended or the deadline."""
    run = Run([Call(r.at, str(r.adapter), "", b"") for r in trace])
    waiting, open_requests = deque(trace), dict[str, Outcome]()
    started, cpu = time.perf_counter(), time.process_time()
    while (waiting or open_requests) and not deadline.passed:
        while waiting and started + waiting[0].at <= time.perf_counter():
            asked = waiting.popleft()
            name = None if asked.adapter is None else digests[asked.adapter]
            outcome = outcome_of(asked, str(asked.adapter), started)
            run.outcomes.append(outcome)
            open_requests[str(asked.index)] = outcome
            prompt = tuple(prompt_ids(SEED, asked, LAST_TOKEN + 1, vocab))
            core.add(request(str(asked.index), prompt, asked.output_tokens, name))
        if not core.has_work():
            time.sleep(min(max(started + waiting[0].at - time.perf_counter(), 0.0), deadline.left))
            continue
        outputs = core.step().outputs
        now = time.perf_counter()
        for output in outputs:
            outcome = open_requests[output.request_id]
            outcome.times += [now] * len(output.token_ids)
            if output.error is not None:
                outcome.error, outcome.detail, outcome.ended = "engine", output.error, now
            elif output.finish_reason is not None:
                finish(outcome, now)
            if outcome.ended is not None:
                del open_requests[output.request_id]
        if core.is_waiting_only():
            time.sleep(POLL_SECONDS)
    run.seconds, run.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    drain(core, list(open_requests))
    return run


class _Clock:
    """A stopping criterion that notes when each token of the batch came, and ends it at the deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self.times: list[float] = []
        self._deadline = deadline

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether each row is done."""
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self._deadline.passed, dtype=torch.bool, device=input_ids.device)


def serve_peft(model: Any, trace: Sequence[Request], vocab: int, batch: int, deadline: Deadline) -> Run:
    """The trace through PEFT's mixed batch, static batches of at most `batch` requests in order of arrival."""
    device = model.device
    run = Run([Call(r.at, str(r.adapter), "", b"") for r in trace])
    waiting = deque(trace)
    started, cpu = time.perf_counter(), time.process_time()
    while waiting and not deadline.passed:
        asked: list[Request] = []
        while waiting and len(asked) < batch and started + waiting[0].at <= time.perf_counter():
            asked.append(waiting.popleft())
        if not asked:
            time.sleep(min(max(started + waiting[0].at - time.perf_counter(), 0.0), deadline.left))
            continue
        outcomes = [outcome_of(r, str(r.adapter), started) for r in asked]
        for outcome in outcomes:
            outcome.sent = outcome.due  # it waited for the batch before
        run.outcomes += outcomes
        longest = max(r.input_tokens for r in asked)
        ids = torch.zeros(len(asked), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, r in enumerate(asked):
            ids[row, longest - r.input_tokens :] = torch.tensor(prompt_ids(SEED, r, LAST_TOKEN + 1, vocab))
            mask[row, longest - r.input_tokens :] = 1
        clock = _Clock(deadline)
        with torch.inference_mode():
            model.generate(
                ids.to(device), attention_mask=mask.to(device), adapter_names=[_peft_name(r.adapter) for r in asked],
                max_new_tokens=max(r.output_tokens for r in asked), do_sample=False, pad_token_id=0,
                stopping_criteria=[clock],
            )  # fmt: skip
        for r, outcome in zip(asked, outcomes, strict=True):
            outcome.times = clock.times[: r.output_tokens]
            if len(outcome.times) == r.output_tokens:
                finish(outcome, outcome.times[-1])
    run.seconds, run.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return run


def _peft_name(adapter: int | None) -> str:
    return "__base__" if adapter is None else f"a{adapter}"


@dataclass(slots=True)
class Peft:
    """transformers' model with random PEFT adapters a0, a1, ... of the workload's rank and targets."""

    bench: Bench
    shape: Shape
    model: Any = None
    adapters: int = 0

    def ensure(self, adapters: int, deadline: Deadline) -> None:
        """Adds what is missing. Raises ImportError without PEFT, OutOfTimeError when adding takes too long."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION_PROJECTIONS), task_type="CAUSAL_LM",
            init_lora_weights=False,
        )  # fmt: skip
        if self.model is None:
            bench = self.bench
            base = transformers_model(self.shape, dtype=bench.dtype, device=bench.device, attention="sdpa")
            base.generation_config.eos_token_id = None
            self.model, self.adapters = get_peft_model(base, config, "a0", autocast_adapter_dtype=False).eval(), 1
        while self.adapters < adapters:
            deadline.check()
            self.model.add_adapter(f"a{self.adapters}", config, autocast_adapter_dtype=False)
            self.adapters += 1
        self.model.eval()


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """All arms; each has its share of the time that is left to it and those behind it."""
    sizes = SMALL if bench.small else FULL
    result["model"], result["rank"], result["rows"] = sizes.shape.name, RANK, []
    result["left_out"] = left = [_name(arm) for arm in sizes.arms]
    most = max(arm.adapters for arm in sizes.arms)
    modules = sizes.shape.modules(ATTENTION_PROJECTIONS)
    digests = write_adapters(
        bench.folder, modules, rank=RANK, count=most, files=ADAPTER_FILES, dtype=bench.dtype, device=bench.device,
        seed=4000,
    )  # fmt: skip
    peft = Peft(bench, sizes.shape)
    core: EngineCore | None = None
    try:
        for number, arm in enumerate(sizes.arms):
            deadline.check()
            if core is not None and arm.server == "peft":
                core.close()
                core = None
                bench.release()
            elif core is None and arm.server != "peft":
                core = _core(bench, sizes, len(digests))
            share = deadline.part(arm.weight / sum(a.weight for a in sizes.arms[number:]))
            row = _run_peft(peft, sizes, arm, share) if core is None else _run_ours(core, sizes, arm, digests, share)
            result["rows"].append({"arm": _name(arm), "server": arm.server, "adapters": arm.adapters,
                                   "alpha": arm.alpha, "rate": arm.rate, **row})  # fmt: skip
            left.pop(0)
    finally:
        if core is not None:
            core.close()


def _core(bench: Bench, sizes: Sizes, adapters: int) -> EngineCore:
    model = engine_model(sizes.shape, dtype=bench.dtype, device=bench.device)
    arena = 1 << 20 if bench.small else min(ARENA_BYTES, int(bench.free_bytes() * ARENA_SHARE))
    return make_core(
        bench, model, rows=sizes.sequences, tokens=2 * sizes.lengths[1], arena_bytes=arena, adapters=adapters,
        host_adapter_bytes=1 << 24 if bench.small else HOST_BYTES,
    )  # fmt: skip


def _run_ours(core: EngineCore, sizes: Sizes, arm: Arm, digests: Sequence[str], deadline: Deadline) -> Result:
    for digest in digests:
        core.forget_adapter(digest)
    while core.has_work():
        core.step()
    before = core.stats()
    found = summary(serve(core, trace_of(arm, sizes, deadline.left), digests, sizes.shape.vocab, deadline))
    after = core.stats()
    loads = after.adapter_loads - before.adapter_loads
    spent = after.adapter_load_seconds_sum - before.adapter_load_seconds_sum
    return {
        **found, "adapter_loads": loads, "adapter_load_seconds_mean": spent / loads if loads else None,
        "adapter_evictions": after.adapter_evictions - before.adapter_evictions,
        "preemptions": after.preemptions - before.preemptions,
    }  # fmt: skip


def _run_peft(peft: Peft, sizes: Sizes, arm: Arm, deadline: Deadline) -> Result:
    try:
        peft.ensure(arm.adapters, deadline.part(0.7))
    except ImportError:
        return {"error": "peft is not installed"}
    except OutOfTimeError:
        return {"error": f"adding {arm.adapters} adapters took this run's time; there were {peft.adapters}"}
    except torch.OutOfMemoryError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    trace = trace_of(arm, sizes, deadline.left)
    return summary(serve_peft(peft.model, trace, sizes.shape.vocab, sizes.peft_batch, deadline))


def summary(run: Run) -> Result:
    """What `benchmarks/serve.py` reports of a run, without the rows of single adapters."""
    found = summarise(run, SLO_TTFT_SECONDS)
    generated = sum(len(outcome.times) for outcome in run.outcomes)
    return {"generated_tokens_per_second": generated / run.seconds} | {
        name: found[name]
        for name in (
            "seconds", "requests", "prompt_tokens", "output_tokens", "requests_per_second",
            "output_tokens_per_second", "ttft_seconds", "ttft_cold_seconds", "itl_seconds", "tpot_seconds",
            "e2e_seconds", "slo", "fairness", "errors",
        )
    }  # fmt: skip


def _name(arm: Arm) -> str:
    how = "burst" if arm.rate == 0 else f"{arm.rate:g}/s, alpha {arm.alpha:g}"
    return f"{arm.server}, {arm.adapters} adapters, {how}"


def show(result: Result) -> str:
    """The runs."""
    lines = [["run", "done/sent", "req/s", "tokens/s", "TTFT p50", "p99 s", "ITL p50", "p99 ms", "loads", "evictions"]]
    for row in result["rows"]:
        if "error" in row:
            lines.append([f"{row['arm']}: {row['error']}", *[""] * 9])
            continue
        counts, ttft, itl = row["requests"], row["ttft_seconds"], row["itl_seconds"]
        lines.append(
            [
                row["arm"], f"{counts['completed']}/{counts['sent']}", f"{row['requests_per_second']:.2f}",
                f"{row['generated_tokens_per_second']:.0f}", _number(ttft["p50"], 1), _number(ttft["p99"], 1),
                _number(itl["p50"], 1e3), _number(itl["p99"], 1e3), str(row.get("adapter_loads", "-")),
                str(row.get("adapter_evictions", "-")),
            ]
        )  # fmt: skip
    return table(lines)


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.2f}"
