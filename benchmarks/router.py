"""What the router chooses, measured: one section per question, each against a baseline of the same run.

    python benchmarks/router.py [DATA] [--seeds N] [--encoder FOLDER] [--threads N] [--plot FILE] [--out FILE]

DATA holds RouterDC's scored queries. Printed are tables and one JSON object per line: for every rung `rung`, `chosen`,
`id_mean` and `per_task`, and last of all the whole run. Ends with 1 when a bar is missed.
"""

import argparse
import sys
from pathlib import Path

import router_scores
import torch
from report import environment, publish

from loramux.router.progress import bars

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the sections; 1 when one misses its bar, 2 when the data is not there, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=ROOT / "../shared/data/routerdc")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--encoder", type=Path, help="sentence encoder's folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".loramux/bench-embeddings.sqlite", help="of embeddings")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks/results/router.svg")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if not args.data.is_dir():
        sys.stderr.write(f"{args.data} is no folder; pass the one that holds RouterDC's train and test files\n")
        return 2
    torch.set_num_threads(args.threads)
    with bars() as progress:
        sections = {
            "scores": router_scores.run(args.data, args.seeds, args.encoder, args.cache, args.plot, progress),
        }
    publish({"benchmark": "router", "environment": environment(), "sections": sections}, args.out)
    return 0 if all(section["passed"] for section in sections.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
