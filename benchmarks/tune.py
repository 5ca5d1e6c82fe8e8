"""Searches block shapes, warps and stages of the LoRA kernels on this machine's card and writes its launch table.

    PYTHONPATH=src python benchmarks/tune.py --features 1024 4096 16384 --folds 4096x6144 4096x4096

For each feature class, decode is timed as 32 distinct adapters of rank 16 with one token each, prefill as 4 segments of
512 tokens. Every site of a run has its own adapters, of more bytes than a card's cache holds, so that weights come from
memory as they do between the layers of a model. A configuration that is wrong against float64, or spills registers on
any card the kernels are held to, is not chosen.

For each of `--folds`, a projection of so many inputs x outputs, the folded kernel is timed beside the library's product
and the expand, in steps of several numbers of tokens with up to 32 adapters, and the ratio is written whichever won:
the server folds by itself where it is below 1. All of them start from the same shrink, whose seconds are taken off.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from report import environment
from torch.nn import functional as F

from loramux.kernels.lora import (
    LaunchTable,
    LoraBackend,
    LoraPlan,
    ModuleWeights,
    Segment,
    Site,
    SiteSlice,
    make_backend,
)
from loramux.kernels.lora.ahead import CAPABILITIES, compile_expand, compile_fold, compile_shrink
from loramux.kernels.lora.candidates import BLOCK_KS, TILES, expand_configs, fold_configs, shrink_configs
from loramux.kernels.lora.cases import Case, check, check_folded, load
from loramux.kernels.lora.launch import (
    VARIANTS,
    Entry,
    ExpandConfig,
    FoldEntry,
    ShrinkConfig,
    Tile,
    VariantName,
    default_entries,
    dtype_name,
)
from loramux.kernels.lora.table import DTYPES, TABLES, card_slug, load_table

COLD_BYTES = 1 << 28
"""Bytes of the adapters of a timed pass: several times the cache of the cards there are."""
RANK = 16
ROUNDS = 15
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FOLD_TOKENS = (1, 16, 32, 128, 512)
"""Tokens of the steps that folding is tried in; longer ones are never folded by themselves."""
FOLD_ADAPTERS = 32
FOLD_SHAPES = (
    (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (896, 1152), (896, 896), (896, 9728), (4864, 896),
)  # fmt: skip
"""Packed projections of an 8B and of a 0.5B model."""

Timer = Callable[[Entry], tuple[float, float]]
"""Seconds of (shrink, expand) per site at an entry's configurations and features."""
Check = Callable[[Entry], bool]
FoldTimer = Callable[[FoldEntry | None, int, int, int], float]
"""Seconds per site of (a folded projection, or None for product and expand apart; inputs, outputs, tokens)."""
FoldCheck = Callable[[FoldEntry], bool]


@dataclass(frozen=True, slots=True)
class Best:
    """The quickest entry that is right, and its seconds relative to the default's."""

    entry: Entry
    ratio: float


def search(
    dtype: torch.dtype,
    features: Sequence[int],
    time: Timer,
    is_right: Check,
    tiles: dict[VariantName, tuple[Tile, ...]] | None = None,
    block_ks: Sequence[int] = BLOCK_KS,
) -> list[Entry]:
    """The table's entries: both variants of every feature class.

    A variant's tile is the same in all classes, and block_k the same in both variants of a class; among what that
    allows, the sum of the ratios to the defaults' times is the least. Raises RuntimeError where nothing is right.
    """
    chosen = tiles or TILES
    defaults = {entry.variant: entry for entry in default_entries(dtype)}
    found: dict[tuple[VariantName, Tile, int, int], Best] = {}
    for variant, number in itertools.product(VARIANTS, features):
        plain = _at(defaults[variant], number)
        base = time(plain)
        for tile in chosen[variant]:
            expand = _best(
                ((_with(plain, tile, expand=config), 1) for config in expand_configs(tile)), time, base, is_right
            )
            for block_k in block_ks:
                shrinks = ((_with(plain, tile, shrink=config), 0) for config in shrink_configs(tile, block_k))
                shrink = _best(shrinks, time, base, is_right)
                if shrink is not None and expand is not None:
                    entry = Entry(plain.dtype, variant, number, shrink.entry.shrink, expand.entry.expand)
                    found[variant, tile, number, block_k] = Best(entry, shrink.ratio + expand.ratio)
    options: list[tuple[float, list[Entry]]] = []
    for pair in itertools.product(chosen["decode"], chosen["prefill"]):
        total = 0.0
        entries: list[Entry] = []
        for number in features:
            both = [
                [found[variant, tile, number, block_k] for variant, tile in zip(VARIANTS, pair, strict=True)]
                for block_k in block_ks
                if all((variant, tile, number, block_k) in found for variant, tile in zip(VARIANTS, pair, strict=True))
            ]
            if not both:
                break
            best = min(both, key=lambda bests: sum(one.ratio for one in bests))
            total += sum(one.ratio for one in best)
            entries.extend(one.entry for one in best)
        else:
            options.append((total, entries))
    if not options:
        raise RuntimeError(f"no configuration of {dtype_name(dtype)} is right for all of {list(features)}")
    return min(options, key=lambda option: option[0])[1]


