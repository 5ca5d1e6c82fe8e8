"""A cold adapter: how long it takes from disk and from host memory to the device, and what others notice of it.

    PYTHONPATH=src python benchmarks/cold_adapter.py [--adapters 8] [--sequences 16] [--out FILE]

An adapter of rank 16 on every linear of Llama-3.1-8B (84 MB in bfloat16; random weights). Three times are taken with
nothing else running: disk to (pinned) host memory with the file's pages dropped from the page cache, the same with the
pages cached, and host memory to the device. Then a batch of base requests decodes while adapters are brought in one
after the other: the gap between their tokens, with and without a load under way, is compared.

Needs a card; `--device cpu --small` runs the same at toy sizes to try the script.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gpu_engine import POLL_SECONDS, RANK, drain, make_core, start
from gpu_models import LLAMA_8B, TINY_LLAMA, engine_model, write_adapters
from gpu_timing import Bench, Deadline, Result, make_bench, ms, percent, unusable
from report import environment, publish, table

from loramux.adapters_store.digests import blob_path
from loramux.kernels.cost import adapter_bytes
from loramux.server.bench.latency import spread
from loramux.server.engine.core import EngineCore

BARS = {"host_to_device_seconds": 0.010, "disk_to_device_seconds": 0.060, "gap_growth": 0.20}
WARMUP_STEPS = 10


def drop_pages(path: Path) -> bool:
    """Asks the kernel to forget the file's pages; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def measure_alone(bench: Bench, core: EngineCore, digests: Sequence[str], deadline: Deadline) -> Result:
    """Median seconds of each leg over the adapters; the host tier keeps none of them afterwards."""
    legs: dict[str, list[float]] = {"disk_to_host": [], "cached_file_to_host": [], "host_to_device": []}
    dropped = True
    for digest in digests:
        deadline.check()
        dropped &= drop_pages(blob_path(core.config.blob_path, digest))
        for leg in ("disk_to_host", "cached_file_to_host"):
            started = time.perf_counter()
            modules = core.host.get(digest)
            legs[leg].append(time.perf_counter() - started)
            if leg == "disk_to_host":
                del modules
                core.host.drop(digest)
        ranks = {module: pair.rank for module, pair in modules.items()}
        bench.synchronize()
        started = time.perf_counter()
        slot = core.backend.reserve(ranks)
        core.backend.fill(slot, modules)
        while not core.backend.filled(slot):
            time.sleep(0)
        core.backend.publish(slot)
        bench.synchronize()
        legs["host_to_device"].append(time.perf_counter() - started)
        core.backend.release(slot)
        core.host.drop(digest)
    found: Result = {f"{leg}_seconds": statistics.median(taken) for leg, taken in legs.items()}
    found["disk_to_device_seconds"] = found["disk_to_host_seconds"] + found["host_to_device_seconds"]
    found["page_cache_dropped"] = dropped
    return found


def measure_gaps(
    bench: Bench, core: EngineCore, digests: Sequence[str], vocab: int, *, sequences: int, context: int, quiet: int,
    tokens: int, deadline: Deadline,
) -> Result:  # fmt: skip
    """Gaps between the tokens of base requests: `quiet` steps without a load, then those until all adapters are there.

    An adapter is asked for when the one before has come; `load_wall_seconds` is from asking to its publication.
    """
    for digest in digests:
        drop_pages(blob_path(core.config.blob_path, digest))
    ids = start(core, vocab, [None] * sequences, context, tokens, deadline)
    gaps: dict[str, list[float]] = {"quiet": [], "loading": []}
    walls: list[float] = []
    try:

        def step(into: list[float] | None) -> set[str]:
            deadline.check()
            started = time.perf_counter()
            result = core.step()
            if into is not None:
                into.append(time.perf_counter() - started)
            if result.event.scheduled_tokens != sequences:
                raise RuntimeError(f"a step of {result.event.scheduled_tokens} tokens among decodes of {sequences}")
            return {digest for digest, _ in result.event.adapter_loads}

        for _ in range(WARMUP_STEPS):
            step(None)
        for _ in range(quiet):
            step(gaps["quiet"])
        for digest in digests:
            asked = time.perf_counter()
            core.pin_adapter(digest, True)
            while digest not in step(gaps["loading"]):
                pass
            walls.append(time.perf_counter() - asked)
            core.pin_adapter(digest, False)
    finally:
        drain(core, ids)
        for digest in digests:
            core.forget_adapter(digest)
        while core.has_work():
            core.step()
            time.sleep(POLL_SECONDS)
    mean = {name: statistics.fmean(values) for name, values in gaps.items()}
    return {
        "quiet_gap_seconds": spread(gaps["quiet"]), "loading_gap_seconds": spread(gaps["loading"]),
        "gap_growth": mean["loading"] / mean["quiet"] - 1, "load_wall_seconds": spread(walls),
        "sequences": sequences,
    }  # fmt: skip


