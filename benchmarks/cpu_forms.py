"""The forms that the LoRA term of a batch can take on a CPU, as products of all sites of a model and nothing else.

Three come from the backend (`TorchLoraBackend.use`): its rule, batched products over banks, and products of each
adapter's own tensors. Two are here because they were measured and left: weights gathered token by token, and one wide
product of all adapters with a mask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from gpu_models import names_of
from torch import Tensor
from torch.nn import functional as F

from loramux.kernels.lora import ModuleWeights, Segment, Site, make_backend
from loramux.kernels.lora.cases import load, relative_error
from loramux.kernels.lora.torch_backend import Products, TorchLoraBackend
from loramux.server.engine.loading import LoadedModel

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(slots=True)
class Weights:
    """All adapters' weights at one site: A [m, R, in] with R the sum of the slices' ranks, B [m, r, out] per slice."""

    A: Tensor
    B: list[Tensor]

    @staticmethod
    def random(site: Site, adapters: int, rank: int, dtype: torch.dtype) -> "Weights":
        """N(0, 1/fan_in) throughout."""
        A = torch.randn(adapters, rank * len(site.slices), site.in_features) * site.in_features**-0.5
        B = [torch.randn(adapters, rank, part.out_features) * rank**-0.5 for part in site.slices]
        return Weights(A.to(dtype), [b.to(dtype) for b in B])


def floor_products(model: LoadedModel, tokens: int, rows: int) -> Callable[[], None]:
    """The base's matrix products of a step of so many tokens, of which `rows` get logits, and nothing else; they are
    computed as the model's own projections do it."""
    inputs = {
        (count, p.weight.shape[1]): torch.randn(count, p.weight.shape[1], dtype=model.dtype)
        for p in model.projections
        for count in (tokens, rows)
    }
    calls = [(p, inputs[rows if p.is_head else tokens, p.weight.shape[1]]) for p in model.projections]

    def run() -> None:
        for projection, x in calls:
            projection.product(x, projection.weight, projection.bias)

    return run


class Forms:
    """A step of `tokens` tokens that `adapters` adapters share evenly, at every site but the head, in each form."""

    def __init__(self, model: LoadedModel, *, tokens: int, adapters: int, rank: int) -> None:
        self._projections = [(p.site, p.weight) for p in model.projections if p.site is not None and not p.is_head]
        sites = [p.site for p in model.projections if p.site is not None]
        dtype = model.dtype
        self._weights = {site.index: Weights.random(site, adapters, rank, dtype) for site, _ in self._projections}
        self._x = {n: torch.randn(tokens, n, dtype=dtype) for n in {site.in_features for site in sites}}
        numbers = [int(n or 0) for n in names_of([str(i) for i in range(adapters)], tokens, adapters)]
        self._index = torch.tensor(numbers)
        self._mask = F.one_hot(self._index, adapters).to(dtype).unsqueeze(2)
        backend = make_backend(
            sites, dtype=dtype, device="cpu", budget_bytes=1 << 40, max_slots=adapters, max_tokens=tokens,
            max_set_rank=rank,
        )  # fmt: skip
        assert isinstance(backend, TorchLoraBackend)
        self._backend = backend
        slots = [load(backend, self._adapter(number, rank)) for number in range(adapters)]
        starts = [row for row in range(tokens) if row == 0 or numbers[row] != numbers[row - 1]]
        bounds = pairwise([*starts, tokens])
        self._segments = [Segment(start, end, ((slots[numbers[start]], 1.0),)) for start, end in bounds]
        self._tokens = tokens

    def _adapter(self, number: int, rank: int) -> Mapping[str, ModuleWeights]:
        found = {}
        for site, _ in self._projections:
            weights = self._weights[site.index]
            for part, (module, B) in enumerate(zip(site.slices, weights.B, strict=True)):
                A = weights.A[number, part * rank : (part + 1) * rank]
                found[module.module] = ModuleWeights(A, B[number].T, 1.0)
        return found

    def base(self) -> list[Tensor]:
        """The base's products: [tokens, outs] per site."""
        return [F.linear(self._x[site.in_features], weight) for site, weight in self._projections]

    def _each(self, add: Callable[[Tensor, Tensor, Weights, Sequence[slice]], None]) -> list[Tensor]:
        outs = []
        for site, weight in self._projections:
            x = self._x[site.in_features]
            out = F.linear(x, weight)
            columns = [slice(site.column(i), site.column(i) + s.out_features) for i, s in enumerate(site.slices)]
            add(x, out, self._weights[site.index], columns)
            outs.append(out)
        return outs

    def gathered(self) -> list[Tensor]:
        """A and B of every token's adapter copied side by side: [tokens, R, in] and [tokens, r, out]."""

        def add(x: Tensor, out: Tensor, weights: Weights, columns: Sequence[slice]) -> None:
            h = torch.bmm(x.unsqueeze(1), weights.A.index_select(0, self._index).transpose(1, 2))
            for h_part, B, part in zip(h.chunk(len(columns), dim=2), weights.B, columns, strict=True):
                out[:, part] += torch.bmm(h_part, B.index_select(0, self._index)).squeeze(1)

        return self._each(add)

    def masked(self) -> list[Tensor]:
        """Every token times every adapter, the others' products zeroed: [tokens, m R], then [m r, out] per slice."""

        def add(x: Tensor, out: Tensor, weights: Weights, columns: Sequence[slice]) -> None:
            h = F.linear(x, weights.A.flatten(0, 1)).view(self._tokens, len(weights.A), -1) * self._mask
            for h_part, B, part in zip(h.chunk(len(columns), dim=2), weights.B, columns, strict=True):
                out[:, part].addmm_(h_part.reshape(self._tokens, -1), B.flatten(0, 1))

        return self._each(add)

    def backends(self, products: Products, bank_dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
        """The backend's own, with these choices; the plan is made once, as in a steady batch."""
        self._backend.use(products, bank_dtype)
        plan = self._backend.plan(self._segments, self._tokens)
        assert plan is not None

        def run() -> list[Tensor]:
            outs = []
            for site, weight in self._projections:
                x = self._x[site.in_features]
                self._backend.begin(site, x, plan)
                outs.append(F.linear(x, weight))
                self._backend.finish(site, outs[-1], plan)
            return outs

        return run

    def all(self) -> dict[str, Callable[[], list[Tensor]]]:
        """Every form by name, the rule first. Raises ArithmeticError when one computes something else."""
        forms = {"rule": self.backends("auto"), "banks": self.backends("banks")}
        if self._x[self._projections[0][0].in_features].dtype != torch.float32:
            own = self._backend.bank_dtype
            forms["float32 banks"] = self.backends("banks", torch.float32)
            self._backend.use("auto", own)
        forms |= {"own": self.backends("own"), "gathered": self.gathered, "masked": self.masked}
        expected = forms["own"]()
        for name, form in forms.items():
            for got, wanted in zip(form(), expected, strict=True):
                if not relative_error(got, wanted) <= TOLERANCE[wanted.dtype]:
                    raise ArithmeticError(f"{name} differs from own by {relative_error(got, wanted):.2g}")
        return forms
