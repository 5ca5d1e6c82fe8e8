"""Steps on the CPU by how many distinct adapters share the batch, beside the matrix-product floor of the same run.

    python benchmarks/cpu_distinct.py [--dtypes D ...] [--batches N ...] [--adapters N ...] [--threads N] [--rounds N]
                                      [--shape tiny|small|qwen-0.5b] [--skip-forms] [--compile-layers] [--out FILE]

Two tables, for float32 and bfloat16, random weights, rank-16 all-linear adapters:

  * forms: the products of a decode step at all sites of the model, without the rest of the model. The base's are the
    floor; the LoRA term adds to them what its form costs (`cpu_forms`). `rule` is what the backend chooses.
  * steps: whole engine steps in this process, base and mixed: the prefill of all prompts in one step, and decode.
    Their floor is the base's products of such a step, output projection included. Float32 runs from plain and from
    blocked weights (`engine.prepacked`), each beside its own floor; with --compile-layers also with compiled layers.

Arms of a round follow one another. Of all rounds the lowest decile counts, which a busy machine disturbs least. The
clock is the thread's own CPU time at one thread, wall time with more.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from cpu_forms import Forms, floor_products
from deterministic import SHAPES
from gpu_models import TINY_LLAMA, Shape, engine_model, names_of, random_prompt, write_adapters
from report import environment, publish, table

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.host_memory import keep_freed_memory
from loramux.server.engine.loading import DTYPES, LoadedModel
from loramux.server.engine.protocol import AdapterRef, EngineRequest, SamplingParams

CHOICES = {"tiny": TINY_LLAMA, "small": SHAPES["small"], "qwen-0.5b": SHAPES["qwen-0.5b"]}
FILES = 4  # contents that differ among the adapters on disk; each has a slot of its own
Seconds = dict[str, list[float]]


def measure(arms: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Lowest decile of each arm's seconds; a first round warms up."""
    seconds: Seconds = {name: [] for name in arms}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, run in arms.items():
                started = clock()
                run()
                if number:
                    seconds[name].append(clock() - started)
    return quiet(seconds)