def _at(entry: Entry, features: int) -> Entry:
    return Entry(entry.dtype, entry.variant, features, entry.shrink, entry.expand)


def _with(plain: Entry, tile: Tile, *, shrink: ShrinkConfig | None = None, expand: ExpandConfig | None = None) -> Entry:
    """An entry with one configuration tried, and the default of the other at the same tile."""
    other_shrink = ShrinkConfig(tile.block_m, tile.block_r, plain.shrink.block_k, 4, 2)
    other_expand = ExpandConfig(tile.block_m, tile.block_r, 64, 4, 2)
    return Entry(plain.dtype, plain.variant, plain.features, shrink or other_shrink, expand or other_expand)


def _best(tried: Iterable[tuple[Entry, int]], time: Timer, base: tuple[float, float], is_right: Check) -> Best | None:
    """The quickest right one of entries, each with the kernel (0 shrink, 1 expand) that it is timed for."""
    timed = sorted(((time(entry)[kernel] / base[kernel], entry) for entry, kernel in tried), key=lambda pair: pair[0])
    return next((Best(entry, ratio) for ratio, entry in timed if ratio < float("inf") and is_right(entry)), None)


def search_folds(
    dtype: torch.dtype,
    shapes: Iterable[tuple[int, int]],
    time: FoldTimer,
    is_right: FoldCheck,
    tokens: Sequence[int] = FOLD_TOKENS,
) -> list[FoldEntry]:
    """The quickest right folded projection of each (inputs, outputs) and number of tokens, with its ratio to the
    product and the expand apart, above 1 or below. A shape where none is right has no entry."""
    found: list[FoldEntry] = []
    for (inputs, outputs), count in itertools.product(shapes, tokens):
        apart = time(None, inputs, outputs, count)
        tried = [FoldEntry(dtype_name(dtype), inputs, outputs, count, 1.0, config) for config in fold_configs(count)]
        timed = sorted(((time(entry, inputs, outputs, count), entry) for entry in tried), key=lambda pair: pair[0])
        for seconds, entry in timed:
            if seconds < float("inf") and is_right(entry):
                found.append(replace(entry, ratio=seconds / apart))
                break
    return found


