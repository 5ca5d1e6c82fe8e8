"""`TorchLoraBackend`: the segmented LoRA term in a few batched products per site, on any device.

Each site runs one shrink and one expand per group of entries (`torch_plan`) over the active banks (`torch_bank`), and
one per long range of tokens over the adapter's own tensors:

    h[m, t, R] = x[m, t, in] A[m, R, in]^T,   h *= s w (float32),   out[m, t, g] += h[m, t, r] B[m, r, g]

B lies multiplied by the output scale, and A in float32 banks by s; what scales do to x and to the base product is a
product per segment. In decode the usual group is: every adapter on its row, one token each, in token order. Then x and
out are used as they lie, and the expand accumulates straight into out. Accumulation order depends on the shape of the
group.

Which form computes an entry of n tokens per range (`benchmarks/cpu_distinct.py` measures all of them):

- n > 8 and no other adapter in the step, or n > 16 (bfloat16 banks: 64): its own tensors, range by range. More than
  one adapter is worth a group for longer in bfloat16, where every product costs some 20 microseconds to set up.
- but float32 prompts of up to 256 tokens that lie side by side, equally long: the banks, where the rows do so too. The
  batched product needs no copies then, and saves a product per adapter and slice.
- else: the banks. They are in the model's dtype where the processor multiplies it, in float32 elsewhere.
- one token per entry and bfloat16 banks on a CPU: the expand is a weighted sum of B's rows (`torch.embedding_bag`,
  which accumulates in float32), since a batched product of one row reads B at a third of the speed.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from loramux.kernels.processor import multiplies_bfloat16

from .interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, ScaleName, Segment, Site
from .modules import SetLimits
from .slots import Adapter, BackendPlan, PlanKey, Sets, SlotBackend
from .torch_bank import Bank, Signature, SiteTensors, bucket
from .torch_plan import Entry, Pattern, even_runs, make_entries, make_pattern
from .torch_steps import Bags, GroupStep, LongStep, Scaling, Steady

Products = Literal["auto", "banks", "own"]
"""Which weights are multiplied: by the rule of the module's text, always the banks', or always the adapters' own."""

_RECENT_PLANS = 8
"""Rows named by this many latest distinct plans are not given to other adapters."""
_SCATTERED_PLANS = 4
_OWN_TOKENS, _OWN_TOKENS_HALF = 16, 64
"""Tokens per range up to which an entry among others goes to the banks; the second with banks in half precision."""
_EVEN_TOKENS = 256
"""Tokens per entry up to which entries that are equally long, side by side, go to the banks."""


@dataclass(slots=True, kw_only=True)
class _Adapter(Adapter):
    """A slot's own tensors by site, what banks they go to, and its vectors g - 1 and l - 1 by (site, slice, which)."""

    sites: dict[int, SiteTensors]
    signatures: dict[int, Signature]
    vectors: dict[tuple[int, int, ScaleName], Tensor]
    nbytes: int


class TorchLoraPlan(BackendPlan):
    """The steps of every site that the plan's adapters touch. Made by `TorchLoraBackend.plan`."""

    def __init__(self, num_tokens: int, sets: Sets) -> None:
        super().__init__(num_tokens, sets)
        self.steps: dict[int, list[GroupStep | LongStep]] = {}
        self.scalings: dict[tuple[int, ScaleName], list[Scaling]] = {}
        self.steady: dict[int, Steady] = {}
        self.rows: list[tuple[Bank, int, frozenset[int]]] = []
        self.slots: frozenset[int] = frozenset()

    def touches(self, site: Site) -> bool:
        """Whether any adapter of the plan has weights or an output scale at the site."""
        return site.index in self.steps or (site.index, "out") in self.scalings

    def scales_input(self, site: Site) -> bool:
        """Whether any adapter of the plan scales the site's input."""
        return (site.index, "in") in self.scalings

    @property
    def current(self) -> bool:
        """Whether the banks still hold what the plan refers to; an outdated plan works, but is not handed out again."""
        return all(bank.generation == generation for bank, generation, _ in self.rows)


