"""A step's metadata for the Triton kernels: built on the host, written into static device buffers.

    entries [n, 4] int32: slot, first column of h, weight (float32 bits), 0
    records [n, 8] int32: first token, tokens, then for the shrink (entry, rank block), for the expand (first entry,
                          end of entries), row of h, and zeros

The buffers are bounded by the backend's limits and never move, so a captured graph may refer to them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .interface import Segment, Site
from .launch import ENTRY_WIDTH, PARTIAL_TOKENS, RECORD_WIDTH, SHORT_TOKENS, Launch, Variant, Variants


class StaticBuffer:
    """An int32 device tensor of fixed address and two pinned host buffers that take turns in filling it."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self.tensor = torch.zeros(rows, width, dtype=torch.int32, device=device)
            self._hosts = [torch.zeros(rows, width, dtype=torch.int32, pin_memory=self._cuda) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def write(self, values: np.ndarray) -> None:
        """Copies [n, width] values to the front of the tensor, on the current stream, without waiting for the device.

        Raises ValueError for more rows than there are.
        """
        if len(values) > len(self.tensor):
            raise ValueError(f"{len(values)} rows of step metadata exceed {len(self.tensor)}")
        self._turn ^= 1
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()  # the copy of two plans ago, long done
        host = self._hosts[self._turn]
        host[: len(values)].numpy()[:] = values
        self.tensor[: len(values)].copy_(host[: len(values)], non_blocking=True)
        if self._cuda:
            event = self._events[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()


class TritonLoraPlan:
    """The launches of a step. Its metadata lies in the backend's static buffers until the next plan is written."""

    def __init__(self, num_tokens: int, launches: Sequence[Launch], sites: frozenset[int]) -> None:
        self.num_tokens = num_tokens
        self.launches = tuple(launches)
        self.sites = sites

    def touches(self, site: Site) -> bool:
        """Whether any adapter of the plan has weights at the site."""
        return site.index in self.sites


def build(
    segments: Sequence[Segment], rank_of: Callable[[int], int], choices: Variants, partial_rows: int
) -> tuple[list[Launch], np.ndarray, np.ndarray]:
    """(launches, entries, records) of a step.

    A segment's variant follows from its length alone. A variant's shrink leaves partial sums while their rows last
    (`partial_rows`), which changes neither the order of summation nor the result.
    """
    entries: list[tuple[int, int, int, int]] = []
    records: list[tuple[int, ...]] = []
    launches: list[Launch] = []
    used = {True: 0, False: 0}
    for variant, chosen in (
        (choices.decode, [s for s in segments if s.end - s.start <= SHORT_TOKENS]),
        (choices.prefill, [s for s in segments if s.end - s.start > SHORT_TOKENS]),
    ):
        if not chosen:
            continue
        tokens = sum(segment.end - segment.start for segment in chosen)
        partials = used[True] + tokens <= partial_rows
        shrink, expand = _tiles(chosen, rank_of, variant, entries, used[partials])
        used[partials] += tokens
        start, middle = len(records), len(records) + len(shrink)
        records.extend(shrink)
        records.extend(expand)
        launches.append(Launch(variant, partials, (start, middle), (middle, len(records))))
    return (
        launches,
        np.array(entries, dtype=np.int32).reshape(-1, ENTRY_WIDTH),
        np.array(records, dtype=np.int32).reshape(-1, RECORD_WIDTH),
    )


def _tiles(
    segments: Sequence[Segment],
    rank_of: Callable[[int], int],
    variant: Variant,
    entries: list[tuple[int, int, int, int]],
    row: int,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(shrink records, expand records) of one variant; appends to `entries`; rows of h are handed out from `row`."""
    shrink: list[tuple[int, ...]] = []
    expand: list[tuple[int, ...]] = []
    for segment in segments:
        first, column = len(entries), 0
        blocks: list[tuple[int, int]] = []
        for slot, weight in segment.adapters:
            rank = rank_of(slot)
            blocks.extend((len(entries), block) for block in range(-(-rank // variant.shrink.block_r)))
            entries.append((slot, column, int(np.float32(weight).view(np.int32)), 0))
            column += rank
        for token in range(segment.start, segment.end, variant.shrink.block_m):
            count = min(variant.shrink.block_m, segment.end - token)
            shrink.extend((token, count, entry, block, row + token - segment.start, 0, 0, 0) for entry, block in blocks)
            expand.append((token, count, first, len(entries), row + token - segment.start, 0, 0, 0))
        row += segment.end - segment.start
    return shrink, expand


def max_records(max_tokens: int, max_set_size: int, max_set_rank: int) -> int:
    """The most records of any step: a tile per token, each with an expand and the rank blocks of a full set."""
    smallest_block = 16
    return max_tokens * (1 + max_set_size + max_set_rank // smallest_block)


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
