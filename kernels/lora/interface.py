"""The one interface between the engine and the segmented LoRA operations, whatever carries them out.

For a token t whose adapter set is {(slot_i, w_i)}, and a module with base product W x:

    y[t] = W x[t] + sum_i  w_i * s_i * B_i (A_i x[t])

A_i is [r_i, in], B_i is [out, r_i], s_i the adapter's own scale of that module (alpha/r, or alpha/sqrt(r)).
`s_i * w_i` is applied in float32 to the shrink's output. Sums of several adapters are exact.

Two extensions cost only the steps that use them. Gates, [tokens, adapters of a set] numbers that the device computes,
multiply w_i token by token (MeteoRA, arXiv:2405.13053; X-LoRA, arXiv:2402.07148). An adapter's module may carry an
output scale g_i [out] and an input scale l_i [in] (DoRA, arXiv:2402.09353: g = m / |W + s B A|; IA3, arXiv:2205.05638:
rank 0 and one of the two):

    x'   = x + sum_i w_i (l_i - 1) o x
    y[t] = W x'[t] + sum_i  w_i * [(g_i - 1) o W x'[t]  +  g_i o s_i B_i (A_i x[t])]

W x' stands for the whole output of the projection, its bias included.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Lane = Literal["tokens", "rows"]
ScaleName = Literal["out", "in"]
Overlap = Literal["none", "stream", "launch"]
"""How the shrink is hidden: not at all; on a side stream from `begin` to `finish`; or by launching the expand while the
shrink still runs (programmatic dependent launch)."""


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
    `index` is the site's position in the sequence given to the backend. `lane` says which plans serve it: "rows" for
    a site that sees only the rows whose logits are computed.
    """

    index: int
    in_features: int
    slices: tuple[SiteSlice, ...]
    lane: Lane = "tokens"

    @property
    def out_features(self) -> int:
        """The sum of the slices' outputs."""
        return sum(s.out_features for s in self.slices)

    def column(self, number: int) -> int:
        """The first output of slice `number` within the site's."""
        return sum(s.out_features for s in self.slices[:number])


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """One module's pair in canonical form: A [rank, in], B [out, rank], and the scale that multiplies B A.

    `out_scale` [out] and `in_scale` [in] are g and l of the module's text, or None; only with one of them may the
    rank be 0.
    """

    A: Tensor
    B: Tensor
    scale: float
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return int(self.A.shape[0])


class Segment(NamedTuple):
    """Tokens [start, end) of the step share one adapter set: pairs of (slot, weight). Never empty, never base.

    A tuple, since plans are found again by the hash of a step's segments.
    """

    start: int
    end: int
    adapters: tuple[tuple[int, float], ...]


class LoraPlan(Protocol):
    """What one step needs to know, built once on the host and used at every site. Opaque to the engine."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, base tokens included."""

    @property
    def graph_key(self) -> Hashable | None:
        """Plans of equal keys launch the same kernels with the same grids, numbers and pointers.

        A CUDA graph captured over one of them serves every later one, once `plan` has rewritten the metadata. None
        for a plan whose launches are its own.
        """

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

    def bytes_needed(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """Device bytes of an adapter with these ranks per module path, and these scale vectors (module, which)."""

    @property
    def bytes_used(self) -> int:
        """Device bytes of all reserved slots."""

    @property
    def bytes_total(self) -> int:
        """The budget in bytes."""

    def reserve(self, ranks: Mapping[str, int], scales: Collection[tuple[str, ScaleName]] = ()) -> int:
        """A new slot. Raises `ArenaFullError`; KeyError for a module that is in no site.

        ValueError for a rank below 1 of a module without scales, for scales of a module without a rank, and for the
        input scale of a module that shares its input with others.
        """

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

    def plan(
        self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens", *, padded: bool = False
    ) -> LoraPlan | None:
        """The step's plan, or None when no token has an adapter: then nothing is launched.

        Segments are sorted and disjoint; tokens in no segment are base tokens and cost nothing. A plan is valid until
        the next call with the same lane: "tokens" is for the step's tokens, "rows" for the fewer rows whose logits
        are computed. Raises ValueError for sets that `check_set` refuses.

        A `padded` plan, for decode steps that are replayed from CUDA graphs, launches what `num_tokens` alone
        decides, at all sites of its lane; work that the step does not have is left at once, and no weights are read
        for it. In the lane "rows" it is None when no adapter of the step touches a site of that lane.
        """

    def capture_plans(self, num_tokens: int, lane: Lane = "tokens", *, scaled: bool = False) -> Iterator[LoraPlan]:
        """An empty padded plan for every `graph_key` that a step of `num_tokens` can have; needs no adapters.

        Each is valid until the next is taken. With `scaled`, also those of steps whose adapters have scale vectors.
        Yields nothing where plans have no keys.
        """

    def scale_input(self, site: Site, x: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> Tensor:
        """x' [tokens, in]: what the base product must read. x itself when no adapter scales the site's input."""

    def begin(self, site: Site, x: Tensor, plan: LoraPlan) -> None:
        """Starts the part of `add` that needs x [tokens, in] alone (not x'), before or beside the base product.

        x must stay as it is until `finish`, which must be called before `begin` of another site.
        """

    def finish(self, site: Site, out: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> None:
        """Adds to `out`, the finished base product, what `begin` started. ValueError without that `begin`."""

    def folds(self, site: Site, weight: Tensor, plan: LoraPlan) -> bool:
        """Whether `project` takes the place of product and `add` in this step: said by settings and shapes alone."""

    def project(
        self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, plan: LoraPlan, gates: Tensor | None = None
    ) -> Tensor:
        """x' W^T + b + the LoRA term of every slice, [tokens, sum of outs], where `folds`.

        x is [tokens, in], weight [sum of outs, in], bias [sum of outs]. The value is that of `scale_input`, a product
        and `add`, but rounded once instead of twice. Raises ValueError where it does not fold.
        """

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan, gates: Tensor | None = None) -> None:
        """out[t] += the LoRA term of every slice, in place. x is [tokens, in]; out is [tokens, sum of outs].

        `out` has unit stride in its last dimension. A site that no adapter of the plan touches returns at once.
        `gates` is float32 [tokens, n] with unit stride in its last dimension: gates[t, i] multiplies the weight of the
        i-th adapter of the segment that holds t. Raises ValueError for gates that are too small, and for gates of a
        set that names an adapter twice. `add` is `begin` and `finish`, with the same result.
        """
