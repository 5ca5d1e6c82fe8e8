"""`TritonLoraBackend`: the segmented LoRA term as Triton kernels over one device arena.

Per site and variant of the step: one shrink launch (`shrink.py`) and one expand launch (`expand.py`). Decode segments
and prefill segments of the same step are launched apart, each at its own tile shape. The accumulation order of a
token's result follows from in_features, its set and its segment's length, never from other segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .arena import ALIGNMENT_BYTES, Arena, Block
from .expand import expand_kernel
from .interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, Segment, Site
from .launch import ENTRY_WIDTH, RECORD_WIDTH, Launch, largest_power_of_two, split_columns, variants
from .modules import ModuleIndex, SetLimits, check_segments, check_set
from .shrink import shrink_kernel
from .triton_plan import StaticBuffer, TritonLoraPlan, build, max_records, partial_rows, scratch


@dataclass(slots=True)
class _Adapter:
    """A slot's blocks by module number, and the state of its copy."""

    blocks: dict[int, Block]
    ranks: dict[str, int]
    scales: dict[int, float] = field(default_factory=dict)
    sites: frozenset[int] = frozenset()
    reserved: "torch.cuda.Event | None" = None
    copied: "torch.cuda.Event | None" = None
    sources: Mapping[str, ModuleWeights] | None = None
    filled: bool = False
    published: bool = False

    @property
    def rank(self) -> int:
        return max(self.ranks.values())


def _ended(event: "torch.cuda.Event | None") -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]


class _LaneState:
    """The static metadata buffers of one lane, and the plan that lies in them."""

    def __init__(self, limits: SetLimits, device: torch.device) -> None:
        rows = max_records(limits.max_tokens, limits.max_set_size, limits.max_set_rank)
        self.records = StaticBuffer(rows, RECORD_WIDTH, device)
        self.entries = StaticBuffer(limits.max_tokens * limits.max_set_size, ENTRY_WIDTH, device)
        self.key: tuple[tuple[Segment, ...], int] | None = None
        self.plan: TritonLoraPlan | None = None


@dataclass(frozen=True, slots=True)
class _SiteLayout:
    """Constants of a site: its first module number, its splits, and its output tiles per variant."""

    first_module: int
    split_columns: int
    splits: int
    even_columns: bool
    out_align: int
    tiles: dict[str, Tensor]


