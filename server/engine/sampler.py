"""Choosing the next token of every sequence of the step at once.

The noise is counted, not drawn: one uniform number per (seed, position), turned into a token by inverting the
cumulative distribution. A seeded request therefore repeats whatever the batch or a preemption did.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from loramux.server.engine.protocol import SamplingParams

GREEDY_BELOW = 1e-5
TOP_K_WIDTH = 1024
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers that scrambles all bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone, with 53 random bits."""
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    return (_mix((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) / float(1 << 53)


def sample(logits: Tensor, params: Seq[SamplingParams], positions: Seq[int], banned: Seq[tuple[int, ...]]) -> list[int]:
    """The next token of each row.

    logits [rows, vocab], any float dtype; `positions[i]` is the index in its sequence of the token to be chosen;
    tokens in `banned[i]` are impossible. Row i is argmax(logits_i) when its temperature is 0, else a draw from
    softmax(logits_i / temperature) restricted by top_k, then top_p, then min_p. Returns -1 for a row whose logits
    hold NaN or have no finite maximum: the caller fails that request alone.
    """
    logits = logits.float()
    bans = [(i, t) for i, ids in enumerate(banned) for t in ids if t < logits.shape[1]]
    if bans:
        rows, cols = zip(*bans, strict=True)
        logits = logits.index_put(
            (torch.tensor(rows, device=logits.device), torch.tensor(cols, device=logits.device)),
            torch.tensor(float("-inf"), device=logits.device),
        )
    top, tokens = logits.max(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen = _draw(logits if len(drawn) == len(params) else logits[index],
                       [params[i] for i in drawn], [positions[i] for i in drawn])  # fmt: skip
        tokens = tokens.index_copy(0, index, chosen)
    tokens = torch.where(torch.isfinite(top), tokens, torch.full_like(tokens, -1))
    result: list[int] = tokens.tolist()
    return result


def _draw(logits: Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> Tensor:
    """Inverse-CDF draws: the first token whose cumulative mass exceeds u times the total.

    Rows are handled by what they ask for, never by what other rows ask for, so that a row's token depends on the row
    alone: without top_k and top_p in vocabulary order; with a small top_k over the `TOP_K_WIDTH` best; else sorted.
    """
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(params):
        if p.top_k <= 0 and p.top_p >= 1:
            groups.setdefault("plain", []).append(i)
        elif 0 < p.top_k <= TOP_K_WIDTH:
            groups.setdefault("top", []).append(i)
        else:
            groups.setdefault("sorted", []).append(i)
    out = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for kind, members in groups.items():
        index = torch.tensor(members, device=logits.device)
        out[index] = _draw_group(kind, logits[index], [params[i] for i in members], [positions[i] for i in members])
    return out


def _draw_group(kind: str, logits: Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> Tensor:
    """Draws for rows of one kind; logits [rows, vocab] float32."""
    device, vocab = logits.device, logits.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.float64).unsqueeze(1)

    logits = logits / column([p.temperature for p in params]).float()
    order: Tensor | None = None
    if kind == "top":
        logits, order = torch.topk(logits, min(TOP_K_WIDTH, vocab), dim=-1)
    elif kind == "sorted":
        logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if order is not None:
        limits = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=device).unsqueeze(1)
        logits = logits.masked_fill(torch.arange(logits.shape[1], device=device) >= limits, float("-inf"))
    probs = torch.softmax(logits.double(), dim=-1)
    if order is not None and any(p.top_p < 1 for p in params):
        keep = probs.cumsum(-1) - probs < column([p.top_p for p in params])
        keep[:, 0] = True
        probs = probs * keep
    if any(p.min_p > 0 for p in params):
        probs = probs * (probs >= column([p.min_p for p in params]) * probs.amax(-1, keepdim=True))
    mass = probs.cumsum(-1)
    u = column([uniform(p.seed, n) for p, n in zip(params, positions, strict=True)])
    at = torch.searchsorted(mass, u * mass[:, -1:], right=True)
    last = probs.shape[1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    at = torch.minimum(at, last)
    return (at if order is None else order.gather(1, at)).squeeze(1)
