"""The LoRA term on the CPU with bits that do not depend on the batch, over the adapters' own tensors.

Tokens of one adapter set are computed together, by products of `torch_tiles`, set after set; a token's adapters are
added in the order of its set. The plain backend's banks are faster: they give all adapters of a step one product.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from loramux.kernels.lora.interface import Segment, Site
from loramux.kernels.lora.slots import Sets
from loramux.kernels.lora.torch_backend import TorchLoraBackend, TorchLoraPlan
from loramux.kernels.lora.torch_bank import SiteTensors

from .torch_tiles import TiledProducts


class SetStep:
    """One adapter set at one site: out[t] += sum_i w_i s_i B_i (A_i x[t]) for its tokens t, in float32."""

    def __init__(
        self,
        products: TiledProducts,
        site: Site,
        tokens: slice | Tensor,
        adapters: Sequence[tuple[int, float, SiteTensors]],
    ) -> None:
        """`adapters` are (place in the set, w_i, tensors) of those that have weights at the site."""
        self._products = products
        self._site = site
        self._tokens = tokens
        self._adapters = adapters

    def shrink(self, x: Tensor) -> list[Tensor]:
        """A_i x[t] per adapter, [tokens of the set, ranks of its slices]."""
        inputs = x[self._tokens].float()
        return [self._products(inputs, tensors.A.float()) for _, _, tensors in self._adapters]

    def expand(self, shrunk: Sequence[Tensor], out: Tensor, gates: Tensor | None) -> None:
        """Adds the rest of the term to out; gates[t, i] multiplies w_i."""
        total = out[self._tokens].float()
        for h, (place, weight, tensors) in zip(shrunk, self._adapters, strict=True):
            rank = 0
            for part, B in sorted(tensors.B.items()):
                scaled = h[:, rank : rank + len(B)] * (tensors.scales[part] * weight)
                rank += len(B)
                if gates is not None:
                    scaled = scaled * gates[self._tokens, place : place + 1]
                column = sum(s.out_features for s in self._site.slices[:part])
                total[:, column : column + B.shape[1]] += self._products(scaled, B.float().t())
        out[self._tokens] = total.to(out.dtype)


class InvariantTorchLoraBackend(TorchLoraBackend):
    """`TorchLoraBackend` without banks: the same slots, budget and plans, other products."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `TorchLoraBackend`. Raises ValueError for a device that is not the CPU."""
        super().__init__(*args, **kwargs)
        if self.device.type != "cpu":
            raise ValueError(f"products of torch do not have the same bits in any batch on {self.device}")
        self._products = TiledProducts()

    def _build(self, segments: Sequence[Segment], num_tokens: int) -> TorchLoraPlan:
        plan = TorchLoraPlan(num_tokens, Sets.of(segments))
        plan.slots = frozenset(slot for segment in segments for slot, _ in segment.adapters)
        ranges: dict[tuple[tuple[int, float], ...], list[tuple[int, int]]] = {}
        for segment in segments:
            ranges.setdefault(segment.adapters, []).append((segment.start, segment.end))
        steps = cast(dict[int, list[SetStep]], plan.steps)
        for adapters, places in ranges.items():
            tokens: slice | Tensor = slice(*places[0])
            if len(places) > 1:
                tokens = torch.cat([torch.arange(start, end) for start, end in places])
            by_site: dict[int, list[tuple[int, float, SiteTensors]]] = {}
            for place, (slot, weight) in enumerate(adapters):
                for number, tensors in self._adapter(slot).sites.items():
                    by_site.setdefault(number, []).append((place, weight, tensors))
            for number, used in by_site.items():
                steps.setdefault(number, []).append(SetStep(self._products, self.sites[number], tokens, used))
        self._add_scalings(plan, segments)
        return plan
