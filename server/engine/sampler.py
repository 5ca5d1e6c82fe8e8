"""Choosing the next token of every sequence of the step at once, without waiting for the device.

The noise is counted, not drawn: one uniform number per (seed, position), turned into a token by inverting the
cumulative distribution. A seeded request therefore repeats whatever the batch or a preemption did.
"""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.server.engine.protocol import SamplingParams
from loramux.server.engine.staging import Staging

TOP_K_WIDTH = 1024
INVALID_TOKEN = -1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Seeds = npt.NDArray[np.uint64]
Thresholds = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """The settings of n rows: `seeds` [n], and `numbers` [4, n], which are temperature, top_k, top_p and min_p.

    A temperature of 0 says that the row is greedy.
    """

    seeds: Seeds
    numbers: Floats

    @staticmethod
    def zeros(rows: int) -> "SamplingColumns":
        """Greedy rows, to be overwritten."""
        return SamplingColumns(np.zeros(rows, dtype=np.uint64), np.zeros((4, rows)))

    @staticmethod
    def of(params: Seq[SamplingParams]) -> "SamplingColumns":
        """One row for each."""
        columns = SamplingColumns.zeros(len(params))
        for row, one in enumerate(params):
            columns.put(row, one)
        return columns

    def put(self, row: int, params: SamplingParams) -> None:
        """Overwrites a row."""
        self.seeds[row] = params.seed & 0xFFFFFFFFFFFFFFFF
        temperature = 0.0 if params.is_greedy else params.temperature
        self.numbers[:, row] = temperature, params.top_k, params.top_p, params.min_p

    def take(self, rows: Ints) -> "SamplingColumns":
        """Copies of the rows."""
        return SamplingColumns(self.seeds[rows], self.numbers[:, rows])

    def join(self, other: "SamplingColumns") -> "SamplingColumns":
        """These rows, then the other ones."""
        return SamplingColumns(
            np.concatenate([self.seeds, other.seeds]), np.concatenate([self.numbers, other.numbers], axis=1)
        )


def _mix(x: Seeds) -> Seeds:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers that scrambles all bits."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def uniform(seeds: Seeds, positions: Ints) -> Floats:
    """Numbers in [0, 1), each a function of its (seed, position) alone, with 53 random bits."""
    place = positions.astype(np.uint64) + np.uint64(1)
    state = _mix(_mix(seeds + _GOLDEN) + place * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def best(logits: Tensor) -> Tensor:
    """argmax of each row, int64 [rows]; -1 for a row whose logits hold NaN or have no finite maximum."""
    top, tokens = logits.max(dim=-1)
    return torch.where(_is_finite(top), tokens, INVALID_TOKEN)


def _is_finite(top: Tensor) -> Tensor:
    """Whether each is neither NaN nor infinite, in two launches instead of `torch.isfinite`'s four."""
    return top.abs() < math.inf


def sample(
    logits: Tensor,
    settings: SamplingColumns,
    positions: Ints,
    banned: Mapping[int, tuple[int, ...]],
    staging: Staging,
    thresholds: Thresholds | None = None,
) -> Tensor:
    """The next token of each row, int64 [rows] on the logits' device.

    logits [rows, vocab], any float dtype; `positions[i]` is the index in its sequence of the token to be chosen;
    tokens in `banned[i]`, where row i has any, are impossible. Row i is argmax(logits_i) when its temperature is 0,
    else a draw from softmax(logits_i / temperature) restricted by top_k, then top_p, then min_p; tokens as likely as
    the last one that is kept are kept too. -1 for a row whose logits hold NaN or have no finite maximum: the caller
    fails that request alone. `thresholds` is `sorted_thresholds` on a CPU and `bisected_thresholds` elsewhere unless
    it is given.
    """
    logits = logits.float()
    bans = [(i, t) for i, ids in banned.items() for t in ids if t < logits.shape[1]]
    if bans:
        places = np.array(bans, dtype=np.int64)
        rows, columns = staging.upload(places[:, 0].copy(), places[:, 1].copy())
        logits = logits.index_put((rows, columns), logits.new_full((), float("-inf")))
    top, tokens = logits.max(dim=-1)
    drawn = np.flatnonzero(settings.numbers[0])
    if len(drawn):
        if thresholds is None:
            thresholds = sorted_thresholds if logits.device.type == "cpu" else bisected_thresholds
        chosen = settings.take(drawn)
        uniforms = uniform(chosen.seeds, positions[drawn])
        index, numbers = staging.upload(drawn, np.concatenate([uniforms, chosen.numbers.reshape(-1)]))
        everyone = len(drawn) == len(positions)
        picked = _draw(logits if everyone else logits.index_select(0, index), numbers.view(5, -1, 1), chosen.numbers,
                       thresholds)  # fmt: skip
        tokens = picked if everyone else tokens.index_copy(0, index, picked)
    return torch.where(_is_finite(top), tokens, INVALID_TOKEN)


def _draw(logits: Tensor, numbers: Tensor, settings: Floats, thresholds: Thresholds) -> Tensor:
    """Inverse-CDF draws in vocabulary order: the first token whose cumulative mass exceeds u times the total.

    logits [rows, vocab] float32; numbers [5, rows, 1] float64: u, then what the host has as `settings` [4, rows]:
    temperature, top_k, top_p, min_p. A row's token depends on the row alone.
    """
    u, temperature, top_k, top_p, min_p = numbers
    scaled = logits / temperature.float()
    filtered = bool((settings[1] > 0).any() or (settings[2] < 1).any())
    lowest = thresholds(scaled, top_k, top_p) if filtered else None
    probs = torch.softmax(scaled.double(), dim=-1)
    if lowest is not None:
        probs = probs * (scaled >= lowest)
    if (settings[3] > 0).any():
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[1] - 1).squeeze(1)


