"""A projection with adapters: every way to hide the LoRA path beside the plain one, and the base product alone.

    base          x W^T by the library: what a step without adapters costs
    apart         the product, then shrink and expand: the default
    stream        the shrink on a side stream beside the product
    launch        the expand launched while the shrink runs (compute capability 9.0 on)
    fold          the expand in the epilogue of a Triton product
    fold, launch  the same, launched while the shrink runs

Sites are those of Llama-3.1-8B, with padded plans up to 512 tokens, as decode graphs replay them. As many layers as
keep the weights cold run one after the other. Floors are `kernels/cost.py`'s bytes and FLOPs at this run's ceilings,
each way's own; `of base` is what a decode pays for its adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from gpu_lora import OTHERS, QKV, SMALL, TOLERANCE, SiteKind
from gpu_timing import Bench, Deadline, Result, error, percent, ratio, times, us
from report import table
from torch import Tensor
from torch.nn import functional as F

from loramux.kernels.cost import Cost, expand, folded, product, shrink
from loramux.kernels.lora import LoraBackend, ModuleWeights, Segment, add_reference, make_backend
from loramux.kernels.lora.cases import load, relative_error
from loramux.kernels.lora.launch import PARTIAL_TOKENS

COLD_BYTES = 128 << 20
MAX_LAYERS = 16
RANK = 16


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute the projection: `options` of the backend."""

    name: str
    options: dict[str, Any]
    least_capability: tuple[int, int] = (0, 0)


