"""Static choices of the attention kernels: tiles by dtype and head dims, splits by key heads."""

from dataclasses import dataclass

import torch

from .interface import AttentionShape

TILE_WIDTH = 8
"""int32 numbers of one record in the prefill's list of tiles."""
MIN_SPLIT = 256
"""Fewest keys that a decode split is worth."""
SPLITS_AT_ONCE = 8
"""Splits that the reduction loads together."""
_SPLIT_PROGRAMS = 128
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile of [block_m packed query rows, block_n keys]."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ShapeConfig:
    """Everything that is constant for a layer shape and dtype."""

    prefill: TileConfig
    decode: TileConfig
    block_d: int
    block_v: int
    head_tiles: int
    max_splits: int


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def shape_config(shape: AttentionShape, dtype: torch.dtype, capability: int = 80) -> ShapeConfig:
    """The constants of a layer shape on a card of this compute capability (major * 10 + minor).

    The order of accumulation follows from them, so they ignore the batch.
    """
    block_d, block_v = max(16, next_power_of_two(shape.k_dim)), max(16, next_power_of_two(shape.v_dim))
    dim = max(block_d, block_v)
    heads = max(16, next_power_of_two(shape.group))
    if dtype.itemsize >= 4:
        prefill, decode = _float32_tiles(dim)
    else:
        prefill, decode = _half_tiles(dim, heads, capability)
    return ShapeConfig(
        prefill,
        decode,
        block_d,
        block_v,
        head_tiles=-(-shape.group // decode.block_m),
        max_splits=min(64, max(8, next_power_of_two(_SPLIT_PROGRAMS // shape.kv_heads))),
    )


def _float32_tiles(dim: int) -> tuple[TileConfig, TileConfig]:
    """(prefill, decode) without matrix units, which float32 at full precision does not have."""
    if dim <= 64:
        return TileConfig(32, 32, 8, 2), TileConfig(16, 32, 4, 2)
    if dim <= 128:
        return TileConfig(16, 16, 4, 2), TileConfig(16, 16, 8, 2)
    return TileConfig(16, 32, 8, 1), TileConfig(16, 32, 8, 1)


def _half_tiles(dim: int, heads: int, capability: int) -> tuple[TileConfig, TileConfig]:
    """(prefill, decode) of bfloat16 and float16.

    Keys are found through a table, which takes stages of the pipeline: five give a decode two tiles ahead. Hopper's
    and data-centre Blackwell's matrix units read operands from shared memory; elsewhere they pass through registers,
    and tiles are narrower for it. With heads of 64 on Blackwell, a fifth stage spills registers.
    """
    wide = capability // 10 in (9, 10)
    if dim <= 128:
        keys = 64 if wide or dim <= 64 else 32
        stages = 4 if capability // 10 == 10 and dim <= 64 else 5
        return TileConfig(128, keys, 8, stages), TileConfig(min(64, heads), 64, 4, 5)
    return (
        TileConfig(128, 32, 8, 4) if wide else TileConfig(64, 32, 8, 3),
        TileConfig(min(32, heads), 32, 4, 5),
    )


def write_block(width: int) -> int:
    """Elements of a cache row of `width` that one program of the KV write copies."""
    return min(1024, next_power_of_two(width))


def split_bound(config: ShapeConfig, context: int, window: int | None) -> int:
    """The most splits of any sequence of up to `context` tokens; monotone in context, unlike the splits themselves."""
    visible = context if window is None else min(context, window + config.decode.block_n - 1)
    return min(config.max_splits, -(-visible // MIN_SPLIT))


def exponents(scaling: float, softcap: float | None) -> tuple[float, float]:
    """(inner, coefficient) with scores in base 2 = coefficient * u: u = <q, k>, or tanh by way of 2^(inner <q, k>).

    Raises ValueError unless both are positive, which masking relies on.
    """
    if not scaling > 0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"scaling {scaling} and softcap {softcap} must be positive")
    if softcap is None:
        return 0.0, scaling * _LOG2E
    return 2 * _LOG2E * scaling / softcap, softcap * _LOG2E