def sorted_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest logit [rows, 1] that top_k, then top_p keep, by sorting; top_k 0 and top_p 1 keep everything.

    scaled [rows, vocab] float32, top_k and top_p [rows, 1]. The `TOP_K_WIDTH` best tokens decide where they can.
    """
    rows, vocab = scaled.shape
    lowest = torch.full((rows, 1), float("-inf"), dtype=scaled.dtype, device=scaled.device)
    width = min(TOP_K_WIDTH, vocab)
    best = torch.topk(scaled, width, dim=-1).values
    whole = torch.logsumexp(scaled.double(), -1, keepdim=True)
    share = (torch.logsumexp(best.double(), -1, keepdim=True) - whole).exp()
    wanted = (top_k > 0) | (top_p < 1)
    enough = ((top_k > 0) & (top_k <= width)) | ((top_k <= 0) & (share > top_p + 1e-3)) | (width == vocab)
    for few in (True, False):
        index = (wanted & (enough == few)).squeeze(1).nonzero().squeeze(1)
        if not len(index):
            continue
        values = best[index] if few else scaled[index].sort(dim=-1, descending=True).values
        k = torch.where(top_k[index] > 0, top_k[index], float(vocab))
        kept = values.masked_fill(torch.arange(values.shape[1], device=values.device) >= k, float("-inf")).double()
        total = torch.where(k < vocab, torch.logsumexp(kept, -1, keepdim=True), whole[index])
        probs = (kept - total).exp()
        keep = (probs.cumsum(-1) - probs < top_p[index]) & torch.isfinite(kept)
        keep[:, 0] = True
        lowest[index] = values.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
    return lowest


def _keys(values: Tensor) -> Tensor:
    """int32 keys that order float32 values as the values do (NaN aside)."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def bisected_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """What `sorted_thresholds` gives, without sorting and without waiting for the device.

    The keys of float32 values are integers, so 32 halvings find the highest key with at least top_k tokens at or above
    it, and 32 more the highest one whose tokens hold top_p of what is left.
    """
    rows = scaled.shape[0]
    keys = _keys(scaled)
    low, high = keys.amin(-1, keepdim=True).long(), keys.amax(-1, keepdim=True).long()
    k = torch.where(top_k > 0, top_k, torch.zeros_like(top_k))
    first = _highest(low, high, lambda key: (keys >= key).sum(-1, keepdim=True) >= k)
    first = torch.where(top_k > 0, first, low)
    weights = torch.softmax(scaled, dim=-1) * (keys >= first)

    def held(key: Tensor) -> Tensor:
        return (weights * (keys >= key)).sum(-1, keepdim=True, dtype=torch.float64)

    goal = top_p * held(first)
    second = _highest(first, high, lambda key: held(key) >= goal)
    second = torch.where(top_p < 1, second, first)
    filtered = (top_k > 0) | (top_p < 1)
    lowest = torch.where(keys >= second, scaled, float("inf")).amin(-1, keepdim=True)
    return torch.where(filtered, lowest, torch.full((rows, 1), float("-inf"), device=scaled.device))


def _highest(low: Tensor, high: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The highest integer in [low, high] for which the falling predicate holds; it holds for low."""
    for _ in range(33):
        middle = (low + high + 1).div(2, rounding_mode="floor")
        found = holds(middle)
        low, high = torch.where(found, middle, low), torch.where(found, high, middle - 1)
    return low
