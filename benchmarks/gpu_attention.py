"""The paged attention kernels: KV write and attention of a layer, for decodes, prompts, and both in one step.

Beside them torch: the pages of every sequence gathered, then `scaled_dot_product_attention` (decodes as one padded
batch under a mask, prompts one by one), as the engine's plain path does it. The floor is `kernels/cost.py`'s: each
sequence's keys and values read once, at this run's ceilings. As many layers as keep the caches cold run one after the
other.
"""

from dataclasses import dataclass

import torch
from gpu_models import LLAMA_8B, QWEN_05B, TINY_LLAMA, Shape
from gpu_timing import Bench, Deadline, Result, error, percent, ratio, times, us
from report import table
from torch import Tensor
from torch.nn import functional as F

from loramux.kernels.attention import (
    AttentionBatch,
    AttentionLimits,
    attend_reference,
    make_backend,
)
from loramux.kernels.attention.cases import Case, check, large_cases, relative_error, small_cases
from loramux.kernels.cost import attention, kv_write

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COLD_BYTES = 64 << 20
MAX_LAYERS = 32
CHECK_QUERIES = 256


@dataclass(frozen=True, slots=True)
class Load:
    """A step: a model's shape, and (queries, context) of each sequence, decodes first."""

    name: str
    shape: Shape
    sequences: tuple[tuple[int, int], ...]

    @property
    def decodes(self) -> int:
        """Leading sequences of one query."""
        return sum(queries == 1 for queries, _ in self.sequences)

    @property
    def tokens(self) -> int:
        """Queries of the step."""
        return sum(queries for queries, _ in self.sequences)


def loads(small: bool) -> list[Load]:
    """Decodes of several batches and contexts, a prompt, a chunk against a cached prefix, and a mixed step."""
    if small:
        return [
            Load("decode 2 x 20", TINY_LLAMA, ((1, 20),) * 2),
            Load("decode, prompt 5, chunk 3 of 17", TINY_LLAMA, ((1, 5), (5, 5), (3, 17))),
        ]
    found = [Load(f"decode {n} x {c}", LLAMA_8B, ((1, c),) * n)
             for n, c in ((32, 512), (1, 2048), (1, 8000), (32, 4096), (128, 1024), (256, 512))]  # fmt: skip
    found += [Load(f"decode {n} x {c}", QWEN_05B, ((1, c),) * n) for n, c in ((32, 512), (128, 1024))]
    found += [
        Load("prompt 2048", LLAMA_8B, ((2048, 2048),)),
        Load("chunk 512 of 4096", LLAMA_8B, ((512, 4096),)),
        Load("31 decodes, chunk 1024", LLAMA_8B, ((1, 1024),) * 31 + ((1024, 1024),)),
        Load("prompt 2048", QWEN_05B, ((2048, 2048),)),
    ]
    return found


def check_cases(bench: Bench, rows: list[Result], deadline: Deadline) -> None:
    """Every case of `kernels.attention.cases` in the benchmark's dtype: its relative error, and whether that is good.

    Cases of the sizes that models have come first, in case that the time does not suffice for all.
    """
    cases: list[Case] = small_cases()[:2] if bench.small else [*large_cases(), *small_cases()]
    for case in cases:
        deadline.check()
        backend = make_backend(
            [case.shape], dtype=bench.dtype, device=bench.device, block_size=case.block_size, limits=case.limits
        )
        found = check(backend, case, bench.dtype, bench.device)
        rows.append({"case": case.name, "error": found, "good": found <= TOLERANCE[bench.dtype]})


