"""Cases that every backend has to get right, for tests and for the correctness run before a benchmark.

Shapes are odd on purpose: features that no tile divides, ranks between tiles, sets of several adapters, untouched
modules and slices, base tokens between segments. What must not be read is NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import LoraBackend, ModuleWeights, ScaleName, Segment, Site, SiteSlice
from .reference import add_reference, scale_input_reference

Weights = dict[str, ModuleWeights]
Run = tuple[int, tuple[tuple[int, float], ...]]
"""(tokens, ((adapter number, weight), ...)); no adapters means base tokens."""


@dataclass(frozen=True, slots=True)
class Case:
    """One site, adapters given by the rank of each slice (0: untouched), and one step's runs of tokens.

    `scales` are the (adapter number, slice number, which) that have a scale vector.
    """

    name: str
    in_features: int
    slices: tuple[int, ...]
    adapters: tuple[tuple[int, ...], ...]
    runs: tuple[Run, ...]
    scales: tuple[tuple[int, int, ScaleName], ...] = ()

    @property
    def site(self) -> Site:
        """The site; its modules are named after the slices' numbers."""
        parts = tuple(SiteSlice(f"module{number}", width) for number, width in enumerate(self.slices))
        return Site(0, self.in_features, parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(length for length, _ in self.runs)

    def segments(self, slots: Sequence[int]) -> list[Segment]:
        """The step's segments, with adapter i in slots[i]."""
        segments, start = [], 0
        for length, adapters in self.runs:
            if adapters:
                pairs = tuple((slots[number], weight) for number, weight in adapters)
                segments.append(Segment(start, start + length, pairs))
            start += length
        return segments

    def weights(self, dtype: torch.dtype, seed: int = 0) -> list[Weights]:
        """Random weights of the adapters, on the CPU."""
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, fan_in: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator).mul_(fan_in**-0.5).to(dtype)

        def vector(adapter: int, number: int, which: ScaleName, size: int) -> Tensor | None:
            has = (adapter, number, which) in self.scales
            return torch.randn(size, generator=generator).mul_(0.3).add_(1).to(dtype) if has else None

        scaled = {(adapter, number) for adapter, number, _ in self.scales}
        return [
            {
                f"module{number}": ModuleWeights(
                    matrix(rank, self.in_features, self.in_features),
                    matrix(width, rank, max(rank, 1)),
                    0.5 + number,
                    vector(adapter, number, "out", width),
                    vector(adapter, number, "in", self.in_features),
                )
                for number, (rank, width) in enumerate(zip(ranks, self.slices, strict=True))
                if rank or (adapter, number) in scaled
            }
            for adapter, ranks in enumerate(self.adapters)
        ]

    def gates(self, seed: int = 2) -> Tensor:
        """Random gates [tokens, largest set + 1]; what no set uses, and those of base tokens, are NaN."""
        widest = max((len(adapters) for _, adapters in self.runs), default=0)
        gates = torch.full((self.num_tokens, widest + 1), torch.nan)
        generator = torch.Generator().manual_seed(seed)
        start = 0
        for length, adapters in self.runs:
            used = gates[start : start + length, : len(adapters)]
            used.copy_(torch.rand(used.shape, generator=generator))
            start += length
        return gates


def single(count: int, *, length: int = 1) -> tuple[Run, ...]:
    """One run per adapter, in order."""
    return tuple((length, ((number, 1.0),)) for number in range(count))


