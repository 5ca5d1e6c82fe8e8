"""What every backend does alike: slots and their states, the checks of plans, and `add` as `begin` and `finish`."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, ScaleName, Segment, Site
from .modules import ModuleIndex, SetLimits, check_segments, check_set


@dataclass(slots=True, kw_only=True)
class Adapter:
    """A reserved slot: the ranks and scale vectors it was reserved for, and how far it is filled.

    `rank` is the largest of the ranks.
    """

    ranks: dict[str, int]
    scales: frozenset[tuple[str, ScaleName]]
    rank: int
    filled: bool = False
    published: bool = False


class PlanKey(NamedTuple):
    """The arguments of `plan`: equal ones give the same plan while it is current."""

    segments: tuple[Segment, ...]
    num_tokens: int
    lane: Lane
    padded: bool


class Sets(NamedTuple):
    """What a step's sets are like: adapters of the largest, and whether any set names an adapter twice."""

    largest: int = 0
    repeat: bool = False

    @staticmethod
    def of(segments: Sequence[Segment]) -> "Sets":
        """The sets of a step's segments."""
        sets = {segment.adapters for segment in segments}
        return Sets(
            max(map(len, sets), default=0),
            any(len({slot for slot, _ in adapters}) < len(adapters) for adapters in sets),
        )


class BackendPlan(ABC):
    """A plan as `SlotBackend` sees it."""

    def __init__(self, num_tokens: int, sets: Sets, graph_key: Hashable | None = None) -> None:
        self.num_tokens = num_tokens
        self.sets = sets
        self.graph_key = graph_key

    @abstractmethod
    def touches(self, site: Site) -> bool:
        """Whether there is anything to do at the site's output."""

    @abstractmethod
    def scales_input(self, site: Site) -> bool:
        """Whether there is anything to do at the site's input."""


AdapterT = TypeVar("AdapterT", bound=Adapter)
PlanT = TypeVar("PlanT", bound=BackendPlan)