class Work:
    """One load's caches, queries and plan, and the two ways to compute it over all layers."""

    def __init__(self, bench: Bench, load: Load) -> None:
        self.load, self.bench = load, bench
        shape = self.shape = load.shape.attention
        counts = [-(-context // BLOCK_SIZE) for _, context in load.sequences]
        per_layer = sum(counts) * BLOCK_SIZE * shape.kv_heads * 2 * shape.k_dim * bench.itemsize
        self.layers = 1 if bench.small else min(max(-(-COLD_BYTES // per_layer), 2), MAX_LAYERS)
        generator = torch.Generator(bench.device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=bench.dtype, device=bench.device).normal_(generator=generator)

        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        cache = (sum(counts), BLOCK_SIZE, shape.kv_heads, shape.k_dim)
        self.caches = [(normal(*cache), normal(*cache)) for _ in range(self.layers)]
        self.q = normal(load.tokens, shape.heads, shape.k_dim)
        self.key, self.value = (normal(load.tokens, shape.kv_heads, shape.k_dim) for _ in range(2))
        self.out = torch.empty_like(self.q)
        slots = [
            blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for blocks, (queries, context) in zip(self.tables, load.sequences, strict=True)
            for position in range(context - queries, context)
        ]
        self.batch = AttentionBatch(
            [q for q, _ in load.sequences], [c for _, c in load.sequences], self.tables, slots
        )  # fmt: skip
        self.backend = make_backend(
            [shape], dtype=bench.dtype, device=bench.device, block_size=BLOCK_SIZE,
            limits=AttentionLimits(load.tokens, len(load.sequences), sum(counts)),
        )  # fmt: skip
        self.plan = self.backend.plan(self.batch)
        self.slots = torch.tensor(slots, device=bench.device)
        self._prepare_torch()

    def _prepare_torch(self) -> None:
        device, n = self.bench.device, self.load.decodes
        contexts = torch.tensor([c for _, c in self.load.sequences[:n]], device=device)
        width = max((len(blocks) for blocks in self.tables[:n]), default=0)
        padded = [blocks + [blocks[0]] * (width - len(blocks)) for blocks in self.tables[:n]]
        self.pages = torch.tensor(padded, device=device).flatten()
        visible = torch.arange(width * BLOCK_SIZE, device=device) < contexts.unsqueeze(1)
        self.bias = torch.zeros(visible.shape, dtype=self.bench.dtype, device=device)
        self.bias = self.bias.masked_fill_(~visible, float("-inf"))[:, None, None, :]
        self.pieces: list[tuple[slice, Tensor, int, Tensor | None]] = []
        first = n
        for blocks, (queries, context) in zip(self.tables[n:], self.load.sequences[n:], strict=True):
            rows = slice(first, first + queries)
            first += queries
            ends = torch.arange(context - queries, context, device=device).unsqueeze(1)
            mask = None if queries == context else torch.arange(context, device=device) <= ends
            self.pieces.append((rows, torch.tensor(blocks, device=device), context, mask))

    def ours(self, layers: int | None = None) -> None:
        """The kernels."""
        for k, v in self.caches[:layers]:
            self.backend.write(k, v, self.key, self.value, self.plan)
            self.backend.attend(self.q, k, v, self.plan, self.shape.k_dim**-0.5, out=self.out)

    def torch(self, layers: int | None = None) -> None:
        """Gathered pages and SDPA."""
        shape, n = self.shape, self.load.decodes
        group = shape.heads // shape.kv_heads
        for k, v in self.caches[:layers]:
            k.view(-1, *k.shape[2:]).index_copy_(0, self.slots, self.key)
            v.view(-1, *v.shape[2:]).index_copy_(0, self.slots, self.value)
            if n:
                keys, values = (
                    cache.index_select(0, self.pages).view(n, -1, shape.kv_heads, shape.k_dim).transpose(1, 2)
                    for cache in (k, v)
                )
                q = self.q[:n].view(n, shape.kv_heads, group, shape.k_dim)
                found = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)
                self.out[:n] = found.reshape(n, shape.heads, -1)
            for rows, pages, context, mask in self.pieces:
                keys, values = (cache[pages].flatten(0, 1)[:context].transpose(0, 1).unsqueeze(0) for cache in (k, v))
                if mask is not None:  # the kernels that take a mask do not know grouped heads
                    keys, values = (cache.repeat_interleave(group, dim=1) for cache in (keys, values))
                q = self.q[rows].transpose(0, 1).unsqueeze(0)
                found = F.scaled_dot_product_attention(
                    q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None and group > 1
                )
                self.out[rows] = found[0].transpose(0, 1)

    def error_of_ours(self) -> float:
        """Relative error of the first layer against float64, over the decodes and the first prompt's last queries."""
        self.out.fill_(torch.nan)
        self.ours(1)
        worst = 0.0
        first = 0
        for number, (queries, context) in enumerate(self.load.sequences):
            count = min(queries, CHECK_QUERIES)
            rows = slice(first + queries - count, first + queries)
            first += queries
            batch = AttentionBatch([count], [context], [self.tables[number]], [0] * count)
            k, v = self.caches[0]
            expected = attend_reference(self.q[rows], k, v, batch, self.shape.k_dim**-0.5)
            worst = max(worst, relative_error(self.out[rows], expected))
        return worst


def measure(bench: Bench, load: Load) -> Result:
    """One row: the error, seconds per layer of both ways, the floor, and what share of the copy bandwidth we reach."""
    work = Work(bench, load)
    costs = (
        attention(work.shape, load.sequences, itemsize=bench.itemsize),
        kv_write(work.shape, load.tokens, bench.itemsize),
    )
    row: Result = {
        "load": load.name, "shape": load.shape.name, "sequences": len(load.sequences), "tokens": load.tokens,
        "layers": work.layers, "error": work.error_of_ours(), "floor_seconds": bench.floor(*costs),
        "bytes": sum(c.bytes for c in costs), "flops": sum(c.flops for c in costs),
    }  # fmt: skip
    row["good"] = row["error"] <= TOLERANCE[bench.dtype]
    if not row["good"]:
        return row
    ours, torchs = bench.time(work.ours, seconds=0.3), bench.time(work.torch, seconds=0.3)
    row["ours_seconds"], row["ours_graph"] = ours.seconds / work.layers, ours.graph
    row["torch_seconds"], row["torch_graph"] = torchs.seconds / work.layers, torchs.graph
    row["floor_share"] = ratio(row["floor_seconds"], row["ours_seconds"])
    row["bandwidth_share"] = bench.bandwidth_share(row["ours_seconds"], *costs)
    row["torch_ratio"] = row["torch_seconds"] / row["ours_seconds"]
    return row


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """All loads."""
    result["rows"] = rows = []
    result["left_out"] = left = [f"{load.shape.name} {load.name}" for load in loads(bench.small)]
    for load in loads(bench.small):
        deadline.check()
        rows.append(measure(bench, load))
        left.pop(0)
        bench.release()


def show(result: Result) -> str:
    """The loads."""
    lines = [
        ["attention of a layer", "error", "ours us", "floor us", "floor/ours", "of copy", "torch us", "torch/ours"]
    ]
    for row in result["rows"]:
        lines.append(
            [
                f"{row['shape']}, {row['load']}", error(row["error"]) + ("" if row["good"] else " WRONG"),
                us(row.get("ours_seconds")), us(row["floor_seconds"]), percent(row.get("floor_share")),
                percent(row.get("bandwidth_share")), us(row.get("torch_seconds")), times(row.get("torch_ratio")),
            ]
        )  # fmt: skip
    return table(lines)
