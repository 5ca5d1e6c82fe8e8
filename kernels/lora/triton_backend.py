"""`TritonLoraBackend`: the segmented LoRA term as Triton kernels over one device arena.

Per site and variant of the step: one shrink launch (`shrink.py`) and one expand launch (`expand.py`). Decode segments
and prefill segments of the same step are launched apart, each at its own tile shape. Where the expand is folded into
the base product, that takes the place of all expands (`fold_launch.py`). The accumulation order of a
token's result follows from in_features, its set and its segment's length, never from other segments.
"""

import functools
import operator
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from loramux.kernels.buffers import StaticBuffer

from .arena import ALIGNMENT_BYTES, Arena, Block
from .expand import expand_kernel
from .fold_launch import Folding, Shrunk, Terms, output_tiles
from .interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, Overlap, ScaleName, Site
from .launch import (
    ENTRY_WIDTH,
    MOST_REGISTERS,
    RECORD_WIDTH,
    SCALE_ELEMENTS,
    VARIANTS,
    Launch,
    VariantName,
    largest_power_of_two,
    padded_programs,
    split_columns,
)
from .modules import SetLimits
from .scale import scale_kernel
from .shrink import shrink_kernel
from .slots import Adapter, PlanKey, Sets, SlotBackend, check_gates
from .table import DTYPES, LaunchTable
from .triton_plan import (
    TouchedSites,
    TritonLoraPlan,
    build,
    build_padded,
    max_records,
    partial_rows,
    scratch,
    site_bits,
)


@dataclass(slots=True, kw_only=True)
class _Adapter(Adapter):
    """A slot's blocks by module number, the sites they are of, and the state of its copy."""

    blocks: dict[int, Block]
    sites: TouchedSites
    module_scales: dict[int, float] = field(default_factory=dict)
    reserved: "torch.cuda.Event | None" = None
    copied: "torch.cuda.Event | None" = None
    sources: Mapping[str, ModuleWeights] | None = None


def _ended(event: "torch.cuda.Event | None") -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]


class _LaneState:
    """The static metadata buffers of one lane, the plan in them, and its launches' (shrink, expand) records."""

    def __init__(self, limits: SetLimits, device: torch.device) -> None:
        rows = max_records(limits.max_tokens, limits.max_set_size, limits.max_set_rank)
        self.records = StaticBuffer(rows, RECORD_WIDTH, device)
        self.entries = StaticBuffer(limits.max_tokens * limits.max_set_size, ENTRY_WIDTH, device)
        self.views: list[tuple[Tensor, Tensor]] = []
        self.key: PlanKey | None = None
        self.plan: TritonLoraPlan | None = None


@dataclass(frozen=True, slots=True)
class _SiteLayout:
    """Constants of a site: its first module number, its splits, and by variant the kernels' constants and the tiles."""

    first_module: int
    splits: int
    shrink: dict[VariantName, dict[str, Any]]
    expand: dict[VariantName, dict[str, Any]]
    tiles: dict[VariantName, Tensor]


