"""The launch configurations that a search tries on a card. All of them compile for every card without spills."""

import itertools
from collections.abc import Iterator

from .launch import ExpandConfig, FoldConfig, ShrinkConfig, Tile, VariantName

TILES: dict[VariantName, tuple[Tile, ...]] = {"decode": (Tile(16, 16),), "prefill": (Tile(32, 32), Tile(64, 32))}
"""Tiles of either variant."""
BLOCK_KS = (64, 128, 256)
"""Columns of a shrink's step."""


def shrink_configs(tile: Tile, block_k: int) -> Iterator[ShrinkConfig]:
    """The shrinks of a tile that are tried; four stages of long steps take more shared memory than there is."""
    stages = (2,) if block_k > 128 and tile.block_m > 16 else (2, 4)
    for num_warps, num_stages in itertools.product((2, 4, 8), stages):
        yield ShrinkConfig(tile.block_m, tile.block_r, block_k, num_warps, num_stages)


def expand_configs(tile: Tile) -> Iterator[ExpandConfig]:
    """The expands of a tile that are tried; two warps have too few registers for 64 rows."""
    warps = (4, 8) if tile.block_m > 32 else (2, 4, 8)
    for block_n, num_warps in itertools.product((64, 128), warps):
        yield ExpandConfig(tile.block_m, tile.block_r, block_n, num_warps, 2)


def fold_configs(tokens: int) -> Iterator[FoldConfig]:
    """The folded projections that are tried in steps of so many tokens: tiles of about as many rows, 64 at most."""
    if tokens <= 16:
        for block_n, block_k in itertools.product((16, 32, 64), (64, 128)):
            yield FoldConfig(16, block_n, block_k, 16, 4, 4)
    elif tokens <= 32:
        for block_n, num_stages in itertools.product((32, 64), (3, 4)):
            yield FoldConfig(32, block_n, 64, 16, 4, num_stages)
    else:
        for block_n, num_stages in itertools.product((64, 128), (3, 4)):
            yield FoldConfig(64, block_n, 64, 16, 8, num_stages)
