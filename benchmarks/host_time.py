"""Host time of an engine step outside the model: what the processor does while a card could be waiting.

    PYTHONPATH=src python benchmarks/host_time.py [--batch 256] [--plans triton] [--profile] [--out FILE]

The engine's own core decodes a full batch with a model whose forward pass returns the same logits at once, on one core
of the CPU. `--plans triton` takes the way that a card takes: the kernels' LoRA and attention plans, for steps of
decodes the static inputs of captured graphs, and a loop that prepares a step while the one before is under way.

Counted: taking requests in and out, scheduling, block tables, building inputs and both plans, the choice of tokens,
what becomes of them, encoding the outputs for the API's process; every copy and every operation on tensors that the
host launches for these, each with its price on a CPU.

Not counted: the model's forward pass (on a card, one graph launch), the kernels of both plans, sending the encoded
outputs, and on a card the events and pinned memory of copies. `--vocab` is 8 by default, so that choosing tokens
costs its launches, not its arithmetic, which is the card's; with `--plans torch` the zeroes written to new blocks are
the device's work too, but counted.

A part's time excludes that of the parts it calls. Times are the engine thread's processor time, medians over steps; on
a machine that does other work, which empties the caches, the tenth percentile is the better guide.
"""

import argparse
import cProfile
import functools
import gc
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from report import environment, publish, table

from loramux.server.bench.latency import percentile

if TYPE_CHECKING:
    from loramux.server.engine.core import EngineCore, StepResult

BAR_SECONDS = 1e-3
BLOCK_SIZE = 16
ARRIVING_PROMPT = 32
ROW_STRIDE = 37
MODEL = "model (stub)"
WIRE = "wire encode"
PARTS = (
    ("add", "requests"),
    ("abort", "requests"),
    ("tier.poll", "adapters"),
    ("scheduler.schedule", "schedule"),
    ("runner.attention.clear", "clear blocks"),
    ("runner.launch", "inputs"),
    ("runner.attention.begin", "attention plan"),
    ("backend.plan", "lora plan"),
    ("model.forward", MODEL),
    ("_launch", "launch"),
    ("_complete", "outputs"),
    ("step", "step"),
)
"""Methods under the core, outermost last, and the part of a step that each is; the runner's `sample` and `best` too."""


@dataclass(slots=True)
class Stopwatch:
    """Processor seconds of named parts, each without those of the parts it calls, summed until `take`."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, with its time added to the part's."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - started
                self.seconds[part] = self.seconds.get(part, 0.0) + taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return wrapper

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


@contextmanager
def instrumented(core: "EngineCore", watch: Stopwatch) -> Iterator[None]:
    """Times the engine's parts inside the block. Raises AttributeError for a part that the engine no longer has."""
    from loramux.server.engine import runner

    changes: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)
        changes.append((owner, name, original))
        setattr(owner, name, watch.timed(original, part))

    try:
        for path, part in PARTS:
            *objects, method = path.split(".")
            change(type(functools.reduce(getattr, objects, core)), method, part)
        change(runner, "sample", "sampling")
        change(runner, "best", "sampling")
        yield
    finally:
        for owner, name, original in reversed(changes):
            setattr(owner, name, original)


def encoder() -> Callable[["StepResult"], bytes] | None:
    """What the engine process does with a step's result; None where msgpack or ZeroMQ is not installed."""
    try:
        import msgpack

        from loramux.server.engine.transport import ColumnEncoder, Report, encode_event
    except ImportError:
        return None
    columns = ColumnEncoder()

    def encode(result: "StepResult") -> bytes:
        column = columns.encode(result.column.request_ids, result.column.tokens)
        packed: bytes = msgpack.packb([Report.STEP, *column, result.others, encode_event(result.event)])
        return packed

    return encode