class TritonLoraBackend(SlotBackend[_Adapter, TritonLoraPlan]):
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
        table: LaunchTable,
        overlap: Overlap = "none",
        fold: bool | None = None,
    ) -> None:
        """`fold` is `Folding`'s. Raises ValueError for a dtype, device or overlap that the kernels do not serve."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not served; use float32, bfloat16 or float16")
        cuda = device.type == "cuda"
        if not cuda and isinstance(shrink_kernel, JITFunction):
            raise ValueError(f"Triton kernels do not run on {device}; use the torch implementation")
        _check_overlap(overlap, device)
        super().__init__(sites, dtype=dtype, device=device, max_slots=max_slots, limits=limits)
        self._choices = table.choose(dtype)
        self._tiles = {variant: self._choices.tile(variant) for variant in VARIANTS}
        self._dependent = overlap == "launch"
        self._layouts = [self._layout(site) for site in self.sites]
        shapes = [(site.in_features, part.out_features) for site in self.sites for part in site.slices]
        self._num_modules = len(shapes)
        self.arena = Arena(shapes, dtype=dtype, device=device, budget_bytes=budget_bytes, slots=max_slots)
        self._folding = Folding(self.sites, self.arena, self._choices, fold=fold, dependent=self._dependent)
        self._lanes: dict[Lane, _LaneState] = {"tokens": _LaneState(limits, device), "rows": _LaneState(limits, device)}
        self._everywhere = {
            (lane, scaled): _all_sites(self.sites, lane, scaled=scaled)
            for lane in self._lanes
            for scaled in (False, True)
        }
        self._partial_rows = partial_rows(limits.max_tokens)
        self._whole, self._parts = scratch(
            limits.max_tokens,
            max(layout.splits * len(site.slices) for layout, site in zip(self._layouts, self.sites, strict=True)),
            max(len(site.slices) for site in self.sites),
            self._partial_rows,
            limits.max_set_rank,
            device,
        )
        self._fill_stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(device) if overlap == "stream" else None  # type: ignore[no-untyped-call]

    def _layout(self, site: Site) -> _SiteLayout:
        align = ALIGNMENT_BYTES // self.dtype.itemsize
        widths = [part.out_features for part in site.slices]
        columns, splits = split_columns(site.in_features, self._choices.shrink("decode", site.in_features).block_k)
        shrink: dict[VariantName, dict[str, Any]] = {}
        expand: dict[VariantName, dict[str, Any]] = {}
        tiles: dict[VariantName, Tensor] = {}
        for variant in VARIANTS:
            config = self._choices.shrink(variant, site.in_features)
            shrink[variant] = {
                "SPLIT_K": columns,
                "NUM_SPLITS": splits,
                "EVEN_K": site.in_features % config.block_k == 0,
                "ALIGN": align,
                "DEPENDENTS": self._dependent,
                "BLOCK_M": config.block_m,
                "BLOCK_R": config.block_r,
                "BLOCK_K": config.block_k,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            }
            wide = self._choices.expand(variant, site.out_features)
            expand[variant] = {
                "ALIGN": align,
                "OUT_ALIGN": largest_power_of_two(align, *widths),
                "DEPENDENT": self._dependent,
                "BLOCK_M": wide.block_m,
                "BLOCK_R": wide.block_r,
                "BLOCK_N": wide.block_n,
                "num_warps": wide.num_warps,
                "num_stages": wide.num_stages,
            }
            if self._dependent:
                expand[variant]["launch_pdl"] = True
            tiles[variant] = output_tiles(site, wide.block_n, self.device)
        first_module = sum(len(before.slices) for before in self.sites[: site.index])
        return _SiteLayout(first_module, splits, shrink, expand, tiles)

    def _numbers(
        self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]]
    ) -> tuple[dict[int, int], frozenset[tuple[int, ScaleName]]]:
        """({module number: rank} in ascending order, {(module number, which)})."""
        numbers: dict[str, int] = {}
        for site, places in self._index.by_site(ranks).items():
            for part, module in places:
                numbers[module] = self._layouts[site].first_module + part
        return (
            {number: ranks[module] for module, number in numbers.items()},
            frozenset((numbers[module], which) for module, which in scales),
        )

    def bytes_needed(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """rank * (in + out) elements per module, out or in per scale, each matrix and vector rounded up to 16 bytes."""
        return self.arena.bytes_needed(*self._numbers(ranks, scales))

    @property
    def bytes_used(self) -> int:
        """Bytes of all reserved slots."""
        return self.arena.bytes_used

    @property
    def bytes_total(self) -> int:
        """The budget in bytes, rounded down to 16."""
        return self.arena.bytes_total

    def _reserve(self, ranks: dict[str, int], scales: frozenset[tuple[str, ScaleName]]) -> _Adapter:
        numbers = self._numbers(ranks, scales)
        blocks = self.arena.allocate(*numbers)
        if blocks is None:
            needed = self.arena.bytes_needed(*numbers)
            raise ArenaFullError(needed, self.arena.free_for(needed))
        out_scaled = site_bits(self._index.place(module)[0] for module, which in scales if which == "out")
        in_scaled = site_bits(self._index.place(module)[0] for module, which in scales if which == "in")
        paired = site_bits(self._index.place(module)[0] for module, rank in ranks.items() if rank)
        sites = TouchedSites(paired | out_scaled, out_scaled, in_scaled)
        adapter = _Adapter(ranks=ranks, scales=scales, rank=max(ranks.values()), blocks=blocks, sites=sites)
        if self._fill_stream is not None:
            adapter.reserved = torch.cuda.Event()  # type: ignore[no-untyped-call]
            adapter.reserved.record()
        return adapter

    def _fill(self, adapter: _Adapter, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies on the copy stream, after what read the blocks before; keeps `modules` until the copies have ended."""
        if self._fill_stream is None:
            self._copy(adapter, modules)
            return
        assert adapter.reserved is not None
        with torch.cuda.stream(self._fill_stream):
            self._fill_stream.wait_event(adapter.reserved)
            self._copy(adapter, modules)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._fill_stream)
        adapter.sources, adapter.copied = modules, copied

    def _copy(self, adapter: _Adapter, modules: Mapping[str, ModuleWeights]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for module, weights in modules.items():
                site, part = self._index.place(module)
                number = self._layouts[site].first_module + part
                block = adapter.blocks[number]
                A, B = self.arena.views(number, block)
                out_scale, in_scale = self.arena.scale_views(number, block)
                A.copy_(weights.A, non_blocking=True)
                # Transposed on the device: a strided copy from the host would go through a pageable one.
                source = weights.B.to(self.device, non_blocking=True).T
                if out_scale is not None and weights.out_scale is not None:
                    g = weights.out_scale.to(self.device, non_blocking=True).float()
                    out_scale.copy_(g - 1)
                    source = source * g
                B.copy_(source)
                if in_scale is not None and weights.in_scale is not None:
                    in_scale.copy_(weights.in_scale.to(self.device, non_blocking=True).float() - 1)
                adapter.module_scales[number] = float(weights.scale)

    def filled(self, slot: int) -> bool:
        """Whether the copies of `fill` have ended; never blocks."""
        adapter = self._adapter(slot)
        if adapter.filled and _ended(adapter.copied):
            adapter.sources = None
            return True
        return False

    def _publish(self, slot: int, adapter: _Adapter) -> None:
        """Kernels launched from now on wait for the slot's copies on the device."""
        if adapter.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(adapter.copied)
        self.arena.publish(slot, adapter.blocks, adapter.module_scales)

    def release(self, slot: int) -> None:
        """Gives the slot's blocks back to the arena."""
        adapter = self._adapter(slot)
        if adapter.copied is not None and not _ended(adapter.copied):
            adapter.copied.synchronize()  # released while loading: the blocks must not be written after they are free
        self.arena.release(adapter.blocks)
        self._adapters[slot] = None
        for lane in self._lanes.values():
            lane.key = lane.plan = None

    def order(self, slot: int) -> tuple[int, ...]:
        """By slot: any order will do, as long as the same adapter's tokens are neighbours."""
        return (slot,)

    def _recall(self, key: PlanKey) -> TritonLoraPlan | None:
        state = self._lanes[key.lane]
        return state.plan if state.key == key else None

    def _plan(self, key: PlanKey) -> TritonLoraPlan | None:
        slots = {slot for segment in key.segments for slot, _ in segment.adapters}
        sites = functools.reduce(operator.or_, {self._adapter(slot).sites for slot in slots})
        if key.padded and key.num_tokens <= self._partial_rows:
            return self._padded(key, sites)
        launches, entries, records = build(key.segments, self._published_rank, self._tiles, self._partial_rows)
        return self._write(key, launches, entries, records, sites, None)

    def _padded(self, key: PlanKey, sites: TouchedSites) -> TritonLoraPlan | None:
        """The padded plan of segments that need `sites`, or None where none of them is of the lane "rows"."""
        everywhere = self._everywhere[key.lane, sites.scaled]
        if key.lane == "rows" and not sites.term & everywhere.term:
            return None
        launches, entries, records = build_padded(
            key.segments, key.num_tokens, self._published_rank, self._tiles["decode"]
        )
        padded = TouchedSites(everywhere.term | sites.term, everywhere.out_scaled, everywhere.in_scaled)
        return self._write(key, launches, entries, records, padded, (key.lane, key.num_tokens, sites.scaled))

    def _write(
        self, key: PlanKey, launches: Sequence[Launch], entries: Any, records: Any, sites: TouchedSites,
        graph_key: Hashable | None,
    ) -> TritonLoraPlan:  # fmt: skip
        state = self._lanes[key.lane]
        state.entries.write(entries)
        state.records.write(records)
        rows = state.records.tensor
        state.views = [(rows[launch.shrink[0] :], rows[launch.expand[0] :]) for launch in launches]
        state.key = key
        state.plan = TritonLoraPlan(key.num_tokens, Sets.of(key.segments), launches, sites, graph_key)
        return state.plan

    def capture_plans(
        self, num_tokens: int, lane: Lane = "tokens", *, scaled: bool = False
    ) -> Iterator[TritonLoraPlan]:
        """One plan without records, whose programs exit at once, and one more with `scaled`.

        None for a lane without sites, and for more than `PARTIAL_TOKENS` tokens: such a step is no longer bound by
        launches, and its plan is exact. Raises ValueError for more tokens than a step may have.
        """
        if num_tokens > self._limits.max_tokens:
            raise ValueError(f"{num_tokens} tokens exceed max_tokens {self._limits.max_tokens}")
        if num_tokens > self._partial_rows:
            return
        for vectors in (False, True) if scaled else (False,):
            sites = self._everywhere[lane, vectors]
            plan = self._padded(PlanKey((), num_tokens, lane, True), sites) if sites.term else None
            if plan is not None:
                yield plan

    def _state(self, plan: LoraPlan) -> _LaneState:
        state = next((lane for lane in self._lanes.values() if lane.plan is plan), None)
        if state is None:
            raise ValueError("the plan is outdated: its metadata was overwritten by a later one")
        return state

    def _own(self, plan: LoraPlan) -> TritonLoraPlan:
        own = self._state(plan).plan
        assert own is not None
        return own

    def _h(self, site: Site, launch: Launch) -> tuple[Tensor, int, int, int]:
        """(scratch, split stride, row stride, slice stride) of h."""
        width = self._limits.max_set_rank
        row = len(site.slices) * width
        return (self._parts, self._partial_rows * row, row, width) if launch.partials else (self._whole, 0, row, width)

    def _shrink(self, site: Site, x: Tensor, plan: TritonLoraPlan) -> tuple[Tensor, ...]:
        if self._side is None:
            self._launch_shrink(site, x, plan)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                self._launch_shrink(site, x, plan)
        return ()

    def _launch_shrink(self, site: Site, x: Tensor, plan: TritonLoraPlan) -> None:
        layout, state = self._layouts[site.index], self._state(plan)
        for launch, (records, _) in zip(plan.launches, state.views, strict=True):
            h, split_stride, row_stride, slice_stride = self._h(site, launch)
            programs = launch.shrink[1]
            splits = layout.splits if launch.partials else 1
            if launch.padded:
                programs = padded_programs(programs, splits * len(site.slices))
            shrink_kernel[(programs, splits, len(site.slices))](
                x,
                self.arena.memory,
                self.arena.offsets,
                self.arena.ranks,
                records,
                state.entries.tensor,
                h,
                site.in_features,
                x.stride(0),
                layout.first_module,
                self._num_modules,
                split_stride,
                row_stride,
                slice_stride,
                PARTIALS=launch.partials,
                STRIDED=launch.padded,
                **layout.shrink[launch.variant],
            )

    def _expand(
        self, site: Site, out: Tensor, plan: TritonLoraPlan, h: tuple[Tensor, ...], gates: Tensor | None
    ) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        layout, state = self._layouts[site.index], self._state(plan)
        for launch, (_, records) in zip(plan.launches, state.views, strict=True):
            partial, split_stride, row_stride, slice_stride = self._h(site, launch)
            tiles = layout.tiles[launch.variant]
            programs = launch.expand[1]
            if launch.padded:
                programs = padded_programs(programs, len(tiles))
            expand_kernel[(programs, len(tiles))](
                out,
                self.arena.memory,
                self.arena.offsets,
                self.arena.ranks,
                self.arena.scales,
                records,
                state.entries.tensor,
                tiles,
                partial,
                self.arena.scales if gates is None else gates,
                out.stride(0),
                0 if gates is None else gates.stride(0),
                layout.first_module,
                self._num_modules,
                split_stride,
                row_stride,
                slice_stride,
                NUM_PARTIALS=layout.splits if launch.partials else 1,
                STRIDED=launch.padded,
                SCALED=plan.scales_output(site),
                GATES=gates is not None,
                maxnreg=MOST_REGISTERS,
                **layout.expand[launch.variant],
            )

    def folds(self, site: Site, weight: Tensor, plan: LoraPlan) -> bool:
        """Where some adapter may have a term and `Folding` chooses it: the same for all plans of a graph key."""
        own = self._own(plan)
        return own.touches(site) and self._folding.chosen(site, weight, own.num_tokens)

    def project(
        self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, plan: LoraPlan, gates: Tensor | None = None
    ) -> Tensor:
        """The shrink, then the product with the expand in its epilogue; no side stream, as nothing is left beside it.

        Raises ValueError unless `folds`, and for wrong gates.
        """
        own = self._own(plan)
        if not self.folds(site, weight, own):
            return super().project(site, x, weight, bias, own, gates)
        check_gates(gates, own)
        inputs = self.scale_input(site, x, own, gates)
        self._launch_shrink(site, x, own)
        layout, state, width = self._layouts[site.index], self._state(own), self._limits.max_set_rank
        shrunk: list[Shrunk] = []
        for launch, (_, records) in zip(own.launches, state.views, strict=True):
            h, split_stride, _, _ = self._h(site, launch)
            shrunk.append(Shrunk(records, h, split_stride, layout.splits if launch.partials else 1))
        terms = Terms(
            shrunk, state.entries.tensor, gates, len(site.slices) * width, width, layout.first_module,
            own.scales_output(site),
        )  # fmt: skip
        return self._folding(site, inputs, weight, bias, terms)

    def _scale_input(self, site: Site, x: Tensor, plan: TritonLoraPlan, gates: Tensor | None) -> Tensor:
        scaled, layout, state = x.clone(), self._layouts[site.index], self._state(plan)
        for launch, (_, records) in zip(plan.launches, state.views, strict=True):
            programs, block_m = launch.expand[1], self._tiles[launch.variant].block_m
            blocks = -(-site.in_features // (SCALE_ELEMENTS // block_m))
            if launch.padded:
                programs = padded_programs(programs, blocks)
            scale_kernel[(programs, blocks)](
                scaled,
                self.arena.memory,
                self.arena.offsets,
                records,
                state.entries.tensor,
                self.arena.scales if gates is None else gates,
                site.in_features,
                scaled.stride(0),
                0 if gates is None else gates.stride(0),
                layout.first_module,
                self._num_modules,
                ALIGN=ALIGNMENT_BYTES // self.dtype.itemsize,
                GATES=gates is not None,
                BLOCK_M=block_m,
                BLOCK_N=SCALE_ELEMENTS // block_m,
            )
        return scaled


def _all_sites(sites: Sequence[Site], lane: Lane, *, scaled: bool) -> TouchedSites:
    """All sites of a lane and, with `scaled`, all that scale vectors can be of."""
    own = [site for site in sites if site.lane == lane]
    term = site_bits(site.index for site in own)
    if not scaled:
        return TouchedSites(term)
    return TouchedSites(term, term, site_bits(site.index for site in own if len(site.slices) == 1))


def _check_overlap(overlap: Overlap, device: torch.device) -> None:
    if overlap == "none":
        return
    if device.type != "cuda":
        raise ValueError(f"overlap {overlap} needs a CUDA card, not {device}; use none")
    if overlap == "launch" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError("overlap launch needs a card of compute capability 9.0 or later; use stream or none")
