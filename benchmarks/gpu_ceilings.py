"""What this card reaches, measured: the bandwidth of a large copy and the speed of a large matrix product.

bandwidth = 2 bytes(buffer) / seconds(copy)          flops = 2 n^3 / seconds([n, n] @ [n, n])
"""

import torch
from gpu_timing import Bench, Deadline, Result, Timing
from report import table

from loramux.kernels.cost import Peaks

COPY_BYTES = 2 << 30
PRODUCT_SIZE = 8192


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """Measures both; on a card they become the ceilings of every floor in this run."""
    size = 1 << 16 if bench.small else min(COPY_BYTES, bench.free_bytes() // 4)
    copy = _copy(bench, size, deadline.left / 4)
    n = 64 if bench.small else PRODUCT_SIZE
    product = _product(bench, n, deadline.left / 4)
    result["copy"] = {"bytes": 2 * size, "seconds": copy.seconds, "least_seconds": copy.least}
    result["product"] = {"size": n, "seconds": product.seconds, "least_seconds": product.least}
    if bench.cuda:
        bench.peaks = Peaks(bandwidth=2 * size / copy.seconds, flops=2 * n**3 / product.seconds)
        result["bandwidth_bytes_per_second"] = bench.peaks.bandwidth
        result["flops_per_second"] = bench.peaks.flops
    else:
        result["bandwidth_bytes_per_second"] = result["flops_per_second"] = None


def _copy(bench: Bench, size: int, seconds: float) -> Timing:
    """A copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return bench.time(lambda: target.copy_(source), seconds=seconds)


def _product(bench: Bench, n: int, seconds: float) -> Timing:
    """A product of two random matrices [n, n] in the benchmark's dtype."""
    generator = torch.Generator(bench.device).manual_seed(0)
    a, b = (torch.empty(n, n, dtype=bench.dtype, device=bench.device).normal_(generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return bench.time(lambda: torch.mm(a, b, out=out), seconds=seconds)


def show(result: Result) -> str:
    """The two ceilings."""
    bandwidth, flops = result["bandwidth_bytes_per_second"], result["flops_per_second"]
    none = "not claimed on a CPU"
    return table(
        [
            ["ceiling", "measured"],
            ["copy, GB/s", none if bandwidth is None else f"{bandwidth / 1e9:.0f}"],
            [
                f"product of {result['product']['size']}, TFLOP/s",
                "not claimed" if flops is None else f"{flops / 1e12:.0f}",
            ],
        ]
    )
