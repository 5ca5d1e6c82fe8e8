"""Compiles every configuration that a search of launch tables tries, without a card, and reads the machine code.

Collected by `test_triton_compile.py`, in a process without TRITON_INTERPRET; most of it is slow and only for
`pytest -m slow`."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from loramux.kernels.lora.ahead import CAPABILITIES, Code, compile_expand, compile_fold, compile_shrink
from loramux.kernels.lora.candidates import BLOCK_KS, TILES, expand_configs, fold_configs, shrink_configs
from loramux.kernels.lora.launch import ExpandConfig, FoldConfig, ShrinkConfig

Config = ShrinkConfig | ExpandConfig | FoldConfig
SAMPLE = 29
"""One of so many is compiled in every run."""


def candidates() -> Iterator[Config]:
    for tile in dict.fromkeys(itertools.chain(*TILES.values())):
        yield from expand_configs(tile)
        for block_k in BLOCK_KS:
            yield from shrink_configs(tile, block_k)
    for tokens in (16, 32, 33):
        yield from fold_configs(tokens)


def compiled(config: Config, capability: int) -> Code:
    """As a step of half precision launches it; of a fold the most that one can have to do."""
    if isinstance(config, ShrinkConfig):
        return compile_shrink(torch.bfloat16, config, 4096, capability)
    if isinstance(config, ExpandConfig):
        return compile_expand(torch.bfloat16, config, capability)
    return compile_fold(torch.bfloat16, config, 4096, capability, partials=(8, 1), scaled=True, gates=True)


PAIRS = [
    pytest.param(config, capability, marks=() if number % SAMPLE == 0 else pytest.mark.slow)
    for number, (config, capability) in enumerate(itertools.product(candidates(), CAPABILITIES))
]


@pytest.mark.parametrize(("config", "capability"), PAIRS, ids=str)
def test_candidates(config: Config, capability: int) -> None:
    code = compiled(config, capability)
    assert "EXIT" in code.sass
    assert not code.spills, "registers spill to local memory"
    assert code.fits, f"{code.shared} bytes of shared memory"
    assert code.uses_matrix_units
