"""The one interface between the engine and the segmented LoRA operations, whatever carries them out.

For a token t whose adapter set is {(slot_i, w_i)}, and a module with base product W x:

    y[t] = W x[t] + sum_i  w_i * s_i * B_i (A_i x[t])

A_i is [r_i, in], B_i is [out, r_i], s_i the adapter's own scale of that module (alpha/r, or alpha/sqrt(r)).
`s_i * w_i` is applied in float32 to the shrink's output. Sums of several adapters are exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Lane = Literal["tokens", "rows"]


class ArenaFullError(Exception):
    """The adapter does not fit beside those that are loaded; `needed` and `free` are in bytes."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"adapter needs {needed} bytes on the device, {free} are free")
        self.needed = needed
        self.free = free


@dataclass(frozen=True, slots=True)
class SiteSlice:
    """One module of a site: its dotted path in the base model and its number of outputs."""

    module: str
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model where one input feeds one projection, or several that are computed as one.

    A packed site (q, k and v; gate and up) has several slices; its output is their concatenation in order.
    `index` is the site's position in the sequence given to the backend.
    """

    index: int
    in_features: int
    slices: tuple[SiteSlice, ...]

    @property
    def out_features(self) -> int:
        """The sum of the slices' outputs."""
        return sum(s.out_features for s in self.slices)


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """One module's pair in canonical form: A [rank, in], B [out, rank], and the scale that multiplies B A."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of the step share one adapter set: pairs of (slot, weight). Never empty, never base."""

    start: int
    end: int
    adapters: tuple[tuple[int, float], ...]


class LoraPlan(Protocol):
    """What one step needs to know, built once on the host and used at every site. Opaque to the engine."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, base tokens included."""

    def touches(self, site: Site) -> bool:
        """Whether any adapter of the plan has weights at the site."""


class LoraBackend(Protocol):
    """Device memory for adapters, and the operations over it.

    Slots: `reserve` (engine thread) takes memory, `fill` (any one thread) copies into it, `publish` (engine
    thread) makes the slot usable by plans, `release` (engine thread) gives the memory back. A slot that is not
    published is never read. Bytes are those of the tensors in the backend's dtype.
    """

    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device

    def bytes_needed(self, ranks: Mapping[str, int]) -> int:
        """Device bytes of an adapter with these ranks per module path."""

    @property
    def bytes_used(self) -> int:
        """Device bytes of all reserved slots."""

    @property
    def bytes_total(self) -> int:
        """The budget in bytes."""

    def reserve(self, ranks: Mapping[str, int]) -> int:
        """A new slot. Raises `ArenaFullError`; KeyError for a module that is in no site."""

    def fill(self, slot: int, modules: Mapping[str, ModuleWeights]) -> None:
        """Copies the weights (cast to the backend's dtype) into the slot's memory; safe off the engine thread.

        On return the copy is complete (on a card: the copy stream's event is recorded and `filled` polls it).
        """

    def filled(self, slot: int) -> bool:
        """Whether the copies of `fill` have ended; never blocks."""

    def publish(self, slot: int) -> None:
        """Makes the slot usable by plans made from now on."""

    def release(self, slot: int) -> None:
        """Frees the slot's memory; the caller guarantees that no plan that names it is still in use."""

    def check_set(self, slots: Sequence[int]) -> None:
        """Raises ValueError naming the bound that one set of these published slots would pass."""

    def order(self, slot: int) -> tuple[int, ...]:
        """Where the slot's tokens best lie in a step: in ascending order of this. A hint; results do not depend on it.

        It may change with every plan made.
        """

    def plan(self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens") -> LoraPlan | None:
        """The step's plan, or None when no token has an adapter: then nothing is launched.

        Segments are sorted and disjoint; tokens in no segment are base tokens and cost nothing. A plan is valid until
        the next call with the same lane: "tokens" is for the step's tokens, "rows" for the fewer rows whose logits
        are computed. Raises ValueError for sets that `check_set` refuses.
        """

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan) -> None:
        """out[t] += the LoRA term of every slice, in place. x is [tokens, in]; out is [tokens, sum of outs].

        `out` has unit stride in its last dimension. A site that no adapter of the plan touches returns at once.
        """
