"""Launch tables: block shapes, warps and stages as measured on a card, one JSON file per card in `tables/`.

    {"card": "...", "date": "YYYY-MM-DD", "versions": {"torch": "...", ...}, "entries": [
        {"dtype": "bfloat16", "variant": "decode", "features": 4096,
         "shrink": {"block_m": 16, "block_r": 16, "block_k": 128, "num_warps": 4, "num_stages": 4},
         "expand": {"block_m": 16, "block_r": 16, "block_n": 128, "num_warps": 4, "num_stages": 2}}, ...],
     "folds": [
        {"dtype": "bfloat16", "in_features": 4096, "out_features": 6144, "tokens": 32, "ratio": 1.08, "fold":
         {"block_m": 32, "block_n": 64, "block_k": 64, "block_r": 16, "num_warps": 4, "num_stages": 4}}, ...]}

A site uses the smallest entry that holds its inputs (shrink) or outputs (expand), or else the largest. Folds are of one
projection's shape, and a step uses the one of the fewest tokens that holds it; it is folded by itself where that one's
ratio (seconds of the folded kernel over those of the library's product and the expand) is below 1, and never beyond
what was measured. `benchmarks/tune.py` writes such files. Cards, dtypes and shapes without entries use the untuned
`launch.default_entries` and `launch.default_folds`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launch import (
    SHORT_TOKENS,
    VARIANTS,
    Entry,
    ExpandConfig,
    FoldConfig,
    FoldEntry,
    ShrinkConfig,
    Tile,
    VariantName,
    default_entries,
    default_folds,
    dtype_name,
)

TABLES = Path(__file__).with_name("tables")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BOUNDS = {
    "block_m": (16, 128),
    "block_r": (16, 128),
    "block_k": (16, 512),
    "block_n": (16, 512),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
}
_Config = TypeVar("_Config", ShrinkConfig, ExpandConfig, FoldConfig)


class LaunchTable:
    """Entries of any dtypes and feature classes; see the module's text for which one a site uses."""

    def __init__(self, entries: Iterable[Entry] = (), folds: Iterable[FoldEntry] = (), *, name: str = "table") -> None:
        """Raises ValueError, beginning with `name`, for entries that contradict each other or what the kernels need."""
        self.entries = tuple(entries)
        self.folds = tuple(folds)
        self._by_dtype: dict[str, dict[VariantName, dict[int, Entry]]] = {}
        for number, entry in enumerate(self.entries):
            where = f"{name}, entry {number}"
            _check_entry(entry, where)
            classes = self._by_dtype.setdefault(entry.dtype, {variant: {} for variant in VARIANTS})[entry.variant]
            if entry.features in classes:
                raise ValueError(f"{where}: {entry.dtype} {entry.variant} {entry.features} is there twice")
            classes[entry.features] = entry
        for dtype, variants in self._by_dtype.items():
            _check_agreement(variants, f"{name}, {dtype}")
        keys: set[tuple[str, int, int, int]] = set()
        for number, fold in enumerate(self.folds):
            where = f"{name}, fold {number}"
            _check_fold(fold, where)
            key = (fold.dtype, fold.in_features, fold.out_features, fold.tokens)
            if key in keys:
                raise ValueError(f"{where}: {' '.join(map(str, key))} is there twice")
            keys.add(key)

    def choose(self, dtype: torch.dtype) -> "Choices":
        """The configurations of one dtype: the table's, or the defaults when it has none."""
        variants = self._by_dtype.get(dtype_name(dtype))
        if variants is None:
            variants = {entry.variant: {entry.features: entry} for entry in default_entries(dtype)}
        return Choices(dtype, variants, [fold for fold in self.folds if fold.dtype == dtype_name(dtype)])


class Choices:
    """The configurations of one dtype."""

    def __init__(
        self, dtype: torch.dtype, variants: dict[VariantName, dict[int, Entry]], folds: Iterable[FoldEntry]
    ) -> None:
        self._default_folds = default_folds(dtype)
        self._variants = {variant: sorted(classes.items()) for variant, classes in variants.items()}
        self._folds: dict[tuple[int, int], list[FoldEntry]] = {}
        for fold in sorted(folds, key=lambda each: each.tokens):
            self._folds.setdefault((fold.in_features, fold.out_features), []).append(fold)

    def tile(self, variant: VariantName) -> Tile:
        """What all sites share."""
        shrink = self._variants[variant][0][1].shrink
        return Tile(shrink.block_m, shrink.block_r)

    def shrink(self, variant: VariantName, in_features: int) -> ShrinkConfig:
        """The shrink of a site with so many inputs."""
        return self._entry(variant, in_features).shrink

    def expand(self, variant: VariantName, out_features: int) -> ExpandConfig:
        """The expand of a site with so many outputs, those of all slices together."""
        return self._entry(variant, out_features).expand

    def fold(self, in_features: int, out_features: int, tokens: int) -> FoldConfig:
        """The folded projection of a shape in a step of so many tokens."""
        entry = self._fold_entry(in_features, out_features, tokens)
        if entry is not None:
            return entry.fold
        return next(config for bound, config in self._default_folds if bound >= tokens)

    def fold_won(self, in_features: int, out_features: int, tokens: int) -> bool:
        """Whether folding was measured there and found quicker."""
        entry = self._fold_entry(in_features, out_features, tokens)
        return entry is not None and entry.won

    def folds(self, in_features: int, out_features: int, *, won_only: bool) -> list[FoldConfig]:
        """What `fold` may answer for a shape, or only where `fold_won`."""
        entries = self._folds.get((in_features, out_features), [])
        if won_only:
            return [entry.fold for entry in entries if entry.won]
        return [*(entry.fold for entry in entries), *(config for _, config in self._default_folds)]

    def _fold_entry(self, in_features: int, out_features: int, tokens: int) -> FoldEntry | None:
        entries = self._folds.get((in_features, out_features), ())
        return next((entry for entry in entries if entry.tokens >= tokens), None)

    def _entry(self, variant: VariantName, features: int) -> Entry:
        classes = self._variants[variant]
        return next((entry for bound, entry in classes if bound >= features), classes[-1][1])


