"""What top-k and top-p cost a step: the digit search of `kernels.sampling` beside sorting, on a large vocabulary.

The floor is one read of the logits. Before a time is taken, the tokens that both ways keep are compared.
"""

from dataclasses import dataclass

import torch
from gpu_timing import Bench, Deadline, Result, ms, percent, ratio, times
from report import table

from loramux.kernels.cost import Cost
from loramux.kernels.sampling.thresholds import triton_thresholds
from loramux.server.engine.sampler import sorted_thresholds

VOCAB = 128_256
ROWS = (1, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Settings that all rows have."""

    top_k: int
    top_p: float

    def __str__(self) -> str:
        return f"top_k {self.top_k}, top_p {self.top_p}"


BOUNDS = (Bounds(0, 0.9), Bounds(20, 0.8), Bounds(50, 1.0))


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """One row per number of rows and bounds. RuntimeError when the two ways keep different tokens."""
    vocab, counts = (500, (1, 3)) if bench.small else (VOCAB, ROWS)
    result["vocab"], result["rows"] = vocab, []
    generator = torch.Generator(bench.device).manual_seed(0)
    for number, count in enumerate(counts):
        logits = torch.empty(count, vocab, device=bench.device).normal_(0.0, 3.0, generator=generator)
        for bounds in BOUNDS:
            deadline.check()
            k, p = (torch.full((count, 1), float(v), dtype=torch.float64, device=bench.device)
                    for v in (bounds.top_k, bounds.top_p))  # fmt: skip
            wanted = {"has_k": bounds.top_k > 0, "has_p": bounds.top_p < 1}
            ours, theirs = triton_thresholds(logits, k, p, **wanted), sorted_thresholds(logits, k, p)
            if not torch.equal(logits >= ours, logits >= theirs):
                raise RuntimeError(f"{count} rows, {bounds}: other tokens are kept than by sorting")
            share = deadline.part(1 / ((len(counts) - number) * len(BOUNDS))).left / 2
            found = bench.time(lambda x=logits, k=k, p=p, w=wanted: triton_thresholds(x, k, p, **w), seconds=share)
            peer = bench.time(lambda x=logits, k=k, p=p: sorted_thresholds(x, k, p), seconds=share)
            cost = Cost(activation_bytes=4 * count * vocab)
            result["rows"].append({
                "rows": count, "bounds": str(bounds), "seconds": found.seconds, "sorting_seconds": peer.seconds,
                "graph": found.graph, "floor_seconds": bench.floor(cost),
                "bandwidth_share": bench.bandwidth_share(found.seconds, cost),
            })  # fmt: skip


def show(result: Result) -> str:
    """One line per row."""
    lines = [["thresholds", "bounds", "ms", "one read / it", "sorting ms", "sorting / it"]]
    for row in result["rows"]:
        lines.append([
            f"{row['rows']} x {result['vocab']}", row["bounds"], ms(row["seconds"]), percent(row["bandwidth_share"]),
            ms(row["sorting_seconds"]), times(ratio(row["sorting_seconds"], row["seconds"])),
        ])  # fmt: skip
    return table(lines)
