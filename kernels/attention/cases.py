"""Cases that every attention backend has to get right, for tests and for the correctness run before a benchmark.

Shapes are odd on purpose: head dims that are no power of two, groups that divide no tile, blocks that no tile is a
multiple of, one token, contexts over many splits. What must not be read is NaN.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .interface import AttentionBackend, AttentionBatch, AttentionLimits, AttentionShape
from .reference import attend_reference, write_reference


@dataclass(frozen=True, slots=True)
class Case:
    """One layer, and one step given as (queries, context) per sequence, decodes first."""

    name: str
    shape: AttentionShape
    sequences: tuple[tuple[int, int], ...]
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(queries for queries, _ in self.sequences)

    @property
    def scale(self) -> float:
        """The scaling, k_dim ** -0.5 unless given."""
        return self.shape.k_dim**-0.5 if self.scaling is None else self.scaling

    @property
    def limits(self) -> AttentionLimits:
        """Limits that the step just fits, with room for a padding of two decodes."""
        entries = sum(-(-context // self.block_size) for _, context in self.sequences)
        return AttentionLimits(max(self.num_tokens, len(self.sequences) + 2), len(self.sequences) + 2, entries)


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of a case: caches before the step's write, and what the model hands over."""

    batch: AttentionBatch
    q: Tensor
    k: Tensor
    v: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None


