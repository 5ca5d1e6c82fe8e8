"""Static choices of the Triton kernels: block shapes, splits by in_features, grids, and what a step launches."""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

VariantName = Literal["decode", "prefill"]
VARIANTS: tuple[VariantName, VariantName] = ("decode", "prefill")

SHORT_TOKENS = 16
"""Segments of up to this many tokens use the decode variant (one 16-row tile), longer ones the prefill variant."""
PARTIAL_TOKENS = 512
"""Tokens of a step whose shrink may leave partial sums; beyond it there are programs enough without a split."""
MAX_SPLITS = 16
_MIN_SPLIT = 512
RECORD_WIDTH = 8
ENTRY_WIDTH = 4
SCALE_ELEMENTS = 4096
"""Elements of x that one program of the input scaling takes."""
MOST_REGISTERS = 255
"""Registers per thread that an expand or a folded projection may take: all there are. Left to itself, the assembler
spills a few to fit one more block on a multiprocessor."""
SEARCH_RECORDS = 256
"""Records that a folded projection's program looks at together when it seeks those of its tokens."""
PADDED_PROGRAMS = 2048
"""Programs of a padded launch: about what a large card holds at once. Those without work cost a launch slot each."""
MIN_PADDED = 16
"""Shrink programs of a padded step per split and slice, at least: a single token's 256 ranks side by side."""


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """Tile of [block_m tokens, block_r ranks] in steps of block_k columns."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Tile of [block_m tokens, block_n outputs] in steps of block_r ranks."""

    block_m: int
    block_r: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Shapes of both kernels for sites of up to `features` inputs (shrink) or outputs (expand).

    Decode is for bandwidth, prefill for the matrix units.
    """

    dtype: str
    variant: VariantName
    features: int
    shrink: ShrinkConfig
    expand: ExpandConfig


@dataclass(frozen=True, slots=True)
class FoldConfig:
    """Tile of [block_m tokens, block_n outputs]: its product in steps of block_k columns, its term of block_r ranks."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class FoldEntry:
    """The folded projection of one shape in steps of up to `tokens`, as measured beside the library's product.

    `ratio` is the seconds of the folded kernel over those of the product and the expand apart.
    """

    dtype: str
    in_features: int
    out_features: int
    tokens: int
    ratio: float
    fold: FoldConfig

    @property
    def won(self) -> bool:
        """Whether folding was quicker."""
        return self.ratio < 1


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a variant's tiles and ranks of its shrink's tiles: equal at all sites, which share a step's records."""

    block_m: int
    block_r: int


def default_entries(dtype: torch.dtype) -> tuple[Entry, ...]:
    """Untuned entries of a dtype, for all features, chosen to compile without spills on sm_80, sm_90 and sm_100.

    Float32 has no matrix unit at full precision, so its tiles are smaller.
    """
    name = dtype_name(dtype)
    if dtype.itemsize >= 4:
        return (
            Entry(name, "decode", 1, ShrinkConfig(16, 16, 32, 2, 2), ExpandConfig(16, 16, 64, 4, 2)),
            Entry(name, "prefill", 1, ShrinkConfig(32, 16, 32, 8, 2), ExpandConfig(32, 16, 64, 8, 2)),
        )
    return (
        Entry(name, "decode", 1, ShrinkConfig(16, 16, 128, 4, 4), ExpandConfig(16, 16, 128, 2, 2)),
        Entry(name, "prefill", 1, ShrinkConfig(64, 32, 128, 8, 3), ExpandConfig(64, 32, 64, 4, 2)),
    )


def default_folds(dtype: torch.dtype) -> tuple[tuple[int, FoldConfig], ...]:
    """(most tokens of a step, tile) of untuned folded projections, ascending, chosen like `default_entries`.

    Tiles are narrow where tokens are few, so that weights that nobody splits still occupy a card.
    """
    if dtype.itemsize >= 4:
        return (16, FoldConfig(16, 32, 32, 16, 4, 2)), (sys.maxsize, FoldConfig(32, 32, 32, 16, 8, 2))
    return (
        (16, FoldConfig(16, 32, 128, 16, 4, 4)),
        (32, FoldConfig(32, 64, 64, 16, 4, 4)),
        (sys.maxsize, FoldConfig(64, 128, 64, 16, 8, 3)),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def split_columns(in_features: int, block_k: int) -> tuple[int, int]:
    """(columns per split, splits): at least 512 columns, at most `MAX_SPLITS` splits, a multiple of block_k."""
    columns = max(_MIN_SPLIT, -(-in_features // MAX_SPLITS))
    columns = -(-columns // block_k) * block_k
    return columns, -(-in_features // columns)


def padded_programs(most: int, beside: int) -> int:
    """Programs along the records of a padded launch: `most`, or fewer where `beside` programs stand beside each."""
    return min(most, -(-PADDED_PROGRAMS // beside))


def largest_power_of_two(limit: int, *numbers: int) -> int:
    """The largest power of two up to `limit` that divides all numbers."""
    power = limit
    while any(number % power for number in numbers):
        power //= 2
    return power


@dataclass(frozen=True, slots=True)
class Launch:
    """What one variant runs at every site, as (row of the header in the step's static records, programs).

    `shrink` records name (token, entry, rank block) tiles, `expand` records token tiles with all their entries.
    With `padded`, programs are an upper bound, to be brought down to what a card holds.
    """

    variant: VariantName
    partials: bool
    padded: bool
    shrink: tuple[int, int]
    expand: tuple[int, int]
