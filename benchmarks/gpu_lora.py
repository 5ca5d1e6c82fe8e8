"""The LoRA kernels: shrink and expand of one packed site, over adapters x ranks x tokens.

Beside them, on the same weights and input:
  * loop: what PEFT's mixed batch does: for every adapter and module, gather its rows, two products, add them back
    (with row indices that are on the device already, which PEFT's are not);
  * gather-bmm: the pair of every token gathered, two batched products per module.
The site stands for a layer: as many of them as keep the caches cold run one after the other, as layers do.
The floor is `kernels/cost.py`'s bytes and FLOPs at this run's ceilings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from gpu_timing import Bench, Deadline, Result, error, percent, ratio, times, us
from report import table
from torch import Tensor

from loramux.kernels.cost import Cost, expand, shrink
from loramux.kernels.lora import LoraBackend, ModuleWeights, Segment, Site, SiteSlice, add_reference, make_backend
from loramux.kernels.lora.cases import (
    Case,
    Weights,
    check,
    check_folded,
    large_cases,
    load,
    relative_error,
    small_cases,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COLD_BYTES = 64 << 20
MAX_LAYERS = 32
GATHER_LIMIT_BYTES = 4 << 30
ADAPTERS, RANKS, TOKENS = (1, 8, 32, 128), (8, 16, 64), (1, 8, 32, 128, 512, 2048, 8192)
FIRST_RANK = 16
SMALL_ADAPTERS, SMALL_RANKS, SMALL_TOKENS = (1, 3), (4,), (1, 6)


@dataclass(frozen=True, slots=True)
class SiteKind:
    """A packed site of a model: its inputs and the outputs of its modules."""

    name: str
    in_features: int
    outs: tuple[int, ...]

    def sites(self, layers: int) -> list[Site]:
        """The site of as many layers."""
        return [
            Site(i, self.in_features, tuple(SiteSlice(f"{i}.{n}", out) for n, out in enumerate(self.outs)))
            for i in range(layers)
        ]


QKV = SiteKind("qkv", 4096, (4096, 1024, 1024))
OTHERS = (SiteKind("o", 4096, (4096,)), SiteKind("gate-up", 4096, (14336, 14336)), SiteKind("down", 14336, (4096,)))
SMALL = SiteKind("qkv", 48, (48, 16, 16))


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid. With fewer tokens than adapters only as many would take part, so there is no such cell."""

    kind: SiteKind
    adapters: int
    rank: int
    tokens: int


def check_cases(bench: Bench, rows: list[Result], deadline: Deadline) -> None:
    """Every case of `kernels.lora.cases` in the benchmark's dtype, apart and folded: its error, and whether it is good.

    Cases of the sizes that models have come first, in case that the time does not suffice for all.
    """
    cases: Sequence[Case] = small_cases()[:4] if bench.small else [*large_cases(), *small_cases()]
    for case in cases:
        deadline.check()
        options: dict[str, Any] = {
            "sites": [case.site], "dtype": bench.dtype, "device": bench.device, "budget_bytes": 1 << 28,
            "max_slots": 160, "max_tokens": 2048, "max_set_rank": 600,
        }  # fmt: skip
        backend = make_backend(**options)
        weights = case.weights(bench.dtype)
        found = check(backend, case, [load(backend, adapter) for adapter in weights], weights)
        rows.append({"case": case.name, "error": found, "good": found <= TOLERANCE[bench.dtype]})
        deadline.check()
        backend = make_backend(**options, implementation="triton", fold=True)
        found = check_folded(backend, case, [load(backend, adapter) for adapter in weights], weights)
        rows.append({"case": f"{case.name}, folded", "error": found, "good": found <= TOLERANCE[bench.dtype]})


def cells(small: bool) -> list[Cell]:
    """The grid of the qkv site at rank 16, the other sites, then the grid at the other ranks."""
    if small:
        return [Cell(SMALL, a, r, t) for a in SMALL_ADAPTERS for r in SMALL_RANKS for t in SMALL_TOKENS if t >= a]
    grid = {r: [Cell(QKV, a, r, t) for a in ADAPTERS for t in TOKENS if t >= a] for r in RANKS}
    others = [Cell(kind, a, FIRST_RANK, t) for kind in OTHERS for a, t in ((1, 32), (32, 32), (8, 2048))]
    return [*grid.pop(FIRST_RANK), *others, *(cell for rest in grid.values() for cell in rest)]