def make_step(case: Case, dtype: torch.dtype, seed: int = 0) -> Step:
    """Random tensors on the CPU. Sequences own shuffled blocks; whatever no sequence may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = case.shape, case.block_size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    counts = [-(-context // size) for _, context in case.sequences]
    total = sum(counts) + 1
    order = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    k = torch.full((total, size, shape.kv_heads, shape.k_dim), torch.nan, dtype=dtype)
    v = torch.full((total, size, shape.kv_heads, shape.v_dim), torch.nan, dtype=dtype)
    tables, slots = [], []
    for (queries, context), count in zip(case.sequences, counts, strict=True):
        table = [order.pop() for _ in range(count)]
        tables.append(table)
        places = torch.tensor([table[j // size] * size + j % size for j in range(context)])
        cached = places[: context - queries]
        k.flatten(0, 1)[cached] = normal(len(cached), shape.kv_heads, shape.k_dim)
        v.flatten(0, 1)[cached] = normal(len(cached), shape.kv_heads, shape.v_dim)
        slots += places[context - queries :].tolist()
    tokens = case.num_tokens
    return Step(
        AttentionBatch([q for q, _ in case.sequences], [c for _, c in case.sequences], tables, slots),
        q=normal(tokens, shape.heads, shape.k_dim),
        k=k,
        v=v,
        key=normal(tokens, shape.kv_heads, shape.k_dim),
        value=normal(tokens, shape.kv_heads, shape.v_dim),
        sinks=normal(shape.heads) if case.sinks else None,
    )


def run(
    backend: AttentionBackend, case: Case, step: Step, device: torch.device, *, decode_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [rows, heads, v_dim], k and v after the write), on the CPU. `decode_rows` pads with rows of NaN queries."""
    rows = case.num_tokens if decode_rows is None else decode_rows

    def moved(tensor: Tensor, heads_first: bool = True) -> Tensor:
        """On the device, in the model's layout: heads are outside of tokens."""
        padded = torch.full((rows, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
        padded[: len(tensor)] = tensor
        return padded.to(device).transpose(0, 1).contiguous().transpose(0, 1) if heads_first else padded.to(device)

    plan = backend.plan(step.batch, decode_rows=decode_rows)
    k, v = step.k.clone().to(device), step.v.clone().to(device)
    backend.write(k, v, moved(step.key), moved(step.value, False), plan)
    out = torch.full((rows, case.shape.heads, case.shape.v_dim), torch.nan, dtype=step.q.dtype, device=device)
    sinks = None if step.sinks is None else step.sinks.to(device)
    backend.attend(moved(step.q), k, v, plan, case.scale, case.window, case.softcap, sinks, out=out)
    return out.cpu(), k.cpu(), v.cpu()


def check(backend: AttentionBackend, case: Case, dtype: torch.dtype, device: torch.device, *, seed: int = 0,
          decode_rows: int | None = None) -> float:  # fmt: skip
    """Runs the case and returns the relative error of the output against the float64 reference.

    Raises AssertionError when the write changed more or less than the step's slots, or padding is not zeros.
    """
    step = make_step(case, dtype, seed)
    out, k, v = run(backend, case, step, device, decode_rows=decode_rows)
    expected_k, expected_v = step.k.clone(), step.v.clone()
    write_reference(expected_k, expected_v, step.key, step.value, step.batch)
    assert torch.equal(k.nan_to_num(7.0), expected_k.nan_to_num(7.0)), "the write differs in k"
    assert torch.equal(v.nan_to_num(7.0), expected_v.nan_to_num(7.0)), "the write differs in v"
    q, k, v = (tensor.to(device) for tensor in (step.q, expected_k, expected_v))
    sinks = None if step.sinks is None else step.sinks.to(device)
    expected = attend_reference(q, k, v, step.batch, case.scale, case.window, case.softcap, sinks)
    assert not out[case.num_tokens :].any(), "padding rows are not zeros"
    return relative_error(out[: case.num_tokens], expected.cpu())


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, in float64; NaN when the result has a NaN."""
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def small_cases() -> list[Case]:
    """Cases small enough for an interpreter."""
    decode, mixed = ((1, 1), (1, 17), (1, 300)), ((1, 40), (1, 5), (7, 7), (5, 38), (2, 65))
    grouped = AttentionShape(6, 2, 32, 32)
    return [
        Case("one-token", AttentionShape(1, 1, 16, 16), ((1, 1),)),
        Case("one-prompt", AttentionShape(2, 1, 16, 16), ((9, 9),)),
        Case("dim-80", AttentionShape(4, 4, 80, 80), ((1, 33), (3, 20)), block_size=8),
        Case("dim-96-group-7", AttentionShape(7, 1, 96, 96), mixed),
        Case("dim-256", AttentionShape(2, 1, 256, 256), ((1, 70), (4, 50))),
        Case("dim-1", AttentionShape(2, 2, 1, 3), ((1, 20), (3, 5))),
        Case("v-wider", AttentionShape(4, 2, 24, 40), mixed),
        Case("v-narrower", AttentionShape(4, 2, 48, 16), mixed),
        Case("block-size-7", grouped, mixed, block_size=7),
        Case("block-size-1", grouped, ((1, 10), (3, 9)), block_size=1),
        Case("block-size-256", grouped, ((1, 300), (3, 9)), block_size=256),
        Case("decode", grouped, decode),
        Case("many-heads", AttentionShape(71, 1, 16, 16), ((1, 40), (2, 9))),
        Case("window", grouped, mixed, window=9),
        Case("window-1", grouped, mixed, window=1),
        Case("window-over-splits", grouped, ((1, 900), (1, 20)), window=517),
        Case("window-chunk", grouped, ((40, 130),), window=16),
        Case("softcap", grouped, mixed, softcap=2.5),
        Case("sinks", grouped, mixed, sinks=True),
        Case("scaling", grouped, mixed, scaling=0.7),
        Case("window-softcap-sinks", grouped, mixed, window=33, softcap=5.0, sinks=True, scaling=0.3),
        Case("window-sinks-decode", AttentionShape(4, 2, 16, 16), decode, window=128, sinks=True),
        Case("ragged-prefill", grouped, ((2, 2), (33, 33), (17, 120), (3, 64))),
        Case("chunk-at-block-edge", grouped, ((16, 32), (16, 48), (15, 47))),
        Case("many-splits", AttentionShape(2, 1, 16, 16), ((1, 4500), (1, 257), (1, 256), (1, 1))),
    ]


def large_cases() -> list[Case]:
    """Cases of the sizes that models have."""
    llama, qwen = AttentionShape(32, 8, 128, 128), AttentionShape(14, 2, 64, 64)
    gemma, oss = AttentionShape(8, 4, 256, 256), AttentionShape(64, 8, 64, 64)
    decodes = tuple((1, context) for context in (1, 15, 16, 255, 256, 257, 1000, 2049, 4096, 9001))
    mixed = (*decodes[:6], (128, 128), (64, 1000), (300, 300), (2, 2000))
    return [
        Case("llama-decode", llama, decodes),
        Case("llama-mixed", llama, mixed),
        Case("qwen-decode", qwen, decodes),
        Case("qwen-mixed", qwen, mixed),
        Case("gemma-mixed", gemma, mixed, window=512, softcap=50.0),
        Case("gpt-oss-mixed", oss, mixed, window=128, sinks=True),
        Case("phi-mixed", AttentionShape(32, 32, 80, 80), mixed),
        Case("long-prompt", llama, ((1024, 4096),)),
    ]


def alone(case: Case, number: int) -> Case:
    """The case with one of its sequences only."""
    return replace(case, sequences=(case.sequences[number],))