def run(bench: Bench, result: Result, deadline: Deadline, *, adapters: int = 8, sequences: int = 16) -> None:
    """Makes the model, the adapters and the engine, and measures both parts."""
    shape = TINY_LLAMA if bench.small else LLAMA_8B
    sequences, context, quiet = (2, 6, 5) if bench.small else (sequences, 512, 200)
    adapters = min(adapters, 2) if bench.small else adapters
    each = adapter_bytes(shape.costs(bench.itemsize).sites, RANK, bench.itemsize)
    digests = write_adapters(
        bench.folder, shape.modules(), rank=RANK, count=adapters, files=adapters, dtype=bench.dtype,
        device=bench.device, seed=5000,
    )  # fmt: skip
    result.update({"model": shape.name, "rank": RANK, "adapter_bytes": each, "adapters": adapters})
    model = engine_model(shape, dtype=bench.dtype, device=bench.device)
    tokens = 4096 if not bench.small else 2000
    core = make_core(
        bench, model, rows=sequences, tokens=context + tokens, arena_bytes=(each + (1 << 20)) * (adapters + 1),
        adapters=adapters + 1, host_adapter_bytes=(each + (1 << 20)) * (adapters + 1),
    )  # fmt: skip
    with closing(core):
        result.update(measure_alone(bench, core, digests, deadline))
        result.update(
            measure_gaps(
                bench, core, digests, shape.vocab, sequences=sequences, context=context, quiet=quiet, tokens=tokens,
                deadline=deadline,
            )
        )  # fmt: skip


def show(result: Result) -> str:
    """Times, the gaps, and the bars for an adapter of 84 MB."""
    if "gap_growth" not in result:
        return table([["cold adapter", ""], ["not measured", ""]])
    quiet, loading, walls = (result[k] for k in ("quiet_gap_seconds", "loading_gap_seconds", "load_wall_seconds"))
    disk = "disk to host" + ("" if result["page_cache_dropped"] else " (pages could not be dropped)")
    return table(
        [
            [f"adapter of {result['adapter_bytes'] / 1e6:.1f} MB, {result['model']}", "measured", "bar"],
            [f"{disk}, ms", ms(result["disk_to_host_seconds"]), ""],
            ["cached file to host, ms", ms(result["cached_file_to_host_seconds"]), ""],
            ["host to device, ms", ms(result["host_to_device_seconds"]), ms(BARS["host_to_device_seconds"])],
            ["disk to device, ms", ms(result["disk_to_device_seconds"]), ms(BARS["disk_to_device_seconds"])],
            ["asked to published beside decodes, ms", ms(walls["p50"]), ""],
            [f"gap of {result['sequences']} decodes, quiet, mean ms", ms(quiet["mean"]), ""],
            ["gap while loading, mean ms", ms(loading["mean"]), ""],
            ["gap while loading, p99 / quiet p99 ms", f"{ms(loading['p99'])} / {ms(quiet['p99'])}", ""],
            ["growth of the mean gap", percent(result["gap_growth"]), percent(BARS["gap_growth"])],
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measures and prints the table and the JSON; 2 on a machine that it cannot run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8, help="cold adapters to bring in")
    parser.add_argument("--sequences", type=int, default=16, help="base requests that decode meanwhile")
    parser.add_argument("--seconds", type=float, default=180, help="give up after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    for name in ("adapters", "sequences", "seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive")
    problem = unusable(args.device, args.small)
    if problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(args.device, args.small, Path(folder))
        result: Result = {}
        run(bench, result, Deadline(time.perf_counter() + args.seconds), adapters=args.adapters,
            sequences=args.sequences)  # fmt: skip
    sys.stdout.write(show(result) + "\n\n")
    publish(
        {"benchmark": "cold_adapter", "environment": environment(), "device": args.device, "small": args.small,
         "bars": BARS, "result": result},
        args.out,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
