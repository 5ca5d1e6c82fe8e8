"""Which module belongs to which site, and the checks of segments that every backend shares."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .interface import ModuleWeights, ScaleName, Segment, Site


@dataclass(frozen=True, slots=True)
class SetLimits:
    """Bounds of one step: tokens, adapters of a set, and their ranks together (an adapter's rank is its largest)."""

    max_tokens: int
    max_set_size: int
    max_set_rank: int


class ModuleIndex:
    """Finds the (site, slice) of a module path and the shapes that follow from it."""

    def __init__(self, sites: Sequence[Site]) -> None:
        """Raises ValueError when sites are not numbered in order or a module is named twice."""
        self._place: dict[str, tuple[int, int]] = {}
        self._sites = tuple(sites)
        for position, site in enumerate(self._sites):
            if site.index != position:
                raise ValueError(f"site {position} carries index {site.index}")
            for number, part in enumerate(site.slices):
                if part.module in self._place:
                    raise ValueError(f"module {part.module} is in two sites")
                self._place[part.module] = (position, number)

    def place(self, module: str) -> tuple[int, int]:
        """(site index, slice number) of a module. Raises KeyError for a module that is in no site."""
        return self._place[module]

    def shape(self, module: str) -> tuple[int, int]:
        """(in features, out features) of a module."""
        site, number = self._place[module]
        return self._sites[site].in_features, self._sites[site].slices[number].out_features

    def by_site(self, modules: Iterable[str]) -> dict[int, list[tuple[int, str]]]:
        """The modules as {site index: [(slice number, module), ...]}, both in ascending order."""
        places: dict[int, list[tuple[int, str]]] = {}
        for site, number, module in sorted((*self._place[module], module) for module in modules):
            places.setdefault(site, []).append((number, module))
        return places

    def check_ranks(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> None:
        """Raises KeyError for an unknown module, ValueError for what `LoraBackend.reserve` refuses."""
        if not ranks:
            raise ValueError("an adapter needs at least one module")
        scaled = {module for module, _ in scales}
        for module, rank in ranks.items():
            if module not in self._place:
                raise KeyError(module)
            if rank < (0 if module in scaled else 1):
                raise ValueError(f"rank {rank} of {module} is below {0 if module in scaled else 1}")
        for module, which in scales:
            if module not in ranks:
                raise ValueError(f"the {which} scale of {module} needs a rank for the module (0 without a pair)")
            if which == "in" and len(self._sites[self._place[module][0]].slices) > 1:
                raise ValueError(f"{module} shares its input with other modules, so its input cannot be scaled")

    def check_weights(
        self,
        ranks: Mapping[str, int],
        scales: Collection[tuple[str, ScaleName]],
        modules: Mapping[str, ModuleWeights],
    ) -> None:
        """Raises ValueError when the weights are not those that were reserved."""
        if ranks.keys() != modules.keys():
            different = sorted(ranks.keys() ^ modules.keys())
            raise ValueError(f"weights do not match what was reserved: {different[0]}")
        for module, weights in modules.items():
            inputs, outputs = self.shape(module)
            rank = ranks[module]
            if tuple(weights.A.shape) != (rank, inputs) or tuple(weights.B.shape) != (outputs, rank):
                raise ValueError(
                    f"{module}: A {tuple(weights.A.shape)} and B {tuple(weights.B.shape)}, "
                    f"reserved A {(rank, inputs)} and B {(outputs, rank)}"
                )
            for which, vector, size in (("out", weights.out_scale, outputs), ("in", weights.in_scale, inputs)):
                reserved = (module, which) in scales
                if (vector is not None) != reserved or (vector is not None and tuple(vector.shape) != (size,)):
                    given = "none" if vector is None else tuple(vector.shape)
                    raise ValueError(f"{module}: {which} scale {given}, reserved {(size,) if reserved else 'none'}")


def check_segments(
    segments: Sequence[Segment], num_tokens: int, limits: SetLimits, rank_of: Callable[[int], int]
) -> None:
    """Raises ValueError for segments that overlap, leave the step, or pass a bound; the message names the bound.

    `rank_of` gives the largest rank of a published slot and raises ValueError for any other slot.
    """
    if num_tokens > limits.max_tokens:
        raise ValueError(f"{num_tokens} tokens exceed max_tokens {limits.max_tokens}")
    end = 0
    checked = set()  # many segments have few sets
    for segment in segments:
        if segment.start < end or segment.end <= segment.start or segment.end > num_tokens:
            raise ValueError(f"segment [{segment.start}, {segment.end}) is empty, out of order or out of range")
        end = segment.end
        if not segment.adapters:
            raise ValueError(f"segment [{segment.start}, {segment.end}) names no adapter")
        if segment.adapters not in checked:
            check_set([slot for slot, _ in segment.adapters], limits, rank_of)
            checked.add(segment.adapters)


def check_set(slots: Sequence[int], limits: SetLimits, rank_of: Callable[[int], int]) -> None:
    """Raises ValueError naming the bound when one set of these slots passes it; `rank_of` as in `check_segments`."""
    if len(slots) > limits.max_set_size:
        raise ValueError(f"a set of {len(slots)} adapters exceeds max_set_size {limits.max_set_size}")
    rank = sum(rank_of(slot) for slot in slots)
    if rank > limits.max_set_rank:
        raise ValueError(f"a set of total rank {rank} exceeds max_set_rank {limits.max_set_rank}")