class TritonLoraBackend:
    """The LoRA operations as Triton kernels; the contract is `interface.LoraBackend`.

    A plan's metadata lives in static buffers, a set of them per lane: a plan is valid until `plan` makes another one
    of its lane, and `add` refuses an outdated one. `fill` copies on a stream of its own; hold the weights in pinned
    memory for copies that overlap.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        max_slots: int,
        limits: SetLimits,
    ) -> None:
        """Raises ValueError for a dtype or device the kernels do not serve."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {dtype} is not served; use float32, bfloat16 or float16")
        self.sites = tuple(sites)
        self.dtype = dtype
        self.device = device
        self._cuda = device.type == "cuda"
        if not self._cuda and isinstance(shrink_kernel, JITFunction):
            raise ValueError(f"Triton kernels do not run on {device}; use the torch implementation")
        self._limits = limits
        self._index = ModuleIndex(self.sites)
        self._variants = variants(dtype)
        self._layouts = [self._layout(site) for site in self.sites]
        shapes = [(site.in_features, part.out_features) for site in self.sites for part in site.slices]
        self._num_modules = len(shapes)
        self.arena = Arena(shapes, dtype=dtype, device=device, budget_bytes=budget_bytes, slots=max_slots)
        self._adapters: list[_Adapter | None] = [None] * max_slots
        self._lanes: dict[Lane, _LaneState] = {"tokens": _LaneState(limits, device), "rows": _LaneState(limits, device)}
        self._partial_rows = partial_rows(limits.max_tokens)
        self._whole, self._parts = scratch(
            limits.max_tokens,
            max(layout.splits * len(site.slices) for layout, site in zip(self._layouts, self.sites, strict=True)),
            max(len(site.slices) for site in self.sites),
            self._partial_rows,
            limits.max_set_rank,
            device,
        )
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def _layout(self, site: Site) -> _SiteLayout:
        block_k = self._variants.decode.shrink.block_k
        columns, splits = split_columns(site.in_features, block_k)
        widths = [part.out_features for part in site.slices]
        tiles: dict[str, Tensor] = {}
        for variant in (self._variants.decode, self._variants.prefill):
            rows: list[tuple[int, int, int, int]] = []
            for part, width in enumerate(widths):
                column = sum(widths[:part])
                rows.extend((part, first, width, column) for first in range(0, width, variant.expand.block_n))
            with torch.inference_mode(False):
                tiles[variant.name] = torch.tensor(rows, dtype=torch.int32, device=self.device)
        return _SiteLayout(
            sum(len(before.slices) for before in self.sites[: site.index]),
            columns,
            splits,
            site.in_features % block_k == 0,
            largest_power_of_two(ALIGNMENT_BYTES // self.dtype.itemsize, *widths),
            tiles,
        )

    def _numbers(self, ranks: Mapping[str, int]) -> dict[int, int]:
        """{module number: rank} in ascending order."""
        numbers: dict[int, int] = {}
        for site, places in self._index.by_site(ranks).items():
            for part, module in places:
                numbers[self._layouts[site].first_module + part] = ranks[module]
        return numbers

    def bytes_needed(self, ranks: Mapping[str, int]) -> int:
        """rank * (in + out) elements per module in the backend's dtype, each matrix rounded up to 16 bytes."""
        return self.arena.bytes_needed(self._numbers(ranks))

    @property
    def bytes_used(self) -> int:
        """Bytes of all reserved slots."""
        return self.arena.bytes_used

    @property
    def bytes_total(self) -> int:
        """The budget in bytes."""
        return self.arena.bytes_total

    def reserve(self, ranks: Mapping[str, int]) -> int:
        """A new slot. Raises `ArenaFullError` (free 0 when slots, not bytes, have run out), KeyError, ValueError."""
        self._index.check_ranks(ranks)
        numbers = self._numbers(ranks)
        needed = self.arena.bytes_needed(numbers)
        slot = next((number for number, adapter in enumerate(self._adapters) if adapter is None), None)
        if slot is None:
            raise ArenaFullError(needed, 0)
        blocks = self.arena.allocate(numbers)
        if blocks is None:
            raise ArenaFullError(needed, self.arena.free_for(needed))
        adapter = _Adapter(blocks, dict(ranks), sites=frozenset(self._index.by_site(ranks)))
        if self._stream is not None:
            adapter.reserved = torch.cuda.Event()  # type: ignore[no-untyped-call]
            adapter.reserved.record(torch.cuda.current_stream(self.device))
        self._adapters[slot] = adapter
        return slot

    def _adapter(self, slot: int) -> _Adapter:
        adapter = self._adapters[slot] if 0 <= slot < len(self._adapters) else None
        if adapter is None:
            raise ValueError(f"slot {slot} is not reserved")
        return adapter

    def fill(self, slot: int, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies the weights into the arena. Raises ValueError when they are not what was reserved.

        On a card the copies run on the backend's copy stream, after the kernels that were launched before `reserve`
        (they may still read what lay there); the weights are kept alive until the copies have ended.
        """
        adapter = self._adapter(slot)
        self._index.check_weights(adapter.ranks, modules)
        if self._stream is None:
            self._copy(adapter, modules)
        else:
            assert adapter.reserved is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(adapter.reserved)
                self._copy(adapter, modules)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
            adapter.sources, adapter.copied = modules, copied
        adapter.filled = True

    def _copy(self, adapter: _Adapter, modules: Mapping[str, ModuleWeights]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for module, weights in modules.items():
                site, part = self._index.place(module)
                number = self._layouts[site].first_module + part
                A, B = self.arena.views(number, adapter.blocks[number])
                A.copy_(weights.A, non_blocking=True)
                # Transposed on the device: a strided copy from the host would go through a pageable one.
                B.copy_(weights.B.to(self.device, non_blocking=True).T)
                adapter.scales[number] = float(weights.scale)

    def filled(self, slot: int) -> bool:
        """Whether the copies of `fill` have ended; never blocks."""
        adapter = self._adapter(slot)
        if adapter.filled and _ended(adapter.copied):
            adapter.sources = None
            return True
        return False

    def publish(self, slot: int) -> None:
        """Makes the slot usable by plans; kernels launched from now on wait for its copies on the device.

        Raises ValueError before `fill` has returned.
        """
        adapter = self._adapter(slot)
        if not adapter.filled:
            raise ValueError(f"slot {slot} is not filled")
        if adapter.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(adapter.copied)
        self.arena.publish(slot, adapter.blocks, adapter.scales)
        adapter.published = True

    def release(self, slot: int) -> None:
        """Gives the slot's blocks back to the arena."""
        adapter = self._adapter(slot)
        if adapter.copied is not None and not _ended(adapter.copied):
            adapter.copied.synchronize()  # released while loading: the blocks must not be written after they are free
        self.arena.release(adapter.blocks)
        self._adapters[slot] = None
        for lane in self._lanes.values():
            lane.key = lane.plan = None

    def _published_rank(self, slot: int) -> int:
        adapter = self._adapter(slot)
        if not adapter.published:
            raise ValueError(f"slot {slot} is not published")
        return adapter.rank

    def check_set(self, slots: Sequence[int]) -> None:
        """Raises ValueError naming the bound that one set of these published slots would pass."""
        check_set(slots, self._limits, self._published_rank)

    def order(self, slot: int) -> tuple[int, ...]:
        """By slot: any order will do, as long as the same adapter's tokens are neighbours."""
        return (slot,)

    def plan(self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens") -> TritonLoraPlan | None:
        """The step's plan, or None without segments; the same arguments as last time give the same plan.

        Raises ValueError for malformed segments, unpublished slots and passed bounds.
        """
        if not segments:
            return None
        key = (tuple(segments), num_tokens)
        state = self._lanes[lane]
        if key == state.key and state.plan is not None:
            return state.plan
        check_segments(segments, num_tokens, self._limits, self._published_rank)
        launches, entries, records = build(segments, self._published_rank, self._variants, self._partial_rows)
        state.entries.write(entries)
        state.records.write(records)
        slots = {slot for segment in segments for slot, _ in segment.adapters}
        sites = frozenset().union(*(self._adapter(slot).sites for slot in slots))
        state.key, state.plan = key, TritonLoraPlan(num_tokens, launches, sites)
        return state.plan

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan) -> None:
        """out[t] += the LoRA term, in place; x [tokens, in] and out [tokens, sum of outs] with unit stride.

        Raises ValueError for a plan that is not the latest.
        """
        state = next((lane for lane in self._lanes.values() if lane.plan is plan), None)
        if state is None or state.plan is None:
            raise ValueError("the plan is outdated: its metadata was overwritten by a later one")
        if not state.plan.touches(site):
            return
        for launch in state.plan.launches:
            self._shrink(site, x, launch, state)
        for launch in state.plan.launches:
            self._expand(site, out, launch, state)

    def _h(self, site: Site, launch: Launch) -> tuple[Tensor, int, int, int]:
        """(scratch, split stride, row stride, slice stride) of h."""
        width = self._limits.max_set_rank
        row = len(site.slices) * width
        return (self._parts, self._partial_rows * row, row, width) if launch.partials else (self._whole, 0, row, width)

    def _shrink(self, site: Site, x: Tensor, launch: Launch, lane: _LaneState) -> None:
        layout, config = self._layouts[site.index], launch.variant.shrink
        h, split_stride, row_stride, slice_stride = self._h(site, launch)
        first, end = launch.shrink
        shrink_kernel[(end - first, layout.splits if launch.partials else 1, len(site.slices))](
            x,
            self.arena.memory,
            self.arena.offsets,
            self.arena.ranks,
            lane.records.tensor[first:],
            lane.entries.tensor,
            h,
            site.in_features,
            x.stride(0),
            layout.first_module,
            self._num_modules,
            split_stride,
            row_stride,
            slice_stride,
            SPLIT_K=layout.split_columns,
            NUM_SPLITS=layout.splits,
            PARTIALS=launch.partials,
            EVEN_K=layout.even_columns,
            ALIGN=ALIGNMENT_BYTES // self.dtype.itemsize,
            BLOCK_M=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def _expand(self, site: Site, out: Tensor, launch: Launch, lane: _LaneState) -> None:
        layout, config = self._layouts[site.index], launch.variant.expand
        h, split_stride, row_stride, slice_stride = self._h(site, launch)
        tiles = layout.tiles[launch.variant.name]
        first, end = launch.expand
        expand_kernel[(end - first, len(tiles))](
            out,
            self.arena.memory,
            self.arena.offsets,
            self.arena.ranks,
            self.arena.scales,
            lane.records.tensor[first:],
            lane.entries.tensor,
            tiles,
            h,
            out.stride(0),
            layout.first_module,
            self._num_modules,
            split_stride,
            row_stride,
            slice_stride,
            NUM_PARTIALS=layout.splits if launch.partials else 1,
            ALIGN=ALIGNMENT_BYTES // self.dtype.itemsize,
            OUT_ALIGN=layout.out_align,
            BLOCK_M=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