def quiet(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The lowest decile of each."""
    return {name: sorted(values)[len(values) // 10] for name, values in seconds.items()}


def compare_forms(model: LoadedModel, args: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One entry per batch and number of adapters: seconds of the base's products, and what each form adds to them."""
    found = []
    for batch in args.batches:
        for adapters in (n for n in args.adapters if n <= batch):
            forms = Forms(model, tokens=batch, adapters=adapters, rank=args.rank)
            with torch.inference_mode():
                arms = forms.all()
            taken = measure({"base": forms.base, **arms}, args.rounds, clock)
            base = taken.pop("base")
            added = {name: seconds - base for name, seconds in taken.items()}
            found.append({"batch": batch, "adapters": adapters, "base_seconds": base, "added_seconds": added})
    return found


class Engine:
    """One engine core and the batches that it runs; no prompt comes twice."""

    def __init__(self, core: EngineCore, digests: Sequence[str], vocab: int, args: argparse.Namespace) -> None:
        self.model = core.model
        self._core, self._digests, self._vocab, self._args = core, digests, vocab, args
        self._requests = 0

    def _add(self, prompt: int, new: int, adapter: str | None) -> None:
        self._requests += 1
        adapters = () if adapter is None else (AdapterRef(adapter, 1.0),)
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        ids = random_prompt(0, self._requests, prompt, self._vocab)
        self._core.add(EngineRequest(str(self._requests), ids, sampling, adapters))

    def load(self) -> None:
        """Brings the adapters to the device."""
        for digest in self._digests:
            self._add(1, 1, digest)
        while self._core.has_work():
            self._core.step()

    def batch(self, requests: int, adapters: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
        """Seconds of the step that prefills all prompts, and of each decode step behind it but the first, which makes
        the decodes' plan and workspace."""
        for name in names_of(self._digests, requests, adapters):
            self._add(self._args.prefill // requests, self._args.steps + 2, name)
        taken = []
        while self._core.has_work():
            started = clock()
            tokens = self._core.step().event.scheduled_tokens
            taken.append((tokens, clock() - started))
        (first, prefill), *decodes = taken
        if first != self._args.prefill // requests * requests or any(tokens != requests for tokens, _ in decodes):
            raise RuntimeError(f"the batch did not run as one: steps of {[tokens for tokens, _ in taken]} tokens")
        return prefill, [seconds for _, seconds in decodes[1:]]


def engines(
    shape: Shape, model: LoadedModel, args: argparse.Namespace, name: str, folder: Path, stack: ExitStack
) -> dict[str, Engine]:
    """The plain engine, in float32 the one of blocked weights, where asked for the compiled one; adapters loaded."""
    dtype, most = DTYPES[name], max(args.adapters)
    digests = write_adapters(
        folder, shape.modules(), rank=args.rank, count=most, files=FILES, dtype=dtype, device=torch.device("cpu")
    )
    found = {}
    arms = ["plain", *(["blocked"] if dtype == torch.float32 else []), *(["compiled"] if args.compile_layers else [])]
    for arm in arms:
        longest = args.prefill // min(args.batches) + args.steps + 2
        config = EngineConfig(
            model_path=shape.name, blob_dir=str(folder), dtype=name, device="cpu", threads=args.threads,
            max_model_len=longest, max_num_seqs=max(args.batches), max_batched_tokens=max(args.prefill, *args.batches),
            kv_cache_bytes=model.kv_bytes_per_token * 4 * (longest + 64) * max(args.batches),
            device_adapter_bytes=8 << 30, enable_prefix_caching=False, compile_layers=arm == "compiled",
            prepacked_weights=arm == "blocked",
        )  # fmt: skip
        own = model if arm == "plain" else engine_model(shape, dtype=dtype, device=torch.device("cpu"))
        core = stack.enter_context(closing(EngineCore(config, own)))
        found[arm] = Engine(core, digests, shape.vocab, args)
        found[arm].load()
    return found


def compare_steps(
    shape: Shape, model: LoadedModel, args: argparse.Namespace, name: str, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """One entry per batch: seconds of prefill and decode steps and of their floors, by arm."""
    found = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = engines(shape, model, args, name, Path(folder), stack)
        for batch in args.batches:
            prefill: Seconds = {}
            decode: Seconds = {}
            tokens = args.prefill // batch * batch
            floors = {
                kind: (floor_products(engine.model, tokens, batch), floor_products(engine.model, batch, batch))
                for kind, engine in running.items()
                if kind != "compiled"
            }
            counts = [0, *(n for n in args.adapters if n <= batch)]
            for number in range(args.rounds + 1):
                for kind, engine in running.items():
                    for adapters in counts:
                        arm = f"{adapters} adapters" if adapters else "base"
                        first, rest = engine.batch(batch, adapters, clock)
                        if number:  # the first warms up
                            prefill.setdefault(f"{arm}, {kind}", []).append(first)
                            decode.setdefault(f"{arm}, {kind}", []).extend(rest)
                with torch.inference_mode():
                    for kind, products in floors.items():
                        for values, floor in zip((prefill, decode), products, strict=True):
                            started = clock()
                            floor()
                            if number:
                                values.setdefault(f"floor, {kind}", []).append(clock() - started)
            found.append({"batch": batch, "prefill_seconds": quiet(prefill), "decode_seconds": quiet(decode)})
    return found


def forms_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds that each form adds to the base's products."""
    names = list(dict.fromkeys(name for entry in results for name in entry["added_seconds"]))
    rows = [["dtype, batch, adapters", "floor ms", *(f"+ {name}" for name in names)]]
    for entry in results:
        cells = [entry["added_seconds"].get(name) for name in names]
        rows.append([
            f"{entry['dtype']}, {entry['batch']}, {entry['adapters']}", f"{entry['base_seconds'] * 1e3:.2f}",
            *("" if cell is None else f"{cell * 1e3:.2f}" for cell in cells),
        ])  # fmt: skip
    return table(rows)


def steps_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of steps, the floor's share of them, and the base's, both of the same kind of engine."""
    rows = [["dtype, batch, arm", "prefill ms", "floor / it", "base / it", "decode ms", "floor / it", "base / it"]]
    for entry in results:
        prefill, decode = entry["prefill_seconds"], entry["decode_seconds"]
        for arm in decode:
            what, _, kind = arm.partition(", ")
            floor = "floor, plain" if kind == "compiled" else f"floor, {kind}"
            cells = []
            for seconds in (prefill, decode):
                value = seconds[arm]
                base = f"{seconds[f'base, {kind}'] / value:.0%}" if what != "floor" else ""
                cells += [f"{value * 1e3:.2f}", f"{seconds[floor] / value:.0%}", base]
            rows.append([f"{entry['dtype']}, {entry['batch']}, {arm}", *cells])
    return table(rows)


def main() -> int:
    """Runs both parts, prints their tables and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CHOICES, default="small")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64], help="sequences of a step")
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 4, 16, 64], help="distinct ones in a batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of all prompts of a batch together")
    parser.add_argument("--steps", type=int, default=8, help="decode steps that are timed per batch and round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-forms", action="store_true", help="only the engine's steps")
    parser.add_argument("--compile-layers", action="store_true", help="also an engine with compiled layers")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.prefill < 2 * max(args.batches):
        parser.error("--prefill must hold two tokens for each sequence of the largest of --batches")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    shape = CHOICES[args.shape]
    forms: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for name in args.dtypes:
        model = engine_model(shape, dtype=DTYPES[name], device=torch.device("cpu"))
        if not args.skip_forms:
            forms += [{"dtype": name, **entry} for entry in compare_forms(model, args, clock)]
        steps += [{"dtype": name, **entry} for entry in compare_steps(shape, model, args, name, clock)]
    sys.stdout.write(f"{shape.name}, rank {args.rank}, {args.threads} threads\n")
    if forms:
        sys.stdout.write(f"\nproducts of a decode step: the base's, and what each form adds\n{forms_table(forms)}\n")
    sys.stdout.write(f"\nengine steps\n{steps_table(steps)}\n\n")
    result = {
        "benchmark": "cpu_distinct", "environment": environment(), "shape": shape.name, "rank": args.rank,
        "threads": args.threads, "clock": clock.__name__, "rounds": args.rounds, "prefill_tokens": args.prefill,
        "decode_steps": args.steps, "forms": forms, "steps": steps,
    }  # fmt: skip
    publish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
