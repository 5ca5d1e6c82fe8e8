"""Launch tables: block shapes, warps and stages as measured on a card, one JSON file per card in `tables/`.

    {"card": "...", "date": "YYYY-MM-DD", "versions": {"torch": "...", ...}, "entries": [
        {"dtype": "bfloat16", "variant": "decode", "features": 4096,
         "shrink": {"block_m": 16, "block_r": 16, "block_k": 128, "num_warps": 4, "num_stages": 4},
         "expand": {"block_m": 16, "block_r": 16, "block_n": 128, "num_warps": 4, "num_stages": 2}}, ...]}

A site uses the smallest entry that holds its inputs (shrink) or outputs (expand), or else the largest.
`benchmarks/tune.py` writes such files. Cards and dtypes without entries use the untuned `launch.default_entries`.
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
    ShrinkConfig,
    Tile,
    VariantName,
    default_entries,
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
_Config = TypeVar("_Config", ShrinkConfig, ExpandConfig)


class LaunchTable:
    """Entries of any dtypes and feature classes; see the module's text for which one a site uses."""

    def __init__(self, entries: Iterable[Entry] = (), *, name: str = "table") -> None:
        """Raises ValueError, beginning with `name`, for entries that contradict each other or what the kernels need."""
        self.entries = tuple(entries)
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

    def choose(self, dtype: torch.dtype) -> "Choices":
        """The configurations of one dtype: the table's, or the defaults when it has none."""
        variants = self._by_dtype.get(dtype_name(dtype))
        if variants is None:
            variants = {entry.variant: {entry.features: entry} for entry in default_entries(dtype)}
        return Choices(variants)


class Choices:
    """The configurations of one dtype."""

    def __init__(self, variants: dict[VariantName, dict[int, Entry]]) -> None:
        self._variants = {variant: sorted(classes.items()) for variant, classes in variants.items()}

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
    _check_keys(content, {"card", "date", "versions", "entries"}, path.name)
    card = str(content["card"])
    if card_slug(card) != path.stem:
        raise ValueError(f"{path.name} holds the table of {card!r}; call it {card_slug(card)}.json")
    if not isinstance(content["entries"], list):
        raise ValueError(f"{path.name}: entries must be a list")
    entries = []
    for number, row in enumerate(content["entries"]):
        where = f"{path.name}, entry {number}"
        _check_keys(row, {field.name for field in fields(Entry)}, where)
        shrink = _config(ShrinkConfig, row["shrink"], f"{where}: shrink")
        expand = _config(ExpandConfig, row["expand"], f"{where}: expand")
        entries.append(Entry(row["dtype"], row["variant"], row["features"], shrink, expand))
    return LaunchTable(entries, name=path.name)


def _check_keys(value: Any, expected: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    if value.keys() != expected:
        raise ValueError(f"{where}: missing or unknown {', '.join(sorted(map(str, value.keys() ^ expected)))}")


def _config(kind: type[_Config], value: Any, where: str) -> _Config:
    _check_keys(value, {field.name for field in fields(kind)}, where)
    return kind(**value)


def _check_entry(entry: Entry, where: str) -> None:
    names = [dtype_name(dtype) for dtype in DTYPES]
    if entry.dtype not in names:
        raise ValueError(f"{where}: dtype {entry.dtype!r} is none of {', '.join(names)}")
    if entry.variant not in VARIANTS:
        raise ValueError(f"{where}: variant {entry.variant!r} is none of {', '.join(VARIANTS)}")
    if not _is_count(entry.features):
        raise ValueError(f"{where}: features {entry.features!r} is not a positive whole number")
    for part, config in (("shrink", entry.shrink), ("expand", entry.expand)):
        for field in fields(config):
            number = getattr(config, field.name)
            low, high = _BOUNDS[field.name]
            power = field.name == "num_stages" or (_is_count(number) and number & (number - 1) == 0)
            if not _is_count(number) or not low <= number <= high or not power:
                kind = "whole number" if field.name == "num_stages" else "power of two"
                raise ValueError(f"{where}: {part} {field.name} {number!r} is not a {kind} from {low} to {high}")
    if entry.shrink.block_m != entry.expand.block_m:
        raise ValueError(f"{where}: shrink and expand must have the same block_m")
    if (entry.variant == "decode") != (entry.shrink.block_m == SHORT_TOKENS):
        raise ValueError(f"{where}: block_m must be {SHORT_TOKENS} for decode, and more for prefill")


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
