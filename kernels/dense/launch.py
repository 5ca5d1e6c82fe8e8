"""Static choices of the dense kernels: one tile per dtype, splits by the weights' shape."""

from dataclasses import dataclass

import torch

GROUP = 8
"""Row tiles that go through the same weights side by side, so that they meet in the cache."""
PARTIAL_ROWS = 64
"""Rows of a product whose splits may run side by side: beyond it there are programs enough."""
SUM_BLOCK = 1024
_PROGRAMS = 256
_MIN_SPLIT = 512
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """Tile of [block_m rows, block_n outputs] in steps of block_k columns; the order of summation follows from it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def product_config(dtype: torch.dtype) -> ProductConfig:
    """The tile of a dtype, the same for 1 row and for 8192.

    64 rows are the fewest that Hopper's matrix units take and cost a decode less than the bytes of its weights.
    Float32 has no matrix unit at full precision, so its tile is smaller.
    """
    if dtype.itemsize >= 4:
        return ProductConfig(32, 32, 32, 4, 2)
    return ProductConfig(64, 128, 64, 8, 3)


def splits(out_features: int, in_features: int, config: ProductConfig) -> tuple[int, int]:
    """(columns per split, splits): one tile of rows occupies a large card, and a split has at least 512 columns."""
    wanted = -(-_PROGRAMS // -(-out_features // config.block_n))
    columns = max(_MIN_SPLIT, -(-in_features // min(wanted, _MAX_SPLITS)))
    columns = -(-columns // config.block_k) * config.block_k
    return columns, -(-in_features // columns)