def small_cases() -> list[Case]:
    """Cases small enough for an interpreter."""
    qkv = (33, 17, 17)
    return [
        Case("one-token", 64, (64,), ((8,),), single(1)),
        Case("one-feature", 1, (1,), ((1,),), single(1, length=3)),
        Case("distinct", 33, qkv, tuple((rank,) * 3 for rank in (1, 4, 16, 19)), single(4)),
        Case("same-ranks", 64, (64, 64), ((16, 16),) * 5, single(5)),
        Case("reversed", 64, (64, 64), ((16, 16),) * 5, single(5)[::-1]),
        Case("grouped-query", 48, (128, 64, 64), ((8, 8, 8),) * 3, single(3)),
        Case("touched-slices", 40, (24, 8, 24), ((4, 0, 6), (0, 5, 0), (0, 0, 17), (3, 3, 0)), single(4, length=2)),
        Case("mixed-lengths", 65, (70,), ((5,), (16,), (33,)), ((1, ((2, 1.0),)), (40, ((0, 0.5),)), (3, ((1, 1.0),)))),
        Case("base-between", 33, (33,), ((4,), (7,)), ((2, ()), (1, ((1, 1.0),)), (3, ()), (2, ((0, -2.0),)), (1, ()))),
        Case(
            "sets",
            65,
            (40, 24),
            ((3, 3), (16, 0), (20, 20), (1, 40)),
            (
                (1, ((0, 0.25), (1, 0.75))),
                (2, ((3, 1.0), (2, -0.5), (0, 1.5))),
                (18, ((0, 1.0), (1, 0.5), (2, 0.25), (3, 0.125))),
                (1, ((2, 1.0),)),
            ),
        ),
        Case("many-splits", 1100, (17,), ((9,), (2,)), ((1, ((0, 1.0),)), (17, ((1, 1.0),)))),
        Case("large-rank", 20, (24,), ((256,), (100,)), ((2, ((0, 1.0), (1, 0.5))),)),
    ]


def scaled_cases() -> list[Case]:
    """Cases whose adapters have scale vectors, with and without a pair beside them."""
    return [
        Case(
            "output-scales",
            33,
            (33, 17),
            ((4, 4), (5, 0), (16, 3)),
            single(3, length=2),
            ((0, 0, "out"), (1, 1, "out")),
        ),
        Case(
            "no-pair",
            40,
            (24,),
            ((0,), (0,)),
            ((3, ((0, 1.0),)), (1, ()), (2, ((1, 0.5),))),
            ((0, 0, "out"), (1, 0, "in")),
        ),
        Case(
            "scaled-sets",
            65,
            (70,),
            ((8,), (3,), (17,)),
            ((1, ((0, 0.5), (1, 0.5))), (2, ()), (19, ((2, 1.0), (0, 0.25), (1, 2.0))), (1, ((2, 1.0),))),
            ((0, 0, "out"), (0, 0, "in"), (2, 0, "in")),
        ),
    ]


def large_cases() -> list[Case]:
    """Cases of the sizes that models have."""
    zipf = tuple((length, ((number, 1.0),)) for number, length in enumerate((7, 5, 3, 2, 2, 1, 1, 1)))
    return [
        Case("hidden-257", 257, (257, 129), tuple((rank, rank) for rank in range(1, 65)), single(64)),
        Case("hidden-2049", 2049, (2049,), ((16,), (64,), (256,)), ((1, ((0, 1.0),)), (2, ((1, 1.0), (2, 0.5))))),
        Case("zipf", 512, (512, 128, 128), ((16, 16, 16),) * 8, zipf),
        Case("prefill-and-decode", 512, (1408, 1408), ((16, 16),) * 16, ((256, ((0, 1.0),)), *single(16)[1:])),
        Case("long-segment", 128, (192,), ((32,), (8,)), ((1000, ((0, 1.0),)), (300, ((1, 1.0), (0, 0.5))))),
        Case(
            "sets-of-two",
            256,
            (256,),
            ((16,),) * 16,
            tuple((1, ((number, 0.5), ((number + 1) % 16, 0.5))) for number in range(16)),
        ),
    ]


