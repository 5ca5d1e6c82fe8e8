"""Choosing the next token of every sequence of the step at once, without waiting for the device.

The noise is counted, not drawn: one uniform number per (seed, position), turned into a token by inverting the
cumulative distribution. A seeded request therefore repeats whatever the batch or a preemption did.
"""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

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
    fails that request alone. `thresholds` is `sorted_thresholds` on a CPU and `triton_thresholds` elsewhere unless
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
        chosen = settings.take(drawn)
        uniforms = uniform(chosen.seeds, positions[drawn])
        index, numbers = staging.upload(drawn, np.concatenate([uniforms, chosen.numbers.reshape(-1)]))
        everyone = len(drawn) == len(positions)
        picked = _draw(logits if everyone else logits.index_select(0, index), numbers.view(5, -1, 1), chosen.numbers,
                       thresholds or _thresholds(logits.device, chosen.numbers))  # fmt: skip
        tokens = picked if everyone else tokens.index_copy(0, index, picked)
    return torch.where(_is_finite(top), tokens, INVALID_TOKEN)


def warm_up(device: torch.device, vocab: int) -> None:
    """Compiles what drawing on the device needs, so that no request waits for it; nothing on a CPU."""
    if device.type == "cpu":
        return
    staging = Staging(device)
    for top_k, top_p in ((1, 1.0), (0, 0.5), (1, 0.5)):
        settings = SamplingColumns.of([SamplingParams(1, top_k=top_k, top_p=top_p)])
        sample(torch.zeros(1, vocab, device=device), settings, np.zeros(1, dtype=np.int64), {}, staging)


def _thresholds(device: torch.device, settings: Floats) -> Thresholds:
    """The way to find thresholds on the device, for rows of these `settings` [4, rows] as `_draw` has them."""
    if device.type == "cpu":
        return sorted_thresholds
    from loramux.kernels.sampling.thresholds import triton_thresholds  # a CPU needs no triton

    return partial(triton_thresholds, has_k=bool((settings[1] > 0).any()), has_p=bool((settings[2] < 1).any()))


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
        before = probs.cumsum(-1) - probs
        keep = ((before < top_p[index]) | (top_p[index] >= 1)) & torch.isfinite(kept)  # rounded sums pass 1 early
        keep[:, 0] = True
        lowest[index] = values.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
    return lowest
