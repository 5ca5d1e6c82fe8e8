"""A step's metadata for the Triton kernels: built on the host, written into static device buffers.

    entries [n, 4] int32: slot, first column of h, weight (float32 bits), 0
    records [n, 8] int32: blocks, each a header (number of records, then zeros) and its records: first token, tokens,
                          then for the shrink (entry, rank block), for the expand (first entry, end of entries), row of
                          h, and zeros

The buffers are bounded by the backend's limits and never move, so a captured graph may refer to them.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .interface import Segment, Site
from .launch import (
    ENTRY_WIDTH,
    MIN_PADDED,
    PARTIAL_TOKENS,
    RECORD_WIDTH,
    SHORT_TOKENS,
    VARIANTS,
    Launch,
    Tile,
    VariantName,
)
from .slots import BackendPlan, Sets

Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TouchedSites:
    """Sets of sites, bit i for site i: where there is a term, whose output may be scaled, and whose input may be."""

    term: int = 0
    out_scaled: int = 0
    in_scaled: int = 0

    def __or__(self, other: "TouchedSites") -> "TouchedSites":
        return TouchedSites(
            self.term | other.term, self.out_scaled | other.out_scaled, self.in_scaled | other.in_scaled
        )

    @property
    def scaled(self) -> bool:
        """Whether there is any scale vector."""
        return bool(self.out_scaled | self.in_scaled)


def site_bits(sites: Iterable[int]) -> int:
    """The set of these site indices."""
    bits = 0
    for index in sites:
        bits |= 1 << index
    return bits


class TritonLoraPlan(BackendPlan):
    """The launches of a step. Its metadata lies in the backend's static buffers until the next plan is written."""

    def __init__(
        self, num_tokens: int, sets: Sets, launches: Sequence[Launch], sites: TouchedSites, graph_key: Hashable | None
    ) -> None:
        super().__init__(num_tokens, sets, graph_key)
        self.launches = tuple(launches)
        self.sites = sites

    def touches(self, site: Site) -> bool:
        """Whether kernels are launched at the site's output."""
        return bool(self.sites.term >> site.index & 1)

    def scales_output(self, site: Site) -> bool:
        """Whether some adapter may scale the site's output."""
        return bool(self.sites.out_scaled >> site.index & 1)

    def scales_input(self, site: Site) -> bool:
        """Whether a kernel is launched at the site's input."""
        return bool(self.sites.in_scaled >> site.index & 1)