def load(backend: LoraBackend, weights: Mapping[str, ModuleWeights]) -> int:
    """Reserves, fills and publishes an adapter; returns its slot."""
    scales: list[tuple[str, ScaleName]] = [
        *((module, "out") for module, pair in weights.items() if pair.out_scale is not None),
        *((module, "in") for module, pair in weights.items() if pair.in_scale is not None),
    ]  # fmt: skip
    slot = backend.reserve({module: pair.rank for module, pair in weights.items()}, scales)
    backend.fill(slot, weights)
    backend.publish(slot)
    return slot


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, in float64; NaN when the result has a NaN."""
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def check(
    backend: LoraBackend,
    case: Case,
    slots: Sequence[int],
    weights: Sequence[Weights],
    *,
    seed: int = 1,
    gated: bool = False,
    padded: bool = False,
) -> float:
    """Runs the case's step and returns the relative error of the tokens that have adapters, of out or of scaled x.

    x and out of base tokens are NaN, so a term that leaks into or out of them shows. Raises AssertionError when a
    base token was touched, or when a step of base tokens has a plan.
    """
    site, segments, tokens = case.site, case.segments(slots), case.num_tokens
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, site.in_features, generator=generator).to(backend.dtype)
    out = torch.randn(tokens, site.out_features, generator=generator).to(backend.dtype)
    gates = case.gates() if gated else None
    base = torch.ones(tokens, dtype=torch.bool)
    for segment in segments:
        base[segment.start : segment.end] = False
    x[base] = out[base] = float("nan")
    by_slot = dict(zip(slots, weights, strict=True))
    expected = out.double()
    add_reference(site, x, expected, segments, by_slot, gates=gates)
    plan = backend.plan(segments, tokens, padded=padded)
    if plan is None:
        assert not segments, "a step with segments has no plan"
        return 0.0
    inputs, result = x.to(backend.device), out.to(backend.device)
    on_device = None if gates is None else gates.to(backend.device)
    scaled = backend.scale_input(site, inputs, plan, on_device).cpu()
    backend.add(site, inputs, result, plan, on_device)
    assert torch.equal(inputs.cpu()[~base], x[~base]), "the input was written"
    result = result.cpu()
    assert bool(result[base].isnan().all()), "a base token was written"
    assert bool(scaled[base].isnan().all()), "a base token's input was scaled"
    expected_x = scale_input_reference(site, x, segments, by_slot, gates=gates)
    return max(relative_error(result[~base], expected[~base]), relative_error(scaled[~base], expected_x[~base]))


def check_folded(
    backend: LoraBackend,
    case: Case,
    slots: Sequence[int],
    weights: Sequence[Weights],
    *,
    seed: int = 1,
    gated: bool = False,
    padded: bool = False,
    bias: bool = True,
) -> float:
    """Runs the case's step with its projection folded and returns the relative error of all tokens, base ones included.

    Raises AssertionError when the site is not folded, when a number of x is not read where it should be, or written.
    """
    site, segments, tokens = case.site, case.segments(slots), case.num_tokens
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, site.in_features, generator=generator).to(backend.dtype)
    weight = torch.randn(site.out_features, site.in_features, generator=generator).mul_(site.in_features**-0.5)
    weight = weight.to(backend.dtype)
    added = torch.randn(site.out_features, generator=generator).to(backend.dtype) if bias else None
    gates = case.gates() if gated else None
    by_slot = dict(zip(slots, weights, strict=True))
    expected = scale_input_reference(site, x, segments, by_slot, gates=gates) @ weight.double().T
    if added is not None:
        expected += added.double()
    add_reference(site, x, expected, segments, by_slot, gates=gates)
    plan = backend.plan(segments, tokens, padded=padded)
    assert plan is not None, "a step with segments has no plan"
    inputs, on_device = x.to(backend.device), weight.to(backend.device)
    assert backend.folds(site, on_device, plan), "the site is not folded"
    result = backend.project(
        site, inputs, on_device, None if added is None else added.to(backend.device), plan,
        None if gates is None else gates.to(backend.device),
    )  # fmt: skip
    assert torch.equal(inputs.cpu(), x), "the input was written"
    return relative_error(result.cpu(), expected)
