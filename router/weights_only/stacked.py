"""The same scores for many adapters and prompts at once, on the device where the hidden states are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.router.weights_only.scorer import WeightsScorer

_MAX_PRODUCT = 1 << 24  # elements of one product [tokens, adapters * rows]


@dataclass(frozen=True, slots=True)
class _Stack:
    """One module: F of every candidate [adapters, rows, in], zero rows where it has fewer, and its calibration."""

    factors: Tensor
    length: Tensor
    centre: Tensor
    spread: Tensor  # nan: by the inputs' own size
    present: Tensor  # bool [adapters]


@dataclass(frozen=True, slots=True, eq=False)
class StackedScorer:
    """`WeightsScorer.score` as one product per module: float32 [prompts, candidates]; see `stack`."""

    candidates: tuple[str, ...]
    stacks: Mapping[str, _Stack]

    @classmethod
    def stack(
        cls, scorer: WeightsScorer, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "StackedScorer":
        """Copies the factors to `device` in `dtype`; adapters * modules * rows * in elements."""
        candidates = scorer.candidates
        stacks: dict[str, _Stack] = {}
        for module in scorer.modules:
            found = [scorer.factors[key].get(module) for key in candidates]
            shapes = [f.rows.shape for f in found if f is not None]
            if not shapes:
                continue
            factors = torch.zeros(len(found), max(s[0] for s in shapes), shapes[0][1])
            for place, factor in zip(factors, found, strict=True):
                if factor is not None:
                    place[: len(factor.rows)] = torch.from_numpy(factor.rows)
            numbers = torch.tensor(
                [(f.length, f.centre, f.spread) if f is not None else (1.0, 0.0, 1.0) for f in found],
                dtype=torch.float32,
                device=device,
            )
            present = torch.tensor([f is not None for f in found], device=device)
            length, centre, spread = numbers.unbind(1)
            stacks[module] = _Stack(factors.to(device, dtype), length, centre, spread, present)
        return cls(candidates, stacks)

    def score(self, features: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        """float32 [prompts, candidates]; features: module -> [sum of lengths, in], prompt after prompt.

        -inf where no module of the candidate is in `features`. ValueError if the tokens do not add up or a prompt is
        empty.
        """
        if not all(n > 0 for n in lengths):
            raise ValueError("every prompt must have at least one token")
        device = next((s.factors.device for s in self.stacks.values()), torch.device("cpu"))
        total = torch.zeros(len(lengths), len(self.candidates), device=device)
        count = torch.zeros(len(self.candidates), device=device)
        prompt_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        for module, stack in self.stacks.items():
            if module not in features:
                continue
            x = features[module]
            if len(x) != sum(lengths):
                raise ValueError(f"{module}: {len(x)} tokens for prompts of {sum(lengths)} together")
            total += torch.where(stack.present, _module_scores(stack, x, prompt_of, len(lengths)), 0)
            count += stack.present
        return torch.where(count > 0, total / count.clamp(min=1), -math.inf)


def _module_scores(stack: _Stack, x: Tensor, prompt_of: Tensor, prompts: int) -> Tensor:
    adapters, rows, width = stack.factors.shape
    x = x.to(stack.factors.dtype)
    step = max(1, _MAX_PRODUCT // max(len(x) * rows, 1))
    squares = torch.empty(prompts, adapters, device=x.device)
    for start in range(0, adapters, step):
        part = stack.factors[start : start + step]
        response = (x @ part.reshape(-1, width).T).float().view(len(x), -1, rows).square().sum(-1)
        squares[:, start : start + step] = _mean_by_prompt(response, prompt_of, prompts)
    size = _mean_by_prompt(x.float().square().sum(-1, keepdim=True), prompt_of, prompts)
    isotropic = stack.length * (size / width).sqrt()
    spread = torch.where(stack.spread.isnan(), isotropic, stack.spread)
    return torch.where(spread > 0, (squares.sqrt() - stack.centre) / spread.clamp(min=1e-30), 0)


def _mean_by_prompt(values: Tensor, prompt_of: Tensor, prompts: int) -> Tensor:
    """[prompts, n] means of [tokens, n] over each prompt's tokens."""
    sums = torch.zeros(prompts, values.shape[1], device=values.device).index_add_(0, prompt_of, values)
    return sums / torch.bincount(prompt_of, minlength=prompts)[:, None]
