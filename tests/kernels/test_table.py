"""Launch tables: which entry a site gets, and what is wrong with a file said by name."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.kernels.lora import LaunchTable
from loramux.kernels.lora.launch import (
    Entry,
    ExpandConfig,
    FoldConfig,
    FoldEntry,
    ShrinkConfig,
    Tile,
    default_entries,
    default_folds,
)
from loramux.kernels.lora.table import DTYPES, TABLES, card_slug, load_table, table_for


def pair(features: int, block_k: int = 64, block_n: int = 64) -> list[Entry]:
    short = ShrinkConfig(16, 16, block_k, 4, 3), ExpandConfig(16, 16, block_n, 2, 2)
    long = ShrinkConfig(64, 32, block_k, 4, 3), ExpandConfig(64, 32, block_n, 4, 2)
    return [Entry("bfloat16", "decode", features, *short), Entry("bfloat16", "prefill", features, *long)]


def write(folder: Path, entries: list[Any], folds: Sequence[Any] = (), card: str = "Made Up 9000") -> Path:
    path = folder / f"{card_slug(card)}.json"
    content = {
        "card": card, "date": "2025-01-31", "versions": {"torch": "2.11"}, "entries": entries, "folds": list(folds),
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_sites_get_the_smallest_entry_that_holds_them(tmp_path: Path) -> None:
    write(tmp_path, [asdict(entry) for entry in [*pair(4096, 128, 128), *pair(1024)]])
    choices = table_for("Made Up 9000", tmp_path).choose(torch.bfloat16)
    assert [choices.shrink("decode", n).block_k for n in (1, 1024, 1025, 4096, 9999)] == [64, 64, 128, 128, 128]
    assert [choices.expand("prefill", n).block_n for n in (1024, 1025)] == [64, 128]
    assert choices.tile("prefill") == Tile(64, 32)


def test_cards_and_dtypes_without_entries_get_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, [asdict(entry) for entry in pair(1)])
    assert table_for("Another", tmp_path).entries == table_for(None, tmp_path).entries == ()
    for dtype in (torch.float16, torch.float32):
        decode, prefill = default_entries(dtype)
        for table in (LaunchTable(), table_for("made up 9000", tmp_path)):
            assert table.choose(dtype).shrink("decode", 5) == decode.shrink
            assert table.choose(dtype).expand("prefill", 5) == prefill.expand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_defaults_are_a_valid_table(dtype: torch.dtype) -> None:
    assert LaunchTable(default_entries(dtype)).entries == default_entries(dtype)


def test_shipped_tables_load() -> None:
    for path in TABLES.glob("*.json"):
        assert load_table(path).entries


FOLD = FoldEntry("bfloat16", 4096, 6144, 32, 0.9, FoldConfig(32, 64, 64, 16, 4, 4))


def test_a_step_gets_the_fold_of_the_fewest_tokens_that_holds_it(tmp_path: Path) -> None:
    tiny, long = FoldConfig(16, 32, 64, 16, 4, 2), FoldConfig(64, 64, 64, 16, 4, 2)
    folds = [replace(FOLD, tokens=512, ratio=1.5, fold=long), FOLD, replace(FOLD, tokens=8, ratio=0.5, fold=tiny)]
    table = load_table(write(tmp_path, [], [asdict(fold) for fold in folds]))
    assert table.folds == tuple(folds)
    choices = table.choose(torch.bfloat16)
    defaults = [config for _, config in default_folds(torch.bfloat16)]
    for tokens, config, won in (
        (1, tiny, True), (8, tiny, True), (9, FOLD.fold, True), (33, long, False), (513, defaults[-1], False),
    ):  # fmt: skip
        assert choices.fold(4096, 6144, tokens) == config
        assert choices.fold_won(4096, 6144, tokens) == won
    assert choices.folds(4096, 6144, won_only=True) == [tiny, FOLD.fold]
    assert choices.folds(4096, 6144, won_only=False) == [tiny, FOLD.fold, long, *defaults]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_that_were_not_measured_get_the_default_folds_and_never_by_themselves(dtype: torch.dtype) -> None:
    choices = LaunchTable(folds=[FOLD]).choose(dtype)
    defaults = default_folds(dtype)
    for tokens in (1, 16, 17, 32, 33, 9999):
        assert choices.fold(4096, 4096, tokens) == next(config for bound, config in defaults if tokens <= bound)
        assert not choices.fold_won(4096, 4096, tokens)
    assert choices.folds(4096, 4096, won_only=True) == []
    assert LaunchTable(folds=[replace(FOLD, fold=config) for _, config in defaults[:1]]).folds


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([FOLD, FOLD], "fold 1: bfloat16 4096 6144 32 is there twice"),
        ([replace(FOLD, dtype="int8")], "fold 0: dtype 'int8' is none of bfloat16"),
        ([replace(FOLD, tokens=0)], "fold 0: tokens 0 is not a positive whole number"),
        ([replace(FOLD, in_features=1.5)], "in_features 1.5 is not a positive whole number"),
        ([replace(FOLD, ratio=0)], "ratio 0 is not a positive number"),
        ([replace(FOLD, ratio="fast")], "ratio 'fast' is not a positive number"),
        ([replace(FOLD, fold=replace(FOLD.fold, block_r=8))], "fold block_r 8 is not a power of two from 16 to 128"),
    ],
)
def test_wrong_folds_are_named(folds: list[FoldEntry], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [], [asdict(fold) for fold in folds])
    with pytest.raises(ValueError, match=r"made-up-9000\.json.*" + message):
        load_table(path)


DECODE, PREFILL = pair(1024)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([DECODE], r"decode has features \[1024\], prefill \[\]"),
        ([DECODE, PREFILL, DECODE], "entry 2: bfloat16 decode 1024 is there twice"),
        ([replace(DECODE, dtype="int8"), PREFILL], "entry 0: dtype 'int8' is none of bfloat16"),
        ([replace(DECODE, variant="both"), PREFILL], "variant 'both' is none of decode, prefill"),
        ([replace(DECODE, features=0), PREFILL], "features 0 is not a positive whole number"),
        (
            [replace(DECODE, shrink=replace(DECODE.shrink, num_warps=3)), PREFILL],
            "shrink num_warps 3 is not a power",
        ),
        ([replace(DECODE, shrink=replace(DECODE.shrink, num_stages=9)), PREFILL], "shrink num_stages 9 is not a whole"),
        (
            [replace(DECODE, expand=replace(DECODE.expand, block_n=8)), PREFILL],
            "expand block_n 8 is not a power",
        ),
        ([replace(DECODE, expand=replace(DECODE.expand, block_n=True)), PREFILL], "expand block_n True is not a power"),
        ([DECODE, replace(PREFILL, expand=replace(PREFILL.expand, block_m=32))], "must have the same block_m"),
        ([DECODE, replace(DECODE, variant="prefill")], "block_m must be 16 for decode, and more for"),
        ([DECODE, replace(PREFILL, shrink=replace(PREFILL.shrink, block_k=128))], "must have the same shrink block_k"),
        (
            [DECODE, PREFILL, *(replace(e, shrink=replace(e.shrink, block_r=64)) for e in pair(2048))],
            "decode: all entries must have the same block_m and the same shrink block_r",
        ),
    ],
)
def test_contradictions_are_named(entries: list[Entry], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [asdict(entry) for entry in entries])
    with pytest.raises(ValueError, match=r"made-up-9000\.json.*" + message):
        load_table(path)


def test_malformed_files_are_named(tmp_path: Path) -> None:
    good = asdict(DECODE)
    for entries, message in [
        ([{**good, "more": 1}], "entry 0: missing or unknown more"),
        ([{**good, "shrink": {"block_m": 16}}], "entry 0: shrink: missing or unknown block_k, block_r"),
        ([3], "entry 0 must be an object"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_table(write(tmp_path, entries))
    with pytest.raises(ValueError, match="fold 0: fold: missing or unknown block_k"):
        load_table(write(tmp_path, [], [asdict(FOLD) | {"fold": {"block_m": 16}}]))
    path = write(tmp_path, []).rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"call it made-up-9000\.json"):
        load_table(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json is not JSON"):
        load_table(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json must be an object"):
        load_table(path)
