"""`TorchLoraBackend`: the segmented LoRA term in a few batched products per site, on any device.

Each site runs one shrink and one expand per group of entries (`torch_plan`) over the active banks (`torch_bank`), and
one per long range of tokens over the adapter's own tensors:

    h[m, t, R] = x[m, t, in] A[m, R, in]^T,   h *= s w (float32),   out[m, t, g] += h[m, t, r] B[m, r, g]

In decode the usual group is: every adapter on its row, one token each, in token order. Then x and out are used as
they lie, and the expand accumulates straight into out. Accumulation order depends on the shape of the group.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, Segment, Site
from .modules import ModuleIndex, SetLimits, check_segments, check_set
from .torch_bank import Bank, Run, Signature, SiteTensors, bucket
from .torch_plan import Entry, Group, Pattern, make_entries, make_pattern

_RECENT_PLANS = 8
"""Rows named by this many latest distinct plans are not given to other adapters."""
_SCATTERED_PLANS = 4


@dataclass(slots=True)
class _Adapter:
    """A slot's own tensors by site, and what banks they go to."""

    sites: dict[int, SiteTensors]
    signatures: dict[int, Signature]
    ranks: dict[str, int]
    nbytes: int
    filled: bool = False
    published: bool = False

    @property
    def rank(self) -> int:
        return max(self.ranks.values())


