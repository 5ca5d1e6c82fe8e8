"""Static choices of the Triton variants: block shapes by dtype, splits by in_features, and what a step launches."""

from dataclasses import dataclass

import torch

SHORT_TOKENS = 16
"""Segments of up to this many tokens use the decode variant (one 16-row tile), longer ones the prefill variant."""
PARTIAL_TOKENS = 512
"""Tokens of a step whose shrink may leave partial sums; beyond it there are programs enough without a split."""
MAX_SPLITS = 16
_MIN_SPLIT = 512
RECORD_WIDTH = 8
ENTRY_WIDTH = 4


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
class Variant:
    """One of the two static variants."""

    name: str
    shrink: ShrinkConfig
    expand: ExpandConfig


@dataclass(frozen=True, slots=True)
class Variants:
    """Decode is for bandwidth, prefill for the matrix units. Both step through columns and ranks in the same order."""

    decode: Variant
    prefill: Variant


def variants(dtype: torch.dtype) -> Variants:
    """The variants of a dtype. Float32 has no matrix unit at full precision, so its tiles are smaller."""
    if dtype.itemsize >= 4:
        return Variants(
            Variant("decode", ShrinkConfig(16, 16, 32, 2, 2), ExpandConfig(16, 16, 64, 4, 2)),
            Variant("prefill", ShrinkConfig(32, 16, 32, 4, 2), ExpandConfig(32, 16, 64, 8, 2)),
        )
    return Variants(
        Variant("decode", ShrinkConfig(16, 16, 128, 4, 4), ExpandConfig(16, 16, 128, 4, 2)),
        Variant("prefill", ShrinkConfig(64, 32, 128, 4, 3), ExpandConfig(64, 32, 128, 8, 2)),
    )


def split_columns(in_features: int, block_k: int) -> tuple[int, int]:
    """(columns per split, splits): at least 512 columns, at most `MAX_SPLITS` splits, a multiple of block_k."""
    columns = max(_MIN_SPLIT, -(-in_features // MAX_SPLITS))
    columns = -(-columns // block_k) * block_k
    return columns, -(-in_features // columns)


def largest_power_of_two(limit: int, *numbers: int) -> int:
    """The largest power of two up to `limit` that divides all numbers."""
    power = limit
    while any(number % power for number in numbers):
        power //= 2
    return power


@dataclass(frozen=True, slots=True)
class Launch:
    """What one variant runs at every site: ranges of the step's static records, and where its h lies.

    `shrink` records name (token, entry, rank block) tiles, `expand` records token tiles with all their entries.
    """

    variant: Variant
    partials: bool
    shrink: tuple[int, int]
    expand: tuple[int, int]
