"""What the router chooses and what that costs, measured: one section per question, each against a baseline of its run.

    python benchmarks/router.py [DATA] [--sections scores demo latency] [--seeds N] [--encoder FOLDER] [--threads N]
                                [--plot FILE] [--out FILE]

Sections: `scores`, routing from known scores on RouterDC's queries, which DATA holds; `demo`, `model: "auto"` of a
running server on the embedded demo, in words that no training saw; `latency`, what a decision takes, and time to first
token with up to 10,000 registered adapters. Printed are tables and JSON objects, one per line: for every rung `rung`,
`chosen`, `id_mean` and `per_task`, for other parts `section`, and last of all the whole run. Ends with 1 when a bar is
missed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import router_demo
import router_latency
import router_scores
import torch
from report import environment, publish

from loramux.router.progress import bars

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("scores", "demo", "latency")


def main() -> int:
    """Runs the sections; 1 when one misses its bar, 2 when the data is not there, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=ROOT / "../shared/data/routerdc")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--encoder", type=Path, help="sentence encoder's folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--threads", type=int, default=2, help="of training scorers")
    parser.add_argument("--cache", type=Path, default=ROOT / ".loramux/bench-embeddings.sqlite", help="of embeddings")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks/results/router.svg")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if "scores" in args.sections and not args.data.is_dir():
        sys.stderr.write(
            f"{args.data} is no folder; pass the one that holds RouterDC's train and test files, or leave `scores` out "
            "of --sections\n"
        )
        return 2
    torch.set_num_threads(args.threads)
    with bars() as progress:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "scores": lambda: router_scores.run(
                args.data, args.seeds, args.encoder, args.cache, args.plot, progress
            ),
            "demo": lambda: router_demo.run(progress),
            "latency": lambda: router_latency.run(progress),
        }  # fmt: skip
        sections = {name: parts[name]() for name in SECTIONS if name in args.sections}
    publish({"benchmark": "router", "environment": environment(), "sections": sections}, args.out)
    return 0 if all(section["passed"] for section in sections.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