class Held:
    """Adapters on the sites of some layers: the backend that holds them, and the same weights for the peers."""

    def __init__(self, bench: Bench, kind: SiteKind, adapters: int, rank: int) -> None:
        """Random weights of unit gain, on the device."""
        per_layer = adapters * rank * sum(kind.in_features + out for out in kind.outs) * bench.itemsize
        self.layers = 2 if bench.small else min(max(COLD_BYTES // per_layer, 4), MAX_LAYERS)
        self.sites = kind.sites(self.layers)
        self.ranks = {part.module: rank for site in self.sites for part in site.slices}
        generator = torch.Generator(bench.device).manual_seed(adapters * 1000 + rank)

        def matrix(rows: int, columns: int, fan_in: int) -> Tensor:
            drawn = torch.empty(rows, columns, dtype=bench.dtype, device=bench.device)
            return drawn.normal_(0.0, fan_in**-0.5, generator=generator)

        self.weights: list[Weights] = [
            {
                part.module: ModuleWeights(
                    matrix(rank, site.in_features, site.in_features), matrix(part.out_features, rank, rank), 1.0
                )
                for site in self.sites
                for part in site.slices
            }
            for _ in range(adapters)
        ]
        self.backend: LoraBackend = make_backend(
            self.sites, dtype=bench.dtype, device=bench.device, max_slots=adapters, max_set_rank=rank, max_set_size=1,
            budget_bytes=self.layers * per_layer + (1 << 20) * adapters,
            max_tokens=max(SMALL_TOKENS if bench.small else TOKENS),
        )  # fmt: skip
        self.slots = [load(self.backend, adapter) for adapter in self.weights]
        bench.synchronize()


class Work:
    """One cell's input and output, and the three ways to compute it, each over all layers."""

    def __init__(self, bench: Bench, held: Held, cell: Cell) -> None:
        self.held, self.cell = held, cell
        generator = torch.Generator(bench.device).manual_seed(cell.tokens)
        self.x = torch.empty(cell.tokens, cell.kind.in_features, dtype=bench.dtype, device=bench.device)
        self.x.normal_(generator=generator)
        self.out = torch.zeros(cell.tokens, sum(cell.kind.outs), dtype=bench.dtype, device=bench.device)
        edges = [number * cell.tokens // cell.adapters for number in range(cell.adapters + 1)]
        self.segments = [
            Segment(low, high, ((slot, 1.0),)) for slot, (low, high) in zip(held.slots, pairwise(edges), strict=True)
        ]
        owner = torch.arange(cell.adapters).repeat_interleave(torch.tensor(edges).diff())
        self.owner = owner.to(bench.device)
        self.rows = [torch.arange(low, high, device=bench.device) for low, high in pairwise(edges)]
        self.stacks: list[list[tuple[Tensor, Tensor]]] = []
        plan = held.backend.plan(self.segments, cell.tokens)
        assert plan is not None
        self.plan = plan

    def cost(self) -> tuple[Cost, Cost]:
        """Of the shrink and the expand of one layer."""
        site, ranks = self.held.sites[0], dict.fromkeys(self.held.slots, self.held.ranks)
        size = self.x.dtype.itemsize
        return shrink(site, self.segments, ranks, size), expand(site, self.segments, ranks, size)

    def expected(self) -> Tensor:
        """The first layer's term in float64."""
        out = torch.zeros(*self.out.shape, dtype=torch.float64, device=self.out.device)
        weights = dict(zip(self.held.slots, self.held.weights, strict=True))
        add_reference(self.held.sites[0], self.x, out, self.segments, weights)
        return out

    def ours(self, layers: int | None = None) -> None:
        """The kernels."""
        for site in self.held.sites[:layers]:
            self.held.backend.add(site, self.x, self.out, self.plan)

    def loop(self, layers: int | None = None) -> None:
        """As PEFT's mixed batch does it."""
        for site in self.held.sites[:layers]:
            for rows, adapter in zip(self.rows, self.held.weights, strict=True):
                column = 0
                for part in site.slices:
                    pair = adapter[part.module]
                    columns = self.out[:, column : column + part.out_features]
                    columns[rows] += (self.x[rows] @ pair.A.T @ pair.B.T) * pair.scale
                    column += part.out_features

    def stack(self) -> None:
        """Lays the adapters of every module in one tensor, as the gather needs them."""
        self.stacks = [
            [
                (
                    torch.stack([adapter[part.module].A for adapter in self.held.weights]),
                    torch.stack([adapter[part.module].B for adapter in self.held.weights]),
                )
                for part in site.slices
            ]
            for site in self.held.sites
        ]

    def gather(self, layers: int | None = None) -> None:
        """The pair of every token, gathered, and batched products."""
        for stacked in self.stacks[:layers]:
            column = 0
            for A, B in stacked:
                shrunk = torch.bmm(A[self.owner], self.x.unsqueeze(2))
                part = torch.bmm(B[self.owner], shrunk).squeeze(2)
                self.out[:, column : column + B.shape[1]] += part
                column += B.shape[1]

    def gathered_bytes(self) -> int:
        """What the gather of the widest module holds at once."""
        widest = max(self.cell.kind.outs) + self.cell.kind.in_features
        return self.cell.tokens * self.cell.rank * widest * self.x.dtype.itemsize

    def error_of(self, way: Callable[[int], None], expected: Tensor) -> float:
        """Relative error of the first layer's term."""
        self.out.zero_()
        way(1)
        return relative_error(self.out, expected)


def measure(bench: Bench, held: Held, cell: Cell) -> Result:
    """One row: errors, seconds per layer of each way, the floor, and what share of the copy bandwidth we reach."""
    work = Work(bench, held, cell)
    costs, expected = work.cost(), work.expected()
    row: Result = {
        "site": cell.kind.name, "adapters": cell.adapters, "rank": cell.rank, "tokens": cell.tokens,
        "layers": held.layers, "floor_seconds": bench.floor(*costs), "bytes": sum(c.bytes for c in costs),
        "error": work.error_of(work.ours, expected), "loop_error": work.error_of(work.loop, expected),
        "gather_seconds": None, "gather_error": None,
    }  # fmt: skip
    row["good"] = row["error"] <= TOLERANCE[bench.dtype]
    if not row["good"]:
        return row
    ways: list[tuple[str, Callable[[], None], bool]] = [
        ("ours", work.ours, True), ("ours_eager", work.ours, False), ("loop", work.loop, True),
        ("loop_eager", work.loop, False),
    ]  # fmt: skip
    if work.gathered_bytes() <= GATHER_LIMIT_BYTES:
        work.stack()
        row["gather_error"] = work.error_of(work.gather, expected)
        ways.append(("gather", work.gather, True))
    for name, way, graph in ways:
        timing = bench.time(way, seconds=0.1 if graph else 0.05, graph=graph)
        row[f"{name}_seconds"] = timing.seconds / held.layers
        row[f"{name}_graph"] = timing.graph
    row["floor_share"] = ratio(row["floor_seconds"], row["ours_seconds"])
    row["bandwidth_share"] = bench.bandwidth_share(row["ours_seconds"], *costs)
    row["loop_ratio"] = row["loop_seconds"] / row["ours_seconds"]
    row["loop_eager_ratio"] = row["loop_eager_seconds"] / row["ours_eager_seconds"]
    row["gather_ratio"] = ratio(row["gather_seconds"], row["ours_seconds"])
    return row


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """The grid; adapters of a site are made once for all numbers of tokens."""
    result["rows"] = rows = []
    result["out_of_memory"] = []
    result["left_out"] = left = [f"{c.kind.name} {c.adapters}x{c.rank}x{c.tokens}" for c in cells(bench.small)]
    held: Held | None = None
    made: tuple[SiteKind, int, int] | None = None
    for cell in cells(bench.small):
        deadline.check()
        name = left[0]
        try:
            if held is None or made != (cell.kind, cell.adapters, cell.rank):
                held = None
                bench.release()
                held, made = Held(bench, cell.kind, cell.adapters, cell.rank), (cell.kind, cell.adapters, cell.rank)
            rows.append(measure(bench, held, cell))
        except torch.OutOfMemoryError:
            result["out_of_memory"].append(name)
        left.pop(0)


def show(result: Result) -> str:
    """The grid."""
    lines = [["LoRA of a layer", "r", "tokens", "error", "ours us", "floor us", "floor/ours", "of copy", "loop us",
              "loop/ours", "eager loop/ours", "gather us"]]  # fmt: skip
    for row in result["rows"]:
        lines.append(
            [
                f"{row['site']} x {row['adapters']}", str(row["rank"]), str(row["tokens"]),
                error(row["error"]) + ("" if row["good"] else " WRONG"), us(row.get("ours_seconds")),
                us(row["floor_seconds"]), percent(row.get("floor_share")), percent(row.get("bandwidth_share")),
                us(row.get("loop_seconds")), times(row.get("loop_ratio")), times(row.get("loop_eager_ratio")),
                us(row["gather_seconds"]),
            ]
        )  # fmt: skip
    return table(lines)