class TorchLoraBackend(SlotBackend[_Adapter, TorchLoraPlan]):
    """The LoRA operations on plain torch tensors; the contract is `interface.LoraBackend`.

    `bytes_used` counts the adapters' own tensors. Active banks, which hold copies of the adapters that recent steps
    used (rank padding included), come on top: `bank_bytes`. A plan stays valid for the next seven calls of `plan` that
    make a new one.
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
        super().__init__(sites, dtype=dtype, device=device, max_slots=max_slots, limits=limits)
        self.products: Products = "auto"
        self.bank_dtype = dtype
        if device.type == "cpu" and dtype.itemsize < 4 and not (dtype == torch.bfloat16 and multiplies_bfloat16()):
            self.bank_dtype = torch.float32
        self._budget = budget_bytes
        self._used = 0
        self._banks: dict[tuple[int, Signature], Bank] = {}
        self._plans: OrderedDict[tuple[tuple[Segment, ...], int], TorchLoraPlan] = OrderedDict()
        self._scattered = 0

    def bytes_needed(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """rank * (in + out) elements per module and out or in per scale vector, in the backend's dtype."""
        elements = sum(rank * sum(self._index.shape(module)) for module, rank in ranks.items())
        elements += sum(self._index.shape(module)[which == "out"] for module, which in scales)
        return elements * self.dtype.itemsize

    @property
    def bytes_used(self) -> int:
        """Bytes of all reserved slots, without the active banks."""
        return self._used

    @property
    def bytes_total(self) -> int:
        """The budget in bytes."""
        return self._budget

    @property
    def bank_bytes(self) -> int:
        """Bytes of the active banks."""
        return sum(bank.nbytes for bank in self._banks.values())

    def use(self, products: Products = "auto", bank_dtype: torch.dtype | None = None) -> None:
        """Fixes which products plans consist of from now on, and the dtype of the banks (None: as it is).

        For measurements and tests: results differ by rounding only. Plans made before must not be used any more.
        """
        self.products = products
        self.bank_dtype = bank_dtype or self.bank_dtype
        self._plans.clear()
        self._banks.clear()

    def _reserve(self, ranks: dict[str, int], scales: frozenset[tuple[str, ScaleName]]) -> _Adapter:
        needed = self.bytes_needed(ranks, scales)
        free = self._budget - self._used
        if needed > free:
            raise ArenaFullError(needed, free)
        sites: dict[int, SiteTensors] = {}
        signatures: dict[int, Signature] = {}
        vectors: dict[tuple[int, int, ScaleName], Tensor] = {}
        with torch.inference_mode(False):
            for number, modules in self._index.by_site(module for module, rank in ranks.items() if rank).items():
                site = self.sites[number]
                by_slice = {part: ranks[module] for part, module in modules}
                A = torch.empty(sum(by_slice.values()), site.in_features, dtype=self.dtype, device=self.device)
                B = {
                    part: torch.empty(rank, site.slices[part].out_features, dtype=self.dtype, device=self.device)
                    for part, rank in by_slice.items()
                }
                sites[number] = SiteTensors(A, B, by_slice, dict.fromkeys(by_slice, 0.0))
                features = site.in_features + site.out_features
                signatures[number] = tuple(
                    bucket(by_slice[part], features) if part in by_slice else 0 for part in range(len(site.slices))
                )
            for module, which in scales:
                size = self._index.shape(module)[which == "out"]
                vectors[*self._index.place(module), which] = torch.empty(size, dtype=self.dtype, device=self.device)
        self._used += needed
        return _Adapter(
            ranks=ranks, scales=scales, rank=max(ranks.values()), sites=sites, signatures=signatures, vectors=vectors,
            nbytes=needed,
        )  # fmt: skip

    def _fill(self, adapter: _Adapter, modules: Mapping[str, ModuleWeights]) -> None:
        wide = torch.promote_types(self.dtype, torch.float32)
        with torch.inference_mode(False), torch.no_grad():
            for number, tensors in adapter.sites.items():
                row = 0
                for part, rank in tensors.ranks.items():
                    weights = modules[self.sites[number].slices[part].module]
                    tensors.A[row : row + rank].copy_(weights.A)
                    B = weights.B if weights.out_scale is None else weights.B * weights.out_scale.to(wide).unsqueeze(1)
                    tensors.B[part].copy_(B.T)
                    tensors.scales[part] = float(weights.scale)
                    row += rank
            for (number, part, which), vector in adapter.vectors.items():
                weights = modules[self.sites[number].slices[part].module]
                scale = weights.out_scale if which == "out" else weights.in_scale
                assert scale is not None
                vector.copy_(scale.to(wide) - 1)

    def filled(self, slot: int) -> bool:
        """Whether `fill` has returned."""
        return self._adapter(slot).filled

    def _publish(self, slot: int, adapter: _Adapter) -> None:
        """Nothing: a plan reads the adapter itself."""

    def release(self, slot: int) -> None:
        """Frees the slot, its tensors and its rows in the active banks."""
        adapter = self._adapter(slot)
        for key in [key for key, plan in self._plans.items() if slot in plan.slots]:
            del self._plans[key]
        for site, signature in adapter.signatures.items():
            bank = self._banks.get((site, signature))
            if bank is not None:
                bank.drop(slot)
                if not bank.row_of:
                    del self._banks[site, signature]
        self._adapters[slot] = None
        self._used -= adapter.nbytes

    def order(self, slot: int) -> tuple[int, ...]:
        """By bank and row at the adapter's first site: tokens that lie as the rows do are used where they are."""
        first = next(iter(self._adapter(slot).signatures.items()), None)
        if first is None:
            return (len(self.sites), slot)
        site, signature = first
        bank = self._banks.get((site, signature))
        row = None if bank is None else bank.row_of.get(slot)
        return (site, *signature, int(row is None), slot if row is None else row)

    def _recall(self, key: PlanKey) -> TorchLoraPlan | None:
        """Both lanes share the few latest plans that are kept, all of which stay valid; padding makes no difference."""
        plan = self._plans.get((key.segments, key.num_tokens))
        if plan is None or not plan.current:
            return None
        self._plans.move_to_end((key.segments, key.num_tokens))
        return plan

    def _plan(self, key: PlanKey) -> TorchLoraPlan:
        plan = self._build(key.segments, key.num_tokens)
        self._plans[key.segments, key.num_tokens] = plan
        self._plans.move_to_end((key.segments, key.num_tokens))
        if len(self._plans) > _RECENT_PLANS:
            self._plans.popitem(last=False)
        return plan

    def capture_plans(self, num_tokens: int, lane: Lane = "tokens", *, scaled: bool = False) -> Iterator[TorchLoraPlan]:
        """Nothing: plans have no keys."""
        return iter(())

    def _own(self, plan: LoraPlan) -> TorchLoraPlan:
        return cast(TorchLoraPlan, plan)

    def _place(self, key: tuple[int, Signature], slots: Sequence[int], busy: Mapping[Bank, set[int]]) -> Bank:
        """The bank of a site and signature with a row for each of the slots."""
        site, signature = key
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = Bank(self.sites[site], signature, self.bank_dtype, self.device)
        missing = [slot for slot in slots if slot not in bank.row_of]
        if missing:
            taken = busy.get(bank, set()) | {bank.row_of[slot] for slot in slots if slot in bank.row_of}
            free = [row for row in range(bank.capacity) if row not in taken]
            if len(missing) > len(free):
                bank.grow(len(taken) + len(missing))
                free = [row for row in range(bank.capacity) if row not in taken]
            for slot, row in zip(missing, free, strict=False):
                adapter = self._adapter(slot)
                bank.load(slot, row, adapter.sites[site])
        return bank

    def _build(self, segments: Sequence[Segment], num_tokens: int) -> TorchLoraPlan:
        entries = make_entries(segments)
        own = {slot for slot, entry in entries.items() if self._uses_own(entry, len(entries))}
        # What would be computed from its own tensors but lies in a run: it is not, in banks whose rows lie so, too.
        even: set[int] = set()
        if self.products == "auto" and self.bank_dtype.itemsize >= 4:
            even.update(*even_runs(entries, own, _EVEN_TOKENS))
        by_key: dict[tuple[int, Signature], list[int]] = {}
        for slot in entries:
            if slot not in own or slot in even:
                for key in self._adapter(slot).signatures.items():
                    by_key.setdefault(key, []).append(slot)
        busy: dict[Bank, set[int]] = {}
        for recent in self._plans.values():
            for bank, generation, rows in recent.rows:
                if bank.generation == generation:
                    busy.setdefault(bank, set()).update(rows)
        patterns: dict[tuple[object, ...], Pattern] = {}
        made: list[tuple[Bank, list[int], Pattern]] = []
        alone = {(number, slot) for slot in own for number in self._adapter(slot).sites}
        for key, slots in sorted(by_key.items()):
            bank = self._place(key, slots, busy)
            runs = self._runs(entries, even.intersection(slots), bank)
            single = own.difference(*runs)
            grouped = [slot for slot in slots if slot not in single]
            alone.difference_update((bank.site.index, slot) for slot in grouped)
            if grouped:
                made.append((bank, grouped, self._pattern(patterns, bank, grouped, runs, entries)))
        self._scattered = self._scattered + 1 if any(pattern.scattered for _, _, pattern in made) else 0
        if self._scattered >= _SCATTERED_PLANS:
            self._scattered = 0
            for number, (bank, slots, pattern) in enumerate(made):
                if pattern.scattered:
                    bank.pack(slots)
                    runs = self._runs(entries, even.intersection(slots), bank)
                    made[number] = (bank, slots, self._pattern(patterns, bank, slots, runs, entries))
        plan = TorchLoraPlan(num_tokens, Sets.of(segments))
        plan.slots = frozenset(entries)
        on_cpu_in_half = self.device.type == "cpu" and self.bank_dtype.itemsize < 4
        bags = Bags(self.device) if on_cpu_in_half else None
        for bank, slots, pattern in made:
            plan.rows.append((bank, bank.generation, frozenset(bank.row_of[slot] for slot in slots)))
            plan.steps.setdefault(bank.site.index, []).extend(GroupStep(bank, group, bags) for group in pattern.groups)
        for slot in own:
            for number, tensors in self._adapter(slot).sites.items():
                if (number, slot) in alone:
                    step = LongStep(self.sites[number], tensors, entries[slot].ranges)
                    plan.steps.setdefault(number, []).append(step)
        self._add_scalings(plan, segments)
        if self.bank_dtype == self.dtype:
            for number, steps in plan.steps.items():
                only = steps[0] if len(steps) == 1 and (number, "out") not in plan.scalings else None
                steady = only.steady(num_tokens) if isinstance(only, GroupStep) else None
                if steady is not None:
                    plan.steady[number] = steady
        return plan

    def _runs(self, entries: Mapping[int, Entry], slots: Collection[int], bank: Bank) -> list[tuple[int, ...]]:
        """Runs of the slots whose rows in the bank follow one another as their tokens do."""
        return [run for run in even_runs(entries, slots, _EVEN_TOKENS) if bank.in_a_row(run)]

    def _uses_own(self, entry: Entry, entries: int) -> bool:
        """Whether the entry, one of so many, is computed from its adapter's own tensors; see the module's text."""
        if self.products != "auto":
            return self.products == "own"
        limit = _OWN_TOKENS if self.bank_dtype.itemsize >= 4 else _OWN_TOKENS_HALF
        return entry.is_long and (entries == 1 or len(entry.tokens) > limit * len(entry.ranges))

    def _add_scalings(self, plan: TorchLoraPlan, segments: Sequence[Segment]) -> None:
        """One scaling per segment and slice that has vectors."""
        for segment in segments:
            terms: dict[tuple[int, int, ScaleName], list[tuple[int, float, Tensor]]] = {}
            for place, (slot, weight) in enumerate(segment.adapters):
                for where, vector in self._adapter(slot).vectors.items():
                    terms.setdefault(where, []).append((place, weight, vector))
            for (number, part, which), parts in terms.items():
                site = self.sites[number]
                column = site.column(part) if which == "out" else 0
                columns = slice(column, column + len(parts[0][2]))
                scaling = Scaling(segment.start, segment.end, columns, tuple(parts))
                plan.scalings.setdefault((number, which), []).append(scaling)

    def _pattern(
        self,
        patterns: dict[tuple[object, ...], Pattern],
        bank: Bank,
        slots: Sequence[int],
        runs: Sequence[tuple[int, ...]],
        entries: Mapping[int, Entry],
    ) -> Pattern:
        placed = tuple((bank.row_of[slot], slot) for slot in slots)
        key = (placed, *runs)
        pattern = patterns.get(key)
        if pattern is None:
            pattern = patterns[key] = make_pattern(entries, placed, runs, self.device)
        return pattern

    def begin(self, site: Site, x: Tensor, plan: LoraPlan) -> None:
        """See `SlotBackend.begin`. In a steady step every operation beside the products is felt: there are none."""
        steady = cast(TorchLoraPlan, plan).steady.get(site.index)
        if steady is None:
            super().begin(site, x, plan)
        else:
            self._begun = (site.index, cast(TorchLoraPlan, plan), (torch.bmm(x.unsqueeze(1), steady.A),))

    def finish(self, site: Site, out: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> None:
        """See `SlotBackend.finish`."""
        steady = cast(TorchLoraPlan, plan).steady.get(site.index)
        begun = self._begun
        ours = begun is not None and begun[0] == site.index and begun[1] is plan
        if steady is None or begun is None or not ours or gates is not None or not out.is_contiguous():
            super().finish(site, out, plan, gates)
            return
        self._begun = None
        out.view(-1, 1, steady.width).baddbmm_(begun[2][0].view(-1, 1, steady.rank), steady.B)

    def _scale_input(self, site: Site, x: Tensor, plan: TorchLoraPlan, gates: Tensor | None) -> Tensor:
        scaled = x.clone()
        for scaling in plan.scalings[site.index, "in"]:
            scaling.apply(scaled, gates)
        return scaled

    def _shrink(self, site: Site, x: Tensor, plan: TorchLoraPlan) -> tuple[Tensor, ...]:
        return tuple(step.shrink(x) for step in plan.steps.get(site.index, ()))

    def _expand(
        self, site: Site, out: Tensor, plan: TorchLoraPlan, h: tuple[Tensor, ...], gates: Tensor | None
    ) -> None:
        for scaling in plan.scalings.get((site.index, "out"), ()):
            scaling.apply(out, gates)
        for step, shrunk in zip(plan.steps.get(site.index, ()), h, strict=True):
            step.expand(shrunk, out, gates)
