"""Everything that is measured on a card, in one run: correctness first, then numbers, within a budget of time.

    PYTHONPATH=src python benchmarks/gpu.py [--sections lora,decode] [--seconds 500] [--out FILE]

A bare image with torch, triton, transformers (and peft, as the peer) is enough. Sections, in order:

    correctness   kernels against float64, the engine's greedy tokens against merged weights; what fails is not measured
    ceilings      copy bandwidth and a large matrix product: what the floors are computed with
    lora          shrink and expand over adapters x ranks x tokens, beside a PEFT-style loop and a gather with bmm
    linear        a projection with adapters: each way to hide the LoRA path beside the plain one
    attention     paged decode, prompts and mixed steps, beside gathered pages and torch's attention
    sampling      what top-k and top-p cost a step, beside sorting
    decode        the engine's step: base, 1, 8, 32, 128 distinct adapters; Llama-3.1-8B and Qwen2.5-0.5B shapes
    workload      S-LoRA's workload through the engine, adapter loads included, and through PEFT
    cold          a cold adapter's way to the device, and what other requests notice
    switches      each optimisation's plain twin, and --deterministic, beside the default

Each section has a share of the time; what it did not get to is listed as left out. The JSON is rewritten after every
section, so a run that is stopped keeps what it has. `--device cpu --small` runs every path at toy sizes (Triton under
its interpreter) and claims nothing.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import environment, publish

if TYPE_CHECKING:
    from gpu_timing import Bench, Result

DEFAULT_SECONDS = 500.0
GRACE = 1.15


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the run: its share of the time, where it lives, and whose correctness it rests on."""

    name: str
    weight: float
    module: str
    run: str = "run"
    show: str = "show"
    needs: tuple[str, ...] = ()


SECTIONS = (
    Section("correctness", 8, "gpu_correctness"),
    Section("ceilings", 1, "gpu_ceilings"),
    Section("lora", 8, "gpu_lora", needs=("LoRA kernels",)),
    Section("linear", 4, "gpu_linear", needs=("LoRA kernels",)),
    Section("attention", 4, "gpu_attention", needs=("attention kernels",)),
    Section("sampling", 1, "gpu_sampling"),
    Section("decode", 9, "gpu_engine", "run_decode", "show_decode", needs=("engine",)),
    Section("workload", 15, "gpu_workload", needs=("engine",)),
    Section("cold", 3, "cold_adapter", needs=("engine",)),
    Section("switches", 6, "gpu_engine", "run_switches", "show_switches", needs=("engine",)),
)
REQUIRED = ("correctness", "ceilings")
"""Sections that always run: the others rest on them."""


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside the block after so long, for what does not look at its deadline.

    Does nothing outside of the main thread and where there are no such signals.
    """
    from gpu_timing import OutOfTimeError

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(section: Section, bench: "Bench", seconds: float, failed: dict[str, str]) -> "Result":
    """The section's result with its `status`: done, cut (out of time), failed, or skipped."""
    from gpu_timing import Deadline, OutOfTimeError

    broken = {name: failed[name] for name in section.needs if name in failed}
    if broken:
        return {"status": "skipped", "why": "; ".join(f"{name}: {reason}" for name, reason in broken.items())}
    result: Result = {"status": "done", "budget_seconds": seconds}
    sys.stderr.write(f"{section.name}: up to {seconds:.0f} s\n")
    started = time.perf_counter()
    run = getattr(importlib.import_module(section.module), section.run)  # nothing may interrupt an import
    gc.collect()
    gc.freeze()  # graph captures collect garbage, and each would go through all of the libraries' objects
    try:
        with interrupted_after(seconds * GRACE):
            run(bench, result, Deadline(started + seconds))
    except OutOfTimeError:
        result["status"] = "cut"
    except Exception as error:
        traceback.print_exc()
        result["status"], result["why"] = "failed", f"{type(error).__name__}: {error}"
    finally:
        gc.unfreeze()
    if result["status"] == "done" and result.get("left_out"):
        result["status"] = "cut"
    result["seconds"] = time.perf_counter() - started
    with contextlib.suppress(RuntimeError):  # a card that an error left unusable: the next section says so
        bench.release()
    return result


def card(bench: "Bench") -> dict[str, Any]:
    """What the card is; empty without one."""
    import torch

    if not bench.cuda:
        return {}
    properties = torch.cuda.get_device_properties(bench.device)
    return {
        "name": properties.name, "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }  # fmt: skip


def save(result: dict[str, Any], out: Path | None) -> None:
    """Writes what there is so far, whole or not at all."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.new")
    temporary.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    temporary.replace(out)


def text_of(section: Section, result: "Result") -> str:
    """The section's table and how it ended."""
    head = f"== {section.name}: {result['status']}"
    if "seconds" in result:
        head += f" in {result['seconds']:.0f} of {result['budget_seconds']:.0f} s"
    parts = [head]
    if "why" in result:
        parts.append(result["why"])
    if result["status"] in ("done", "cut"):
        with contextlib.suppress(KeyError):  # cut before there was anything to show
            parts.append(getattr(importlib.import_module(section.module), section.show)(result))
    left = result.get("left_out") or []
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        parts.append(f"left out: {'; '.join(left[:8])}{more}")
    return "\n".join(parts) + "\n\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; exits with 2 and a message for those that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", default="all", help=f"all, or some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--scratch", type=Path, help="where adapters are written (default: the system's own)")
    parser.add_argument("--out", type=Path, help="write the JSON here, after every section")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error("--seconds must be positive")
    chosen = names if args.sections == "all" else [name.strip() for name in args.sections.split(",")]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"--sections: there is no {', '.join(unknown)}; choose from {', '.join(names)}")
    args.chosen = [section for section in SECTIONS if section.name in {*chosen, *REQUIRED}]
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the sections. 0 when all of them were measured or cut, 1 when one failed, 2 where nothing can be run."""
    args = parse(argv)
    started = time.perf_counter()
    from gpu_timing import make_bench, unusable

    problem = unusable(args.device, args.small)
    if problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: they then run without a card
    sections: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench = make_bench(args.device, args.small, Path(folder))
        result: dict[str, Any] = {
            "benchmark": "gpu", "environment": environment(), "device": args.device, "card": card(bench),
            "small": args.small, "dtype": str(bench.dtype).removeprefix("torch."), "budget_seconds": args.seconds,
            "claims": bench.cuda and not args.small, "complete": False, "sections": sections,
        }  # fmt: skip
        failed: dict[str, str] = {}
        try:
            for number, section in enumerate(args.chosen):
                left = args.seconds - (time.perf_counter() - started)
                weights = sum(s.weight for s in args.chosen[number:])
                sections[section.name] = found = run_section(
                    section, bench, max(left, 0.0) * section.weight / weights, failed
                )  # fmt: skip
                failed |= found.get("failed", {})
                sys.stdout.write(text_of(section, found))
                sys.stdout.flush()
                result["seconds"] = time.perf_counter() - started
                save(result, args.out)
            result["complete"] = True
        except KeyboardInterrupt:
            sys.stderr.write("stopped; what was measured is in the JSON\n")
        result["seconds"] = time.perf_counter() - started
    save(result, args.out)
    publish(result, None)
    bad = failed or any(found["status"] in ("failed", "skipped") for found in sections.values())
    return 1 if bad or not result["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