class Card:
    """Times and checks entries on the card."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._seconds: dict[Entry, tuple[float, float]] = {}

    def time(self, entry: Entry) -> tuple[float, float]:
        """Seconds of shrink and expand per site, medians over replays of graphs; infinite where it cannot run."""
        if entry not in self._seconds:
            try:
                self._seconds[entry] = self._measure(entry)
            except Exception as error:  # a shape that asks for more shared memory than there is, say
                sys.stderr.write(f"{entry}: {error}\n")
                self._seconds[entry] = (float("inf"), float("inf"))
        return self._seconds[entry]

    def _backend(self, entry: Entry, sites: Sequence[Site], slots: int, budget: int, tokens: int) -> LoraBackend:
        return make_backend(
            sites, dtype=self._dtype, device="cuda", budget_bytes=budget, max_slots=slots, max_tokens=tokens,
            implementation="triton", table=LaunchTable(_both(entry)),
        )  # fmt: skip

    def _measure(self, entry: Entry) -> tuple[float, float]:
        count, length = (32, 1) if entry.variant == "decode" else (4, 512)
        features, size = entry.features, self._dtype.itemsize
        per_site = count * RANK * 2 * features * size
        sites = [
            Site(number, features, (SiteSlice(f"m{number}", features),))
            for number in range(max(2, -(-COLD_BYTES // per_site)))
        ]
        backend = self._backend(entry, sites, count, 2 * per_site * len(sites), count * length)
        A = torch.randn(RANK, features, device="cuda", dtype=self._dtype) * features**-0.5
        B = torch.randn(features, RANK, device="cuda", dtype=self._dtype)
        slots = [
            load(backend, {site.slices[0].module: ModuleWeights(A, B, 1.0) for site in sites}) for _ in range(count)
        ]
        segments = [Segment(n * length, (n + 1) * length, ((slot, 1.0),)) for n, slot in enumerate(slots)]
        plan = backend.plan(segments, count * length)
        assert plan is not None
        x = torch.randn(count * length, features, device="cuda", dtype=self._dtype)
        out = torch.zeros(count * length, features, device="cuda", dtype=self._dtype)
        both = _replay_seconds(lambda: _run(backend, sites, x, out, plan))
        shrink = _replay_seconds(lambda: _run(backend, sites, x, None, plan))
        return shrink / len(sites), (both - shrink) / len(sites)

    def is_right(self, entry: Entry) -> bool:
        """Whether the result is near float64's, and nothing spills on any of the cards the kernels are held to."""
        length = 3 if entry.variant == "decode" else 70
        case = Case(
            "tune", entry.features, (entry.features,), ((16,), (40,)), ((length, ((0, 1.0),)), (length, ((1, 0.5),)))
        )
        weights = case.weights(self._dtype)
        backend = self._backend(entry, [case.site], 2, 64 * 4 * entry.features * self._dtype.itemsize, 256)
        if not check(backend, case, [load(backend, adapter) for adapter in weights], weights) <= TOLERANCE[self._dtype]:
            return False
        codes = (
            code
            for capability in CAPABILITIES
            for code in (
                compile_shrink(self._dtype, entry.shrink, entry.features, capability),
                compile_expand(self._dtype, entry.expand, capability),
            )
        )
        return not any(code.spills or not code.fits for code in codes)

    def time_fold(self, entry: FoldEntry | None, inputs: int, outputs: int, tokens: int) -> float:
        """Seconds per site of the folded projection, or of product and expand, beyond those of the shrink."""
        try:
            return self._measure_fold(entry, inputs, outputs, tokens)
        except Exception as error:  # a shape that asks for more shared memory than there is, say
            sys.stderr.write(f"{entry}: {error}\n")
            return float("inf")

    def _measure_fold(self, entry: FoldEntry | None, inputs: int, outputs: int, tokens: int) -> float:
        size, count = self._dtype.itemsize, min(tokens, FOLD_ADAPTERS)
        per_site = count * RANK * (inputs + outputs) * size
        sites = [
            Site(number, inputs, (SiteSlice(f"m{number}", outputs),))
            for number in range(max(2, -(-COLD_BYTES // (inputs * outputs * size))))
        ]
        backend = make_backend(
            sites, dtype=self._dtype, device="cuda", budget_bytes=2 * per_site * len(sites), max_slots=count,
            max_tokens=max(tokens, 16), implementation="triton", fold=entry is not None,
            table=LaunchTable(folds=[] if entry is None else [entry]),
        )  # fmt: skip
        A = torch.randn(RANK, inputs, device="cuda", dtype=self._dtype) * inputs**-0.5
        B = torch.randn(outputs, RANK, device="cuda", dtype=self._dtype)
        slots = [
            load(backend, {site.slices[0].module: ModuleWeights(A, B, 1.0) for site in sites}) for _ in range(count)
        ]
        edges = [number * tokens // count for number in range(count + 1)]
        segments = [
            Segment(low, high, ((slot, 1.0),))
            for slot, (low, high) in zip(slots, itertools.pairwise(edges), strict=True)
        ]
        plan = backend.plan(segments, tokens)
        assert plan is not None
        x = torch.randn(tokens, inputs, device="cuda", dtype=self._dtype)
        weights = [torch.randn(outputs, inputs, device="cuda", dtype=self._dtype) for _ in sites]

        def whole() -> None:
            for site, weight in zip(sites, weights, strict=True):
                if entry is not None:
                    backend.project(site, x, weight, None, plan)
                    continue
                backend.add(site, x, F.linear(x, weight), plan)

        shrink = _replay_seconds(lambda: _run(backend, sites, x, None, plan))
        return (_replay_seconds(whole) - shrink) / len(sites)

    def fold_is_right(self, entry: FoldEntry) -> bool:
        """`is_right` for a folded projection, with records of both variants."""
        outs = (entry.out_features - entry.out_features // 4, entry.out_features // 4)
        runs = ((min(entry.tokens, 16), ((0, 1.0),)), (70, ((1, 0.5),)))
        case = Case("tune", entry.in_features, outs, ((16, 16), (40, 3)), runs)
        weights = case.weights(self._dtype)
        backend = make_backend(
            [case.site], dtype=self._dtype, device="cuda", budget_bytes=1 << 28, max_slots=2, max_tokens=256,
            implementation="triton", fold=True, table=LaunchTable(folds=[replace(entry, tokens=256)]),
        )  # fmt: skip
        slots = [load(backend, adapter) for adapter in weights]
        if not check_folded(backend, case, slots, weights) <= TOLERANCE[self._dtype]:
            return False
        codes = (
            compile_fold(
                self._dtype, entry.fold, entry.in_features, capability, partials=(8, 1), scaled=True, gates=True
            )
            for capability in CAPABILITIES
        )
        return not any(code.spills or not code.fits for code in codes)


def _both(entry: Entry) -> list[Entry]:
    """A valid table around one entry: the other variant is the default at the same block_k."""
    other = next(each for each in default_entries(_dtype(entry.dtype)) if each.variant != entry.variant)
    shrink = asdict(other.shrink) | {"block_k": entry.shrink.block_k}
    return [entry, Entry(entry.dtype, other.variant, entry.features, ShrinkConfig(**shrink), other.expand)]


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in DTYPES if dtype_name(dtype) == name)


def _run(
    backend: LoraBackend, sites: Iterable[Site], x: torch.Tensor, out: torch.Tensor | None, plan: LoraPlan
) -> None:
    for site in sites:
        backend.begin(site, x, plan)
        if out is not None:
            backend.finish(site, out, plan)


def _replay_seconds(work: Callable[[], None]) -> float:
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def write_table(path: Path, where: dict[str, Any], entries: Iterable[Entry], folds: Iterable[FoldEntry]) -> None:
    """Writes the table of a card that `report.environment` described, and reads it back as a check."""
    content = {
        "card": where["card"],
        "date": where["date"],
        "versions": {**where["packages"], "cuda": str(torch.version.cuda)},
        "entries": [asdict(entry) for entry in entries],
        "folds": [asdict(fold) for fold in folds],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    load_table(path)


def _shape(text: str) -> tuple[int, int]:
    """`4096x6144` as numbers. Raises ArgumentTypeError."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not INxOUT, such as 4096x6144")
    return int(parts[0]), int(parts[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 without a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--folds", type=_shape, nargs="*", default=FOLD_SHAPES, metavar="INxOUT", help="projections to try folding in"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=[dtype_name(dtype) for dtype in DTYPES])
    parser.add_argument("--folder", type=Path, default=TABLES, help="where the card's table is written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("tune.py measures on a CUDA card, and this machine has none\n")
        return 1
    entries: list[Entry] = []
    folds: list[FoldEntry] = []
    for dtype in map(_dtype, options.dtypes):
        card = Card(dtype)
        entries.extend(search(dtype, sorted(set(options.features)), card.time, card.is_right))
        folds.extend(search_folds(dtype, dict.fromkeys(options.folds), card.time_fold, card.fold_is_right))
    where = environment()
    path = options.folder / f"{card_slug(where['card'])}.json"
    write_table(path, where, entries, folds)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
