"""A step's metadata for the Triton kernels: built on the host, written into static device buffers.

    entries [n, 4] int32: slot, first column of h, weight (float32 bits), 0
    records [n, 8] int32: blocks, each a header (number of records, then zeros) and its records: first token, tokens,
                          then for the shrink (entry, rank block), for the expand (first entry, end of entries), row of
                          h, and zeros

The buffers are bounded by the backend's limits and never move, so a captured graph may refer to them.
"""

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


def _entries(segments: Sequence[Segment], rank_of: Callable[[int], int]) -> tuple[Array, Array, Array]:
    """(entries [n, 4], the rank of each, and [segments + 1]: where each segment's entries begin)."""
    slots = [slot for segment in segments for slot, _ in segment.adapters]
    weights = [weight for segment in segments for _, weight in segment.adapters]
    bounds = _bounds([len(segment.adapters) for segment in segments])
    ranks = np.array([rank_of(slot) for slot in slots], dtype=np.int32)
    before = _bounds(ranks)
    entries = np.zeros((len(slots), ENTRY_WIDTH), dtype=np.int32)
    entries[:, 0] = slots
    entries[:, 1] = before[:-1] - np.repeat(before[bounds[:-1]], np.diff(bounds))
    entries[:, 2] = np.array(weights, dtype=np.float32).view(np.int32)
    return entries, ranks, bounds


def _bounds(counts: npt.ArrayLike) -> Array:
    """[0, counts[0], counts[0] + counts[1], ...]."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int32))).astype(np.int32)


def _within(counts: Array) -> Array:
    """0 .. counts[0] - 1, then 0 .. counts[1] - 1, ..."""
    bounds = _bounds(counts)
    return np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], counts)


def _records(
    segments: Sequence[Segment], ranks: Array, bounds: Array, tile: Tile, row: int
) -> tuple[Array, Array]:  # fmt: skip
    """(shrink records, expand records) of one variant, without headers.

    `bounds` says where the entries of each of these segments begin, `ranks` is by entry; rows of h are handed out from
    `row`.
    """
    starts = np.array([segment.start for segment in segments], dtype=np.int32)
    lengths = np.array([segment.end for segment in segments], dtype=np.int32) - starts
    counts = -(-lengths // tile.block_m)
    owners = np.repeat(np.arange(len(segments), dtype=np.int32), counts)
    first = _within(counts) * tile.block_m
    expand = np.zeros((len(owners), RECORD_WIDTH), dtype=np.int32)
    expand[:, 0] = starts[owners] + first
    expand[:, 1] = np.minimum(tile.block_m, lengths[owners] - first)
    expand[:, 2] = bounds[owners]
    expand[:, 3] = bounds[owners + 1]
    expand[:, 4] = row + _bounds(lengths)[owners] + first

    blocks = -(-ranks // tile.block_r)  # by entry
    blocks_before = _bounds(blocks)
    of_tile = blocks_before[expand[:, 3]] - blocks_before[expand[:, 2]]
    shrink = np.repeat(expand, of_tile, axis=0)
    block = np.repeat(blocks_before[expand[:, 2]], of_tile) + _within(of_tile)
    shrink[:, 2] = np.repeat(np.arange(len(ranks), dtype=np.int32), blocks)[block]
    shrink[:, 3] = _within(blocks)[block]
    return shrink, expand


def _header(count: int) -> Array:
    return np.array([[count, *(0,) * (RECORD_WIDTH - 1)]], dtype=np.int32)


def build(
    segments: Sequence[Segment], rank_of: Callable[[int], int], tiles: Mapping[VariantName, Tile], partial_rows: int
) -> tuple[list[Launch], Array, Array]:
    """(launches, entries, records) of a step: as many programs as there are records.

    A segment's variant follows from its length alone. A variant's shrink leaves partial sums while their rows last
    (`partial_rows`), which changes neither the order of summation nor the result.
    """
    chosen = {variant: [s for s in segments if (s.end - s.start <= SHORT_TOKENS) == (variant == "decode")]
              for variant in VARIANTS}  # fmt: skip
    entries, ranks, bounds = _entries([s for variant in VARIANTS for s in chosen[variant]], rank_of)
    records: list[Array] = [np.zeros((0, RECORD_WIDTH), dtype=np.int32)]
    launches: list[Launch] = []
    used = {True: 0, False: 0}
    start = segment = 0
    for variant in VARIANTS:
        if not chosen[variant]:
            continue
        own = bounds[segment : segment + len(chosen[variant]) + 1]
        segment += len(chosen[variant])
        tokens = sum(s.end - s.start for s in chosen[variant])
        partials = used[True] + tokens <= partial_rows
        shrink, expand = _records(chosen[variant], ranks, own, tiles[variant], used[partials])
        used[partials] += tokens
        records.extend((_header(len(shrink)), shrink, _header(len(expand)), expand))
        programs = (start, len(shrink)), (start + 1 + len(shrink), len(expand))
        launches.append(Launch(variant, partials, False, *programs))
        start += 2 + len(shrink) + len(expand)
    return launches, entries, np.concatenate(records)


def build_padded(
    segments: Sequence[Segment], num_tokens: int, rank_of: Callable[[int], int], tile: Tile
) -> tuple[list[Launch], Array, Array]:
    """(launches, entries, records) of a step whose launches follow from `num_tokens` alone; segments may be none.

    All segments use the decode variant, whatever their length, and leave partial sums. The expand's block has room for
    a record per token; the shrink's block lies behind it. A program without a record reads one number and exits; one
    that has several takes them one after the other. So one grid serves any ranks and sets, and the price is bounded by
    `PADDED_PROGRAMS` idle programs per launch.
    """
    entries, ranks, bounds = _entries(segments, rank_of)
    shrink, expand = _records(segments, ranks, bounds, tile, 0)
    records = np.zeros((num_tokens + 2 + len(shrink), RECORD_WIDTH), dtype=np.int32)
    records[0, 0], records[num_tokens + 1, 0] = len(expand), len(shrink)
    records[1 : 1 + len(expand)] = expand
    records[num_tokens + 2 :] = shrink
    programs = (num_tokens + 1, max(num_tokens, MIN_PADDED)), (0, num_tokens)
    return [Launch("decode", True, True, *programs)], entries, records


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