WAYS = (
    Way("apart", {"fold": False}),
    Way("stream", {"fold": False, "overlap": "stream"}, (1, 0)),
    Way("launch", {"fold": False, "overlap": "launch"}, (9, 0)),
    Way("fold", {"fold": True}),
    Way("fold, launch", {"fold": True, "overlap": "launch"}, (9, 0)),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A site, the tokens of a step, and the adapters that share them evenly."""

    kind: SiteKind
    tokens: int
    adapters: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.kind.name}, {self.tokens} tokens, {self.adapters} adapters"


def cells(small: bool) -> list[Cell]:
    """Decodes of 1 to 128 sequences and a prompt."""
    if small:
        return [Cell(SMALL, 3, 2)]
    loads = ((32, 32), (1, 1), (128, 32), (2048, 8))
    return [Cell(kind, tokens, adapters) for tokens, adapters in loads for kind in (QKV, *OTHERS)]


def ways(bench: Bench) -> list[Way]:
    """Those that the device can do."""
    capability = torch.cuda.get_device_capability(bench.device) if bench.cuda else (0, 0)
    return [way for way in WAYS if way.least_capability <= capability]


class Work:
    """One cell's input, weights and adapters; backends come and go with the ways."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell = bench, cell
        kind, outs = cell.kind, sum(cell.kind.outs)
        per_layer = kind.in_features * outs * bench.itemsize
        self.layers = 1 if bench.small else min(max(-(-COLD_BYTES // per_layer), 2), MAX_LAYERS)
        self.sites = kind.sites(self.layers)
        generator = torch.Generator(bench.device).manual_seed(cell.tokens)

        def matrix(rows: int, columns: int, fan_in: int) -> Tensor:
            drawn = torch.empty(rows, columns, dtype=bench.dtype, device=bench.device)
            return drawn.normal_(0.0, fan_in**-0.5, generator=generator)

        self.x = matrix(cell.tokens, kind.in_features, 1)
        self.weights = [matrix(outs, kind.in_features, kind.in_features) for _ in self.sites]
        self.adapters = [
            {
                part.module: ModuleWeights(
                    matrix(RANK, kind.in_features, kind.in_features), matrix(part.out_features, RANK, RANK), 1.0
                )
                for site in self.sites
                for part in site.slices
            }
            for _ in range(cell.adapters)
        ]
        edges = [number * cell.tokens // cell.adapters for number in range(cell.adapters + 1)]
        self.segments = [Segment(low, high, ((slot, 1.0),)) for slot, (low, high) in enumerate(pairwise(edges))]

    def backend(self, options: dict[str, Any]) -> LoraBackend:
        """A backend with the adapters loaded, adapter i in slot i."""
        kind = self.cell.kind
        per_adapter = self.layers * RANK * sum(kind.in_features + out for out in kind.outs) * self.bench.itemsize
        backend = make_backend(
            self.sites, dtype=self.bench.dtype, device=self.bench.device, max_slots=self.cell.adapters,
            budget_bytes=self.cell.adapters * (per_adapter + (1 << 20)), max_tokens=self.cell.tokens, max_set_size=1,
            max_set_rank=RANK, implementation="triton", **options,
        )  # fmt: skip
        if [load(backend, adapter) for adapter in self.adapters] != list(range(self.cell.adapters)):
            raise RuntimeError("slots of an empty backend are not in order")
        self.bench.synchronize()
        return backend

    def base(self) -> None:
        """The products alone."""
        for weight in self.weights:
            F.linear(self.x, weight)

    def costs(self, *, fold: bool) -> tuple[Cost, ...]:
        """Of one layer's operations."""
        site, size = self.sites[0], self.bench.itemsize
        ranks = {slot: {part.module: RANK for part in site.slices} for slot in range(self.cell.adapters)}
        shrunk = shrink(site, self.segments, ranks, size)
        if fold:
            return shrunk, folded(site, self.cell.tokens, self.segments, ranks, size)
        base = product(self.cell.tokens, site.in_features, site.out_features, size)
        return base, shrunk, expand(site, self.segments, ranks, size)

    def expected(self) -> Tensor:
        """The first layer's output in float64."""
        out = self.x.double() @ self.weights[0].double().T
        add_reference(self.sites[0], self.x, out, self.segments, dict(enumerate(self.adapters)))
        return out


def steps(work: Work, backend: LoraBackend) -> Callable[[], Tensor]:
    """The layers' projections through a backend, as the engine's; the first layer's output."""
    plan = backend.plan(work.segments, work.cell.tokens, padded=work.cell.tokens <= PARTIAL_TOKENS)
    if plan is None:
        raise RuntimeError("a step with segments has no plan")

    def run() -> Tensor:
        outs: list[Tensor] = []
        for site, weight in zip(work.sites, work.weights, strict=True):
            if backend.folds(site, weight, plan):
                outs.append(backend.project(site, work.x, weight, None, plan))
                continue
            backend.begin(site, work.x, plan)
            outs.append(F.linear(work.x, weight))
            backend.finish(site, outs[-1], plan)
        return outs[0]

    return run


def measure(bench: Bench, cell: Cell) -> list[Result]:
    """One row per way, the base product first."""
    work = Work(bench, cell)
    base = bench.time(work.base, seconds=0.1).seconds / work.layers
    common = {"cell": cell.name, "site": cell.kind.name, "tokens": cell.tokens, "adapters": cell.adapters}
    site = work.sites[0]
    plain = product(cell.tokens, site.in_features, site.out_features, bench.itemsize)
    rows: list[Result] = [_row(bench, common | {"way": "base", "error": None, "good": True}, base, base, (plain,))]
    expected = work.expected()
    for way in ways(bench):
        run = steps(work, work.backend(way.options))
        found = relative_error(run(), expected)
        row: Result = common | {"way": way.name, "error": found, "good": found <= TOLERANCE[bench.dtype]}
        seconds = bench.time(run, seconds=0.1).seconds / work.layers if row["good"] else None
        rows.append(_row(bench, row, seconds, base, work.costs(fold=way.options["fold"])))
    return rows


def _row(bench: Bench, row: Result, seconds: float | None, base: float, costs: tuple[Cost, ...]) -> Result:
    """The row with its seconds per layer, floor and shares."""
    floor = bench.floor(*costs)
    return row | {
        "bytes": sum(c.bytes for c in costs), "flops": sum(c.flops for c in costs), "floor_seconds": floor,
        "seconds": seconds, "base_ratio": ratio(seconds, base), "floor_share": ratio(floor, seconds),
        "bandwidth_share": None if seconds is None else bench.bandwidth_share(seconds, *costs),
    }  # fmt: skip


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """All cells."""
    result["rows"] = rows = []
    result["left_out"] = left = [cell.name for cell in cells(bench.small)]
    for cell in cells(bench.small):
        deadline.check()
        rows.extend(measure(bench, cell))
        left.pop(0)
        bench.release()


def show(result: Result) -> str:
    """The ways of every cell."""
    lines = [["projection with adapters", "way", "error", "us", "of base", "floor us", "floor/ours", "of copy"]]
    for row in result["rows"]:
        lines.append(
            [
                row["cell"], row["way"], error(row["error"]) + ("" if row["good"] else " WRONG"), us(row["seconds"]),
                times(row["base_ratio"]), us(row["floor_seconds"]), percent(row["floor_share"]),
                percent(row["bandwidth_share"]),
            ]
        )  # fmt: skip
    return table(lines)