@dataclass(frozen=True, slots=True)
class _Columns:
    """A step's segments as int32 arrays: [n] first token and tokens, [n + 1] where the entries of each begin.

    `ranks` is by entry; `entries` [m, 4] are as in the buffer.
    """

    starts: Array
    lengths: Array
    bounds: Array
    ranks: Array
    entries: Array

    @staticmethod
    def of(segments: Sequence[Segment], rank_of: Callable[[int], int]) -> "_Columns":
        """The columns of segments in this order."""
        adapters = [adapter for segment in segments for adapter in segment.adapters]
        limits = np.array([(segment.start, segment.end) for segment in segments], dtype=np.int32).reshape(-1, 2)
        bounds = _bounds(np.array([len(segment.adapters) for segment in segments], dtype=np.int32))
        ranks = np.array([rank_of(slot) for slot, _ in adapters], dtype=np.int32)
        entries = np.zeros((len(adapters), ENTRY_WIDTH), dtype=np.int32)
        if adapters:
            before = _bounds(ranks)
            entries[:, 0] = [slot for slot, _ in adapters]
            entries[:, 1] = before[:-1] - before[bounds[:-1]].repeat(np.diff(bounds))
            entries[:, 2] = np.array([weight for _, weight in adapters], dtype=np.float32).view(np.int32)
        return _Columns(limits[:, 0], limits[:, 1] - limits[:, 0], bounds, ranks, entries)

    def records(self, rows: Array, block_m: Array, block_r: Array) -> tuple[Array, Array, Array, Array]:
        """(shrink records, expand records, the segment of each of both), without headers.

        All [n], by segment: the first row of h, and the tile.
        """
        counts = -(-self.lengths // block_m)
        owners = np.arange(len(counts), dtype=np.int32).repeat(counts)
        first = _within(counts) * block_m[owners]
        expand = np.zeros((len(owners), RECORD_WIDTH), dtype=np.int32)
        expand[:, 0] = self.starts[owners] + first
        expand[:, 1] = np.minimum(block_m[owners], self.lengths[owners] - first)
        expand[:, 2] = self.bounds[owners]
        expand[:, 3] = self.bounds[owners + 1]
        expand[:, 4] = rows[owners] + first

        blocks = -(-self.ranks // block_r.repeat(np.diff(self.bounds)))  # by entry
        before = _bounds(blocks)
        of_tile = before[expand[:, 3]] - before[expand[:, 2]]
        shrink = expand.repeat(of_tile, axis=0)
        block = before[expand[:, 2]].repeat(of_tile) + _within(of_tile)
        shrink[:, 2] = np.arange(len(blocks), dtype=np.int32).repeat(blocks)[block]
        shrink[:, 3] = _within(blocks)[block]
        return shrink, expand, owners.repeat(of_tile), owners


def _bounds(counts: Array) -> Array:
    """[0, counts[0], counts[0] + counts[1], ...]."""
    bounds = np.zeros(len(counts) + 1, dtype=np.int32)
    counts.cumsum(out=bounds[1:])
    return bounds


def _within(counts: Array) -> Array:
    """0 .. counts[0] - 1, then 0 .. counts[1] - 1, ..."""
    bounds = _bounds(counts)
    return np.arange(bounds[-1], dtype=np.int32) - bounds[:-1].repeat(counts)


def build(
    segments: Sequence[Segment], rank_of: Callable[[int], int], tiles: Mapping[VariantName, Tile], partial_rows: int
) -> tuple[list[Launch], Array, Array]:
    """(launches, entries, records) of a step: as many programs as there are records.

    A segment's variant follows from its length alone. A variant's shrink leaves partial sums while their rows last
    (`partial_rows`), which changes neither the order of summation nor the result.
    """
    chosen = {variant: [s for s in segments if (s.end - s.start <= SHORT_TOKENS) == (variant == "decode")]
              for variant in VARIANTS}  # fmt: skip
    columns = _Columns.of([s for variant in VARIANTS for s in chosen[variant]], rank_of)
    rows, block_m, block_r = (np.zeros_like(columns.starts) for _ in range(3))
    ends: list[int] = []
    partials: dict[VariantName, bool] = {}
    used = {True: 0, False: 0}
    start = 0
    for variant in VARIANTS:
        own = slice(start, start + len(chosen[variant]))
        tokens = int(columns.lengths[own].sum())
        fits = partials[variant] = used[True] + tokens <= partial_rows
        rows[own] = used[fits] + _bounds(columns.lengths[own])[:-1]
        block_m[own], block_r[own] = tiles[variant].block_m, tiles[variant].block_r
        used[fits] += tokens
        ends.append(start := own.stop)
    shrink, expand, shrink_owners, expand_owners = columns.records(rows, block_m, block_r)
    shrink_ends = shrink_owners.searchsorted(ends).tolist()
    expand_ends = expand_owners.searchsorted(ends).tolist()
    records = np.zeros((len(shrink) + len(expand) + 2 * len(VARIANTS), RECORD_WIDTH), dtype=np.int32)
    launches: list[Launch] = []
    place = 0
    for variant, shrinks, expands in zip(
        VARIANTS, itertools.pairwise([0, *shrink_ends]), itertools.pairwise([0, *expand_ends]), strict=True
    ):
        if not chosen[variant]:
            continue
        programs = []
        for found, (low, high) in ((shrink, shrinks), (expand, expands)):
            records[place, 0] = high - low
            records[place + 1 : place + 1 + high - low] = found[low:high]
            programs.append((place, high - low))
            place += 1 + high - low
        launches.append(Launch(variant, partials[variant], False, programs[0], programs[1]))
    return launches, columns.entries, records[:place]


def build_padded(
    segments: Sequence[Segment], num_tokens: int, rank_of: Callable[[int], int], tile: Tile
) -> tuple[list[Launch], Array, Array]:
    """(launches, entries, records) of a step whose launches follow from `num_tokens` alone; segments may be none.

    All segments use the decode variant, whatever their length, and leave partial sums. The expand's block has room for
    a record per token; the shrink's block lies behind it. A program without a record reads one number and exits; one
    that has several takes them one after the other. So one grid serves any ranks and sets, and the price is bounded by
    `PADDED_PROGRAMS` idle programs per launch.
    """
    columns = _Columns.of(segments, rank_of)
    same = np.ones_like(columns.starts)
    rows = _bounds(columns.lengths)[:-1]
    shrink, expand, _, _ = columns.records(rows, same * tile.block_m, same * tile.block_r)
    records = np.zeros((num_tokens + 2 + len(shrink), RECORD_WIDTH), dtype=np.int32)
    records[0, 0], records[num_tokens + 1, 0] = len(expand), len(shrink)
    records[1 : 1 + len(expand)] = expand
    records[num_tokens + 2 :] = shrink
    programs = (num_tokens + 1, max(num_tokens, MIN_PADDED)), (0, num_tokens)
    return [Launch("decode", True, True, *programs)], columns.entries, records


def max_records(max_tokens: int, max_set_size: int, max_set_rank: int) -> int:
    """The most rows of any step: two headers per variant, and a tile per token, each with an expand and the rank
    blocks of a full set."""
    smallest_block = 16
    return 2 * len(VARIANTS) + max_tokens * (1 + max_set_size + max_set_rank // smallest_block)


def partial_rows(max_tokens: int) -> int:
    """Rows of h that may be kept as partial sums."""
    return min(max_tokens, PARTIAL_TOKENS)


def scratch(
    rows: int, splits_times_slices: int, slices: int, partial: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(h of whole sums [rows, slices, width], h of partial sums), flat float32."""
    with torch.inference_mode(False):
        whole = torch.empty(rows * slices * width, dtype=torch.float32, device=device)
        parts = torch.empty(partial * splits_times_slices * width, dtype=torch.float32, device=device)
    return whole, parts