class SlotBackend(ABC, Generic[AdapterT, PlanT]):
    """The part of `interface.LoraBackend` that does not depend on where weights lie and what multiplies them."""

    def __init__(
        self, sites: Sequence[Site], *, dtype: torch.dtype, device: torch.device, max_slots: int, limits: SetLimits
    ) -> None:
        self.sites = tuple(sites)
        self.dtype = dtype
        self.device = device
        self._index = ModuleIndex(self.sites)
        self._limits = limits
        self._adapters: list[AdapterT | None] = [None] * max_slots
        self._begun: tuple[int, PlanT, tuple[Tensor, ...]] | None = None

    @property
    @abstractmethod
    def bytes_used(self) -> int:
        """Device bytes of all reserved slots."""

    @property
    @abstractmethod
    def bytes_total(self) -> int:
        """The budget in bytes."""

    @abstractmethod
    def bytes_needed(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """Device bytes of an adapter."""

    def reserve(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """A new slot. Raises `ArenaFullError` (free 0 when slots, not bytes, have run out), KeyError, ValueError."""
        self._index.check_ranks(ranks, scales)
        slot = next((number for number, adapter in enumerate(self._adapters) if adapter is None), None)
        if slot is None:
            raise ArenaFullError(self.bytes_needed(ranks, scales), 0)
        self._adapters[slot] = self._reserve(dict(ranks), frozenset(scales))
        return slot

    @abstractmethod
    def _reserve(self, ranks: dict[str, int], scales: frozenset[tuple[str, ScaleName]]) -> AdapterT:
        """Takes the memory of an adapter that was checked. Raises `ArenaFullError`."""

    def _adapter(self, slot: int) -> AdapterT:
        adapter = self._adapters[slot] if 0 <= slot < len(self._adapters) else None
        if adapter is None:
            raise ValueError(f"slot {slot} is not reserved")
        return adapter

    def fill(self, slot: int, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies the weights into the slot's memory. Raises ValueError when they are not what was reserved."""
        adapter = self._adapter(slot)
        self._index.check_weights(adapter.ranks, adapter.scales, modules)
        self._fill(adapter, modules)
        adapter.filled = True

    @abstractmethod
    def _fill(self, adapter: AdapterT, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies weights that were checked."""

    def publish(self, slot: int) -> None:
        """Makes the slot usable by plans. Raises ValueError before `fill` has returned."""
        adapter = self._adapter(slot)
        if not adapter.filled:
            raise ValueError(f"slot {slot} is not filled")
        self._publish(slot, adapter)
        adapter.published = True

    @abstractmethod
    def _publish(self, slot: int, adapter: AdapterT) -> None:
        """Makes a filled slot readable by what is launched from now on."""

    def _published_rank(self, slot: int) -> int:
        adapter = self._adapter(slot)
        if not adapter.published:
            raise ValueError(f"slot {slot} is not published")
        return adapter.rank

    def check_set(self, slots: Sequence[int]) -> None:
        """Raises ValueError naming the bound that one set of these published slots would pass."""
        check_set(slots, self._limits, self._published_rank)

    def plan(
        self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens", *, padded: bool = False
    ) -> PlanT | None:
        """The step's plan, or None where nothing is to be launched; equal arguments give the same plan while it is
        current. Raises ValueError for malformed segments, unpublished slots and passed bounds."""
        if not segments:
            return None
        key = PlanKey(tuple(segments), num_tokens, lane, padded)
        plan = self._recall(key)
        if plan is None:
            check_segments(segments, num_tokens, self._limits, self._published_rank)
            plan = self._plan(key)
        return plan

    @abstractmethod
    def _recall(self, key: PlanKey) -> PlanT | None:
        """The plan that was made for the key, while it is current."""

    @abstractmethod
    def _plan(self, key: PlanKey) -> PlanT | None:
        """Makes the plan of segments that were checked."""

    @abstractmethod
    def capture_plans(self, num_tokens: int, lane: Lane = "tokens", *, scaled: bool = False) -> Iterator[PlanT]:
        """An empty padded plan for every `graph_key` that a step of `num_tokens` can have."""

    @abstractmethod
    def _own(self, plan: LoraPlan) -> PlanT:
        """The plan as this backend's. Raises ValueError for one that is outdated."""

    def scale_input(self, site: Site, x: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> Tensor:
        """x + sum_i w_i (l_i - 1) o x, in x's dtype; x itself when no adapter scales the site's input."""
        own = self._own(plan)
        if not own.scales_input(site):
            return x
        check_gates(gates, own)
        return self._scale_input(site, x, own, gates)

    @abstractmethod
    def _scale_input(self, site: Site, x: Tensor, plan: PlanT, gates: Tensor | None) -> Tensor:
        """A scaled copy of x."""

    def begin(self, site: Site, x: Tensor, plan: LoraPlan) -> None:
        """Starts the shrink of x [tokens, in]; nothing at a site that the plan does not touch."""
        own = self._own(plan)
        self._begun = (site.index, own, self._shrink(site, x, own)) if own.touches(site) else None

    def finish(self, site: Site, out: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> None:
        """Expands into `out` what `begin` started. Raises ValueError without that `begin`, and for wrong gates."""
        own = self._own(plan)
        if not own.touches(site):
            return
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != site.index or begun[1] is not own:
            raise ValueError(f"finish of site {site.index} without its begin")
        check_gates(gates, own)
        self._expand(site, out, own, begun[2], gates)

    def folds(self, site: Site, weight: Tensor, plan: LoraPlan) -> bool:
        """False: the product and the term are computed apart."""
        return False

    def project(
        self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, plan: LoraPlan, gates: Tensor | None = None
    ) -> Tensor:
        """Raises ValueError: nothing folds here."""
        raise ValueError(f"site {site.index} is not folded: compute its product, then add")

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> None:
        """out[t] += the LoRA term, in place; x [tokens, in] and out [tokens, sum of outs] with unit stride."""
        self.begin(site, x, plan)
        self.finish(site, out, plan, gates)

    @abstractmethod
    def _shrink(self, site: Site, x: Tensor, plan: PlanT) -> tuple[Tensor, ...]:
        """h of a site that the plan touches, as far as `_expand` needs it handed over."""

    @abstractmethod
    def _expand(self, site: Site, out: Tensor, plan: PlanT, h: tuple[Tensor, ...], gates: Tensor | None) -> None:
        """Adds the site's term to out."""


def check_gates(gates: Tensor | None, plan: BackendPlan) -> None:
    """Raises ValueError for gates that do not fit the plan."""
    if gates is None:
        return
    if gates.dtype != torch.float32 or gates.dim() != 2 or gates.stride(1) != 1:
        raise ValueError("gates must be float32 [tokens, adapters of a set] with unit stride in the last dimension")
    if gates.shape[0] < plan.num_tokens or gates.shape[1] < plan.sets.largest:
        raise ValueError(f"gates {tuple(gates.shape)} do not hold {plan.num_tokens} tokens x {plan.sets.largest}")
    if plan.sets.repeat:
        raise ValueError("gates need sets that name each adapter once")
