"""Replacing a model's projections by ones that add the step's adapters, packed where they share an input.

Which projections there are, and which of them read the same tensor, is observed in one probing forward pass, not known
by architecture: modules with the same parent that are called one after the other with the very same input become one
product (q, k and v; gate and up), computed at the first call and handed out in slices.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from loramux.kernels.lora.interface import Lane, LoraBackend, Site, SiteSlice
from loramux.server.engine.attention import StepState


@dataclass(slots=True)
class LinearCall:
    """One call of a projection seen by the probe: its path, the identity of its input, and the input's rows."""

    name: str
    input_id: int
    rows: int
    keep: Tensor


@dataclass(slots=True)
class Probe:
    """Records the calls of every projection of a model during one forward pass, in order."""

    calls: list[LinearCall] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def attach(self, model: nn.Module) -> None:
        """Hooks every nn.Linear and Conv1D, and nothing that computes more than they do."""
        for name, module in model.named_modules():
            if type(module).forward in (nn.Linear.forward, Conv1D.forward):
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self.calls.append(LinearCall(name, id(x), x.numel() // x.shape[-1], x))

        return seen


class SiteProjection(nn.Module):
    """out = x W^T + b, plus the step's adapters, for one site of one or more slices.

    `weight` is [sum of outs, in]. x has any leading dimensions. The result is cut into slices by `SliceOf`. A head sees
    only the rows whose logits are wanted, so its adapters are those of the rows, not of the tokens. `product` computes
    x W^T + b; where the backend folds, its one kernel does that and the adapters, and without adapters `product` runs.
    """

    def __init__(self, weights: Seq[Tensor], biases: Seq[Tensor | None], state: StepState, *, is_head: bool) -> None:
        super().__init__()
        self.outs = [int(w.shape[0]) for w in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if any(b is not None for b in biases):
            parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
            self.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
        self._state = state
        self.is_head = is_head
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self.site: Site | None = None
        self.backend: LoraBackend | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., sum of outs]."""
        watched = self._state.watched
        if watched is not None and self.site is not None and self.site.index in watched:
            watched[self.site.index] = x
        plan = self._state.lora_rows if self.is_head else self._state.lora
        if plan is None or self.backend is None or self.site is None:
            return self.product(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        if self.backend.folds(self.site, self.weight, plan):
            return self.backend.project(self.site, rows, self.weight, self.bias, plan).view(*x.shape[:-1], -1)
        self.backend.begin(self.site, rows, plan)  # the part that may run beside the base product
        out = self.product(x, self.weight, self.bias)
        self.backend.finish(self.site, out.view(-1, out.shape[-1]), plan)
        return out


class SliceOf(nn.Module):
    """Stands where a projection stood; the first of a packed site computes, the others take their slice."""

    def __init__(self, shared: "PackedOutput", index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    @property
    def weight(self) -> Tensor:
        """The slice's rows of the packed weight, for model code that looks at it."""
        low = sum(self._shared.projection.outs[: self._index])
        return self._shared.projection.weight[low : low + self._shared.projection.outs[self._index]]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out of this slice]."""
        return self._shared.take(self._index, x)


class PackedOutput:
    """The latest output of a packed site, held between the calls of its slices."""

    def __init__(self, projection: SiteProjection) -> None:
        self.projection = projection
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def take(self, index: int, x: Tensor) -> Tensor:
        """The slice for input x; computes the packed product when x is not the input of the held one."""
        if self._x is not x:
            self._parts = self.projection(x).split(self.projection.outs, dim=-1)
            self._x = x
        part = self._parts[index]
        if index == len(self._parts) - 1:
            self._x, self._parts = None, ()
        return part


def replace_linears(model: nn.Module, probe: Probe, state: StepState, *, tokens: int, head_rows: int,
                    pack: bool) -> list[SiteProjection]:  # fmt: skip
    """Puts site projections in the place of every projection that the probe saw once with all of the step's rows.

    `tokens` and `head_rows` are the probe's numbers of tokens and of logit rows; a projection that saw neither number
    (a routed expert, say) keeps its own code and takes no adapters. Returns the projections in call order, each with
    its `site`.
    """
    counts: dict[str, int] = {}
    for call in probe.calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    usable = [c for c in probe.calls if counts[c.name] == 1 and c.rows in (tokens, head_rows)]
    groups: list[list[LinearCall]] = []
    for call in usable:
        last = groups[-1][-1] if groups else None
        together = (
            pack and last is not None and last.input_id == call.input_id and last.rows == call.rows == tokens
            and last.name.rpartition(".")[0] == call.name.rpartition(".")[0]
        )  # fmt: skip
        if together:
            groups[-1].append(call)
        else:
            groups.append([call])
    projections = []
    for index, group in enumerate(groups):
        modules = [model.get_submodule(call.name) for call in group]
        weights = [_weight(m) for m in modules]
        is_head = group[0].rows == head_rows
        projection = SiteProjection(weights, [_bias(m) for m in modules], state, is_head=is_head)
        slices = tuple(SiteSlice(c.name, n) for c, n in zip(group, projection.outs, strict=True))
        lane: Lane = "rows" if is_head else "tokens"
        projection.site = Site(index, int(projection.weight.shape[1]), slices, lane)
        shared = PackedOutput(projection)
        for i, call in enumerate(group):
            replacement = projection if len(group) == 1 else SliceOf(shared, i)
            model.set_submodule(call.name, replacement)
        projections.append(projection)
    return projections


def _weight(module: nn.Module) -> Tensor:
    """The projection's weight as [out, in]; a tied weight stays the very same parameter."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    return weight.data.t().contiguous() if isinstance(module, Conv1D) else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None