def stub_core(args: argparse.Namespace, folder: Path) -> tuple["EngineCore", list[str]]:
    """A core whose model has the real number of layers, at toy widths, and returns fixed logits; adapters for it."""
    import torch
    from gpu_models import Shape, engine_model, write_adapters

    from loramux.server.engine.config import EngineConfig
    from loramux.server.engine.core import EngineCore
    from loramux.server.engine.graphs import DecodeGraphs
    from loramux.server.engine.runner import Runner

    shape = Shape("stub", "llama", args.vocab, 32, 32, args.layers, 2, 1, 16)
    cpu = torch.device("cpu")
    model = engine_model(shape, dtype=torch.float32, device=cpu)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, args.batch, args.vocab, generator=generator)
    model.module.forward = lambda *_, logits_to_keep, **__: SimpleNamespace(logits=logits[:, : len(logits_to_keep)])
    digests = write_adapters(
        folder, shape.modules(), rank=args.rank, count=args.adapters, files=args.adapters, dtype=torch.float32,
        device=cpu,
    )  # fmt: skip
    tokens = args.context + BLOCK_SIZE + new_tokens(args)
    core = EngineCore(
        EngineConfig(
            model_path="", blob_dir=str(folder), dtype="float32", device="cpu", threads=1, max_num_seqs=args.batch,
            max_batched_tokens=step_budget(args), max_model_len=tokens, decode_workspace=False, block_size=BLOCK_SIZE,
            kv_cache_bytes=model.kv_bytes_per_token * args.batch * (tokens + 32), lora_implementation=args.plans,
            attention_implementation=args.plans, device_adapter_bytes=1 << 28,
            overlap=args.plans == "triton" if args.overlap is None else args.overlap,
        ),
        model,
    )  # fmt: skip
    if args.plans == "triton":
        path = core.runner.attention
        graphs = DecodeGraphs(model, core.backend, path, max_rows=args.batch, capture=False)
        core.runner = Runner(model, core.backend, path, block_size=BLOCK_SIZE, graphs=graphs)
    for digest in digests:
        core.pin_adapter(digest, True)
    while core.tier.loads < len(digests):
        core.step()
    return core, digests


@dataclass(frozen=True, slots=True)
class Arm:
    """A batch: how many distinct adapters share it, how its tokens are chosen, whether it changes in every step."""

    name: str
    distinct: int
    sampling: dict[str, Any]
    arrivals: bool = False


def arms(adapters: int) -> list[Arm]:
    """Base and adapters, greedy and drawn, and adapters with a request that ends and one that arrives in each step."""
    greedy, drawn = {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95}
    return [
        Arm("base", 0, greedy),
        Arm(f"{adapters} adapters", adapters, greedy),
        Arm(f"{adapters} adapters, arrivals", adapters, greedy, arrivals=True),
        Arm(f"{adapters} adapters, drawn", adapters, drawn),
    ]


class Batch:
    """The requests of an arm in the engine."""

    def __init__(self, core: "EngineCore", arm: Arm, adapters: list[str], args: argparse.Namespace) -> None:
        """Brings a full batch to where every sequence decodes; the first ones have decoded for a while by then."""
        from gpu_models import names_of

        self._core, self._arm, self._args = core, arm, args
        self._names = names_of(adapters, args.batch, arm.distinct)
        self._ids = [""] * args.batch
        self._added = 0
        for row in range(args.batch):
            self._add(row, args.context + row % BLOCK_SIZE)  # so that every step begins as many new blocks
        while core.stats().running < args.batch:
            self._step()
        while self._step() != args.batch:
            pass

    def _step(self) -> int:
        """The tokens of one more step. Raises RuntimeError when a request fails."""
        result = self._core.step()
        error = next((output.error for output in result.others if output.error), None)
        if error is not None:
            raise RuntimeError(error)
        return result.event.scheduled_tokens

    def _add(self, row: int, tokens: int) -> None:
        from gpu_models import random_prompt

        from loramux.server.engine.protocol import AdapterRef, EngineRequest, SamplingParams

        name, self._ids[row] = self._names[row], f"{self._arm.name}/{self._added}"
        prompt = random_prompt(0, self._added, tokens, self._args.vocab)
        sampling = SamplingParams(max_tokens=new_tokens(self._args), ignore_eos=True, seed=row, **self._arm.sampling)
        self._core.add(EngineRequest(self._ids[row], prompt, sampling, (AdapterRef(name),) if name else ()))
        self._added += 1

    def change(self) -> None:
        """With arrivals, another request ends and a new one takes its place."""
        if self._arm.arrivals:
            row = self._added * ROW_STRIDE % self._args.batch
            self._core.abort(self._ids[row])
            self._add(row, ARRIVING_PROMPT)

    @property
    def step_tokens(self) -> int:
        """Tokens of every step."""
        return int(self._args.batch) + (ARRIVING_PROMPT - 1 if self._arm.arrivals else 0)

    def end(self) -> None:
        """Ends all requests."""
        for request_id in self._ids:
            self._core.abort(request_id)
        while self._core.has_work():
            self._core.step()