class _GroupStep:
    """One group at one site: views of the bank that are made once per plan, and the products over them."""

    def __init__(self, bank: Bank, group: Group) -> None:
        # The tensors, not the bank: a later plan may move the bank's rows to new tensors while this one is in use.
        self._A, self._B, self._scale, self._group = bank.A, tuple(bank.B), bank.scale, group
        self._runs = tuple(zip(bank.runs, bank.spread, range(len(bank.runs)), strict=True))
        only = bank.runs[0]
        self.direct = (
            group.aligned
            and group.length == 1
            and group.source.index is None
            and len(bank.runs) == 1
            and only.out_features == bank.site.out_features
        )
        # Copies of a gather group are made at each use: they would otherwise double the memory of every site.
        self._kept = self._weights() if group.rows.index is None else None

    def _weights(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        group = self._group
        scale = group.rows.take(self._scale).unsqueeze(1)
        if group.weights is not None:
            scale = scale * group.weights
        A = group.rows.take(self._A).transpose(1, 2)
        B = [
            group.rows.take(stacked).view(group.count * run.num_chunks, run.rank, run.width)
            for (run, _, _), stacked in zip(self._runs, self._B, strict=True)
        ]
        return A, scale, B

    def add(self, x: Tensor, out: Tensor) -> None:
        group = self._group
        A, scale, B = self._kept or self._weights()
        inputs = group.source.take(x).to(A.dtype).view(group.count, group.length, x.shape[1])
        h = torch.bmm(inputs, A).mul_(scale)
        if self.direct and out.is_contiguous():
            run, spread, _ = self._runs[0]
            start = group.sums[0][0].start
            target = out[start : start + group.count].view(-1, 1, run.width)
            if spread is not None:
                h = h.view(group.count, len(run.slices), run.rank).index_select(1, spread)
            h = h.view(-1, 1, run.rank)
            if out.dtype == h.dtype:
                target.baddbmm_(h, B[0])
            else:
                target.add_(torch.bmm(h, B[0]))
            return
        for run, spread, number in self._runs:
            self._add_run(self._expand(h, run, spread, B[number]), out[:, run.column : run.column + run.out_features])

    def _expand(self, h: Tensor, run: Run, spread: Tensor | None, B: Tensor) -> Tensor:
        """The run's product as [m * length, outputs of the run]."""
        group, slices = self._group, len(run.slices)
        h = h[:, :, run.offset : run.offset + slices * run.rank]
        h = h.reshape(group.count, group.length, slices, run.rank).transpose(1, 2) if slices > 1 else h.unsqueeze(1)
        if spread is not None:
            h = h.index_select(1, spread)
        y = torch.bmm(h.reshape(-1, group.length, run.rank), B)
        if run.num_chunks > 1 and group.length > 1:
            y = y.view(group.count, run.num_chunks, group.length, run.width).transpose(1, 2)
        return y.reshape(group.count * group.length, run.out_features)

    def _add_run(self, y: Tensor, out: Tensor) -> None:
        for tokens, positions in self._group.sums:
            term = y if positions is None else positions.take(y)
            if tokens.index is None:
                out[tokens.start : tokens.stop].add_(term)
            else:
                out.index_add_(0, tokens.index, term.to(out.dtype))


class _LongStep:
    """The ranges of one long entry at one site; s w multiplies the expand's float32 accumulator."""

    def __init__(self, site: Site, tensors: SiteTensors, ranges: Sequence[tuple[int, int, float]]) -> None:
        self._ranges = ranges
        self._A = tensors.A.T
        self._parts: list[tuple[slice, slice, Tensor, float]] = []
        rank = 0
        for number, B in sorted(tensors.B.items()):
            column = sum(part.out_features for part in site.slices[:number])
            outputs = slice(column, column + site.slices[number].out_features)
            self._parts.append((slice(rank, rank + len(B)), outputs, B, tensors.scales[number]))
            rank += len(B)

    def add(self, x: Tensor, out: Tensor) -> None:
        for start, end, weight in self._ranges:
            h = x[start:end] @ self._A
            target = out[start:end]
            for ranks, outputs, B, scale in self._parts:
                target[:, outputs].addmm_(h[:, ranks], B, alpha=scale * weight)


class TorchLoraPlan:
    """The steps of every site that the plan's adapters touch. Made by `TorchLoraBackend.plan`."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.steps: dict[int, list[_GroupStep | _LongStep]] = {}
        self.rows: list[tuple[Bank, int, frozenset[int]]] = []
        self.slots: frozenset[int] = frozenset()

    def touches(self, site: Site) -> bool:
        """Whether any adapter of the plan has weights at the site."""
        return site.index in self.steps

    @property
    def current(self) -> bool:
        """Whether the banks still hold what the plan refers to; an outdated plan works, but is not handed out again."""
        return all(bank.generation == generation for bank, generation, _ in self.rows)


class TorchLoraBackend:
    """The LoRA operations on plain torch tensors; the contract is `interface.LoraBackend`.

    `bytes_used` counts the adapters' own tensors. Active banks, which hold copies of the adapters that recent steps
    used (rank padding included; float32 on a CPU), come on top: `bank_bytes`. A plan stays valid for the next seven
    calls of `plan` that make a new one.
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
        self.sites = tuple(sites)
        self.dtype = dtype
        self.device = device
        self._index = ModuleIndex(self.sites)
        # A CPU's batched products in half precision pay more per call than float32 pays in bytes.
        half_on_cpu = device.type == "cpu" and dtype.itemsize < 4
        self._bank_dtype = torch.float32 if half_on_cpu else dtype
        self._budget = budget_bytes
        self._limits = limits
        self._adapters: list[_Adapter | None] = [None] * max_slots
        self._used = 0
        self._banks: dict[tuple[int, Signature], Bank] = {}
        self._plans: OrderedDict[tuple[tuple[Segment, ...], int], TorchLoraPlan] = OrderedDict()
        self._scattered = 0

    def bytes_needed(self, ranks: Mapping[str, int]) -> int:
        """rank * (in + out) elements per module, in the backend's dtype."""
        return sum(rank * sum(self._index.shape(module)) for module, rank in ranks.items()) * self.dtype.itemsize

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

    def reserve(self, ranks: Mapping[str, int]) -> int:
        """A new slot. Raises `ArenaFullError` (free 0 when slots, not bytes, have run out), KeyError, ValueError."""
        self._index.check_ranks(ranks)
        needed = self.bytes_needed(ranks)
        free = self._budget - self._used
        if needed > free:
            raise ArenaFullError(needed, free)
        slot = next((number for number, adapter in enumerate(self._adapters) if adapter is None), None)
        if slot is None:
            raise ArenaFullError(needed, 0)
        sites: dict[int, SiteTensors] = {}
        signatures: dict[int, Signature] = {}
        with torch.inference_mode(False):
            for number, modules in self._index.by_site(ranks).items():
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
        self._adapters[slot] = _Adapter(sites, signatures, dict(ranks), needed)
        self._used += needed
        return slot

    def _adapter(self, slot: int) -> _Adapter:
        adapter = self._adapters[slot] if 0 <= slot < len(self._adapters) else None
        if adapter is None:
            raise ValueError(f"slot {slot} is not reserved")
        return adapter

    def fill(self, slot: int, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies the weights into the slot's own tensors. Raises ValueError when they are not what was reserved."""
        adapter = self._adapter(slot)
        self._index.check_weights(adapter.ranks, modules)
        with torch.inference_mode(False), torch.no_grad():
            for number, places in self._index.by_site(modules).items():
                tensors, row = adapter.sites[number], 0
                for part, module in places:
                    weights = modules[module]
                    tensors.A[row : row + weights.rank].copy_(weights.A)
                    tensors.B[part].copy_(weights.B.T)
                    tensors.scales[part] = float(weights.scale)
                    row += weights.rank
        adapter.filled = True

    def filled(self, slot: int) -> bool:
        """Whether `fill` has returned."""
        return self._adapter(slot).filled

    def publish(self, slot: int) -> None:
        """Makes the slot usable by plans. Raises ValueError before it is filled."""
        adapter = self._adapter(slot)
        if not adapter.filled:
            raise ValueError(f"slot {slot} is not filled")
        adapter.published = True

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

    def _published_rank(self, slot: int) -> int:
        adapter = self._adapter(slot)
        if not adapter.published:
            raise ValueError(f"slot {slot} is not published")
        return adapter.rank

    def check_set(self, slots: Sequence[int]) -> None:
        """Raises ValueError naming the bound that one set of these published slots would pass."""
        check_set(slots, self._limits, self._published_rank)

    def order(self, slot: int) -> tuple[int, ...]:
        """By bank and row at the adapter's first site: tokens that lie as the rows do are used where they are."""
        site, signature = next(iter(self._adapter(slot).signatures.items()))
        bank = self._banks.get((site, signature))
        row = None if bank is None else bank.row_of.get(slot)
        return (site, *signature, int(row is None), slot if row is None else row)

    def plan(self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens") -> TorchLoraPlan | None:
        """The step's plan, or None without segments; the same arguments give the same plan while it is current.

        Both lanes share the few latest plans that are kept, all of which stay valid.
        Raises ValueError for malformed segments, unpublished slots and passed bounds.
        """
        if not segments:
            return None
        key = (tuple(segments), num_tokens)
        plan = self._plans.get(key)
        if plan is None or not plan.current:
            check_segments(segments, num_tokens, self._limits, self._published_rank)
            plan = self._build(segments, num_tokens)
            self._plans[key] = plan
            if len(self._plans) > _RECENT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def _place(self, key: tuple[int, Signature], slots: Sequence[int], busy: Mapping[Bank, set[int]]) -> Bank:
        """The bank of a site and signature with a row for each of the slots."""
        site, signature = key
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = Bank(self.sites[site], signature, self._bank_dtype, self.device)
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
        by_key: dict[tuple[int, Signature], list[int]] = {}
        for slot, entry in entries.items():
            if not entry.is_long:
                for key in self._adapter(slot).signatures.items():
                    by_key.setdefault(key, []).append(slot)
        busy: dict[Bank, set[int]] = {}
        for recent in self._plans.values():
            for bank, generation, rows in recent.rows:
                if bank.generation == generation:
                    busy.setdefault(bank, set()).update(rows)
        patterns: dict[tuple[tuple[int, int], ...], Pattern] = {}
        made: list[tuple[Bank, list[int], Pattern]] = []
        for key, slots in sorted(by_key.items()):
            bank = self._place(key, slots, busy)
            made.append((bank, slots, self._pattern(patterns, bank, slots, entries)))
        self._scattered = self._scattered + 1 if any(pattern.scattered for _, _, pattern in made) else 0
        if self._scattered >= _SCATTERED_PLANS:
            self._scattered = 0
            for number, (bank, slots, pattern) in enumerate(made):
                if pattern.scattered:
                    bank.pack(slots)
                    made[number] = (bank, slots, self._pattern(patterns, bank, slots, entries))
        plan = TorchLoraPlan(num_tokens)
        plan.slots = frozenset(entries)
        for bank, slots, pattern in made:
            plan.rows.append((bank, bank.generation, frozenset(bank.row_of[slot] for slot in slots)))
            plan.steps.setdefault(bank.site.index, []).extend(_GroupStep(bank, group) for group in pattern.groups)
        for slot, entry in entries.items():
            if entry.is_long:
                for number, tensors in self._adapter(slot).sites.items():
                    step = _LongStep(self.sites[number], tensors, entry.ranges)
                    plan.steps.setdefault(number, []).append(step)
        return plan

    def _pattern(
        self,
        patterns: dict[tuple[tuple[int, int], ...], Pattern],
        bank: Bank,
        slots: Sequence[int],
        entries: Mapping[int, Entry],
    ) -> Pattern:
        placed = tuple((bank.row_of[slot], slot) for slot in slots)
        pattern = patterns.get(placed)
        if pattern is None:
            pattern = patterns[placed] = make_pattern(entries, placed, self.device)
        return pattern

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan) -> None:
        """out[t] += the LoRA term, in place; x [tokens, in], out [tokens, sum of outs] with unit stride."""
        for step in cast(TorchLoraPlan, plan).steps.get(site.index, ()):
            step.add(x, out)
