"""The search of launch tables, over made-up times, and what it writes."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loramux.kernels.lora.launch import Entry, FoldEntry, Tile
from loramux.kernels.lora.table import load_table

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
FAST = {"decode": (2, 64), "prefill": (8, 128)}
"""Warps and expand's block_n of each variant's quickest entries."""


@pytest.fixture(scope="module")
def tune() -> Iterator[ModuleType]:
    """benchmarks/tune.py as `python benchmarks/tune.py` runs it; the path and the short names are put back."""
    names = ("report", "tune")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module("tune")
    finally:
        sys.path.remove(FOLDER)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def seconds(entry: Entry) -> tuple[float, float]:
    """Prefers block_k 128 for up to 1024 features and 64 beyond it, tiles of 64 rows, and `FAST`."""
    warps, block_n = FAST[entry.variant]
    likes = (
        (entry.shrink.block_k == (128 if entry.features <= 1024 else 64)) + (entry.shrink.num_warps == warps),
        (entry.expand.block_n == block_n) + (entry.expand.num_warps == warps),
    )
    rows = 1.0 if entry.variant == "decode" or entry.shrink.block_m == 64 else 2.0
    return rows * (4 - likes[0]), rows * (4 - likes[1])


def test_the_quickest_agreeing_entries_are_chosen_written_and_read(tune: ModuleType, tmp_path: Path) -> None:
    entries = tune.search(torch.bfloat16, [1024, 4096], seconds, lambda entry: True)
    assert [(entry.variant, entry.features) for entry in entries] == [
        ("decode", 1024), ("prefill", 1024), ("decode", 4096), ("prefill", 4096),
    ]  # fmt: skip
    for entry in entries:
        assert (entry.expand.num_warps, entry.expand.block_n) == FAST[entry.variant]
        assert entry.shrink.num_warps == FAST[entry.variant][0]
        assert entry.shrink.block_k == (128 if entry.features == 1024 else 64)
        assert entry.shrink.block_m == (16 if entry.variant == "decode" else 64)
    where = {"card": "Made Up 9000", "date": "2025-01-31", "packages": {"torch": "2.11", "triton": "3.6"}}
    path = tmp_path / "tables" / "made-up-9000.json"
    folds = tune.search_folds(torch.bfloat16, [(64, 32)], fold_seconds, lambda entry: True)
    tune.write_table(path, where, entries, folds)
    assert list(load_table(path).entries) == entries
    assert list(load_table(path).folds) == folds


def fold_seconds(entry: FoldEntry | None, inputs: int, outputs: int, tokens: int) -> float:
    """3 apart; folded 2 at the widest tiles for up to 32 tokens, 4 beyond and at narrower ones."""
    if entry is None:
        return 3.0
    return 2.0 if entry.fold.block_n == 64 and tokens <= 32 else 4.0


def test_folds_are_kept_with_their_ratio_whether_they_won_or_not(tune: ModuleType) -> None:
    folds = tune.search_folds(torch.bfloat16, [(64, 32), (64, 96)], fold_seconds, lambda entry: True, (1, 32, 128))
    assert [(fold.out_features, fold.tokens, fold.won) for fold in folds] == [
        (outs, tokens, tokens <= 32) for outs in (32, 96) for tokens in (1, 32, 128)
    ]
    assert {fold.ratio for fold in folds} == {2 / 3, 4 / 3}
    assert all(fold.fold.block_n == 64 for fold in folds if fold.won)
    right = tune.search_folds(
        torch.bfloat16, [(64, 32)], fold_seconds, lambda entry: entry.fold.block_n == 32, (1, 128)
    )
    assert [(fold.tokens, fold.won) for fold in right] == [(1, False)]
    assert tune.search_folds(torch.bfloat16, [(64, 32)], fold_seconds, lambda entry: False) == []


def test_shapes_are_read(tune: ModuleType) -> None:
    assert tune._shape("4096x6144") == (4096, 6144)
    for text in ("4096", "0x5", "ax5", "1x2x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="INxOUT"):
            tune._shape(text)


def test_wrong_and_impossible_entries_are_passed_over(tune: ModuleType) -> None:
    def is_right(entry: Entry) -> bool:
        return entry.shrink.num_warps != 2

    tiles = {"decode": (Tile(16, 16),), "prefill": (Tile(64, 32),)}
    plain = [entry.shrink for entry in tune.default_entries(torch.bfloat16)]

    def time(entry: Entry) -> tuple[float, float]:
        if entry.shrink.num_warps == 8 and entry.shrink not in plain:
            return float("inf"), float("inf")
        return seconds(entry)

    for entry in tune.search(torch.bfloat16, [512], time, is_right, tiles, [64]):
        assert entry.shrink.num_warps == 4
    with pytest.raises(RuntimeError, match=r"bfloat16 is right for all of \[512\]"):
        tune.search(torch.bfloat16, [512], seconds, lambda entry: False, tiles, [64])


def test_every_candidate_fits_a_table(tune: ModuleType) -> None:
    for variant, tiles in tune.TILES.items():
        for tile in tiles:
            plain = next(entry for entry in tune.default_entries(torch.bfloat16) if entry.variant == variant)
            for entry in (
                *(tune._with(plain, tile, shrink=config) for config in tune.shrink_configs(tile, 64)),
                *(tune._with(plain, tile, expand=config) for config in tune.expand_configs(tile)),
            ):
                tune.LaunchTable(tune._both(entry))
    for tokens in tune.FOLD_TOKENS:
        for config in tune.fold_configs(tokens):
            tune.LaunchTable(folds=[FoldEntry("bfloat16", 64, 32, tokens, 1.0, config)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a card")
def test_without_a_card_it_says_so(tune: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tune.main(["--folder", str(tmp_path)]) == 1
    assert "has none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