def card_slug(card: str) -> str:
    """The file name of a card's table, without its ending: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def table_for(card: str | None, folder: Path = TABLES) -> LaunchTable:
    """The shipped table of a card (named as by its driver), or an empty one, whose choices are the defaults."""
    path = None if card is None else folder / f"{card_slug(card)}.json"
    return LaunchTable() if path is None or not path.is_file() else load_table(path)


def load_table(path: Path) -> LaunchTable:
    """Reads a table. Raises ValueError naming the file, the entry and the field that is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    _check_keys(content, {"card", "date", "versions", "entries", "folds"}, path.name)
    card = str(content["card"])
    if card_slug(card) != path.stem:
        raise ValueError(f"{path.name} holds the table of {card!r}; call it {card_slug(card)}.json")
    for key in ("entries", "folds"):
        if not isinstance(content[key], list):
            raise ValueError(f"{path.name}: {key} must be a list")
    entries = []
    for number, row in enumerate(content["entries"]):
        where = f"{path.name}, entry {number}"
        _check_keys(row, {field.name for field in fields(Entry)}, where)
        shrink = _config(ShrinkConfig, row["shrink"], f"{where}: shrink")
        expand = _config(ExpandConfig, row["expand"], f"{where}: expand")
        entries.append(Entry(row["dtype"], row["variant"], row["features"], shrink, expand))
    folds = []
    for number, row in enumerate(content["folds"]):
        where = f"{path.name}, fold {number}"
        _check_keys(row, {field.name for field in fields(FoldEntry)}, where)
        folds.append(FoldEntry(**row | {"fold": _config(FoldConfig, row["fold"], f"{where}: fold")}))
    return LaunchTable(entries, folds, name=path.name)


def _check_keys(value: Any, expected: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    if value.keys() != expected:
        raise ValueError(f"{where}: missing or unknown {', '.join(sorted(map(str, value.keys() ^ expected)))}")


def _config(kind: type[_Config], value: Any, where: str) -> _Config:
    _check_keys(value, {field.name for field in fields(kind)}, where)
    return kind(**value)


def _check_entry(entry: Entry, where: str) -> None:
    _check_dtype(entry.dtype, where)
    if entry.variant not in VARIANTS:
        raise ValueError(f"{where}: variant {entry.variant!r} is none of {', '.join(VARIANTS)}")
    _check_counts(entry, ("features",), where)
    _check_config(entry.shrink, f"{where}: shrink")
    _check_config(entry.expand, f"{where}: expand")
    if entry.shrink.block_m != entry.expand.block_m:
        raise ValueError(f"{where}: shrink and expand must have the same block_m")
    if (entry.variant == "decode") != (entry.shrink.block_m == SHORT_TOKENS):
        raise ValueError(f"{where}: block_m must be {SHORT_TOKENS} for decode, and more for prefill")


def _check_fold(entry: FoldEntry, where: str) -> None:
    _check_dtype(entry.dtype, where)
    _check_counts(entry, ("in_features", "out_features", "tokens"), where)
    if isinstance(entry.ratio, bool) or not isinstance(entry.ratio, int | float) or not 0 < entry.ratio < float("inf"):
        raise ValueError(f"{where}: ratio {entry.ratio!r} is not a positive number")
    _check_config(entry.fold, f"{where}: fold")


def _check_dtype(name: str, where: str) -> None:
    names = [dtype_name(dtype) for dtype in DTYPES]
    if name not in names:
        raise ValueError(f"{where}: dtype {name!r} is none of {', '.join(names)}")


def _check_counts(entry: Entry | FoldEntry, names: Iterable[str], where: str) -> None:
    for name in names:
        if not _is_count(getattr(entry, name)):
            raise ValueError(f"{where}: {name} {getattr(entry, name)!r} is not a positive whole number")


def _check_config(config: ShrinkConfig | ExpandConfig | FoldConfig, where: str) -> None:
    for field in fields(config):
        number = getattr(config, field.name)
        low, high = _BOUNDS[field.name]
        power = field.name == "num_stages" or (_is_count(number) and number & (number - 1) == 0)
        if not _is_count(number) or not low <= number <= high or not power:
            kind = "whole number" if field.name == "num_stages" else "power of two"
            raise ValueError(f"{where} {field.name} {number!r} is not a {kind} from {low} to {high}")


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _check_agreement(variants: dict[VariantName, dict[int, Entry]], where: str) -> None:
    """Both variants have the same feature classes and the same block_k in each, so that they sum in the same order."""
    decode, prefill = variants["decode"], variants["prefill"]
    if decode.keys() != prefill.keys():
        raise ValueError(
            f"{where}: decode has features {sorted(decode)}, prefill {sorted(prefill)}; give both the same"
        )
    for features, entry in decode.items():
        if entry.shrink.block_k != prefill[features].shrink.block_k:
            raise ValueError(f"{where}, features {features}: decode and prefill must have the same shrink block_k")
    for variant, classes in variants.items():
        tiles = {(entry.shrink.block_m, entry.shrink.block_r) for entry in classes.values()}
        if len(tiles) > 1:
            raise ValueError(f"{where}, {variant}: all entries must have the same block_m and the same shrink block_r")