def new_tokens(args: argparse.Namespace) -> int:
    """Tokens that the first sequence decodes until the last step: those of the other prompts' chunks come first."""
    chunks: int = -(-args.batch * (args.context + BLOCK_SIZE) // (step_budget(args) - args.batch))
    further: int = args.warmup + args.steps + args.steps // 4 + 16
    return chunks + further


def step_budget(args: argparse.Namespace) -> int:
    """Tokens of the largest step."""
    return 2048 + int(args.batch)


def measure(core: "EngineCore", arm: Arm, adapters: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds per step of every part, and of all without the model."""
    batch = Batch(core, arm, adapters, args)
    encode = encoder()
    watch = Stopwatch()
    steps: list[dict[str, float]] = []
    profile = cProfile.Profile() if args.profile else None
    gc.collect()
    gc.freeze()
    try:
        with instrumented(core, watch):
            for number in range(args.warmup + args.steps):
                batch.change()
                result = core.step()
                if encode is not None:
                    watch.timed(encode, WIRE)(result)
                taken = watch.take()
                if result.event.scheduled_tokens != batch.step_tokens:
                    raise RuntimeError(f"step {number} computed {result.event.scheduled_tokens} tokens")
                if number >= args.warmup:
                    steps.append(taken)
        top = profiled(core, batch, profile, args) if profile else None
    finally:
        gc.unfreeze()
        batch.end()
    names = list(dict.fromkeys(name for taken in steps for name in taken))
    parts = {name: statistics.median(taken.get(name, 0.0) for taken in steps) * 1e6 for name in names}
    outside = sorted(sum(taken.values()) - taken.get(MODEL, 0.0) for taken in steps)
    return {
        "arm": arm.name, "parts_us": parts, "wire_measured": encode is not None, "profile": top,
        "outside_model_us": statistics.median(outside) * 1e6,
        "outside_model_p10_us": percentile(outside, 10) * 1e6, "outside_model_p99_us": percentile(outside, 99) * 1e6,
    }  # fmt: skip


def profiled(
    core: "EngineCore", batch: Batch, profile: cProfile.Profile, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The functions with most time of their own over some further steps; the profiler slows Python code more than C."""
    steps = max(args.steps // 4, 1)
    for _ in range(steps):
        batch.change()
        with profile:
            core.step()
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(found.items(), key=lambda item: -item[1][2])[: args.top]
    return [
        {
            "function": f"{Path(file).name}:{line}({name})" if line else name,
            "calls_per_step": calls / steps, "own_us": own / steps * 1e6, "with_calls_us": total / steps * 1e6,
        }
        for (file, line, name), (_, calls, own, total, _) in rows
    ]  # fmt: skip


def show(results: list[dict[str, Any]]) -> str:
    """The parts by arm, the sums beside the bar, and the profiles."""
    names = list(dict.fromkeys(name for result in results for name in result["parts_us"] if name != MODEL))
    rows = [["us per step", *(result["arm"] for result in results)]]
    rows += [[name, *(f"{r['parts_us'].get(name, 0.0):.0f}" for r in results)] for name in names]
    rows.append(["all without the model", *(f"{r['outside_model_us']:.0f}" for r in results)])
    rows += [[f"  {p}", *(f"{r[f'outside_model_{p}_us']:.0f}" for r in results)] for p in ("p10", "p99")]
    rows.append(["bar", *(f"{BAR_SECONDS * 1e6:.0f}" for _ in results)])
    parts = [table(rows)]
    for result in results:
        if result["profile"]:
            lines = [[f"profile: {result['arm']}", "calls/step", "own us", "with calls us"]]
            lines += [
                [p["function"], f"{p['calls_per_step']:.1f}", f"{p['own_us']:.0f}", f"{p['with_calls_us']:.0f}"]
                for p in result["profile"]
            ]
            parts.append(table(lines))
    if not all(result["wire_measured"] for result in results):
        parts.append("wire encode was left out: msgpack or pyzmq is not installed")
    return "\n\n".join(parts) + "\n\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="sequences that decode")
    parser.add_argument("--adapters", type=int, default=32, help="distinct adapters in the batch")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence at the start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--plans", choices=("triton", "torch"), default="triton", help="whose plans are built")
    parser.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction,
        help="prepare a step while the one before is under way (the default with triton plans)",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="profile further steps of each arm")
    parser.add_argument("--top", type=int, default=25, help="functions of a profile to show")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    for name in ("batch", "adapters", "context", "steps", "layers", "vocab", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.adapters > args.batch:
        parser.error(f"--adapters {args.adapters} cannot all be in a batch of --batch {args.batch}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures every arm on one core and prints the table and the JSON."""
    args = parse(argv)
    if args.plans == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # without a card, Triton's launchers exist under its interpreter only
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = []
    with tempfile.TemporaryDirectory() as folder:
        core, adapters = stub_core(args, Path(folder))
        try:
            results = [measure(core, arm, adapters, args) for arm in arms(args.adapters)]
        finally:
            core.close()
    sys.stdout.write(show(results))
    options = {name: value for name, value in vars(args).items() if name not in ("out", "profile", "top")}
    publish(
        {
            "benchmark": "host_time", "environment": environment(), "options": options, "bar_us": BAR_SECONDS * 1e6,
            "results": results,
        },
        args.out,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
