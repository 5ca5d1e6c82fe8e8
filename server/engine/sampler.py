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
    alone: without top_k and top_p in vocabulary order; over the `TOP_K_WIDTH` best tokens where top_k is small or those
    hold the row's top_p; else over the sorted vocabulary.
    """
    nucleus = [i for i, p in enumerate(params) if p.top_k <= 0 and p.top_p < 1]
    short = dict(zip(nucleus, _reaches(logits, params, nucleus), strict=True))
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(params):
        if p.top_k <= 0 and p.top_p >= 1:
            kind = "plain"
        else:
            kind = "best" if 0 < p.top_k <= TOP_K_WIDTH or short.get(i, False) else "sorted"
        groups.setdefault(kind, []).append(i)
    out = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for kind, members in groups.items():
        index = torch.tensor(members, device=logits.device)
        out[index] = _draw_group(kind, logits[index], [params[i] for i in members], [positions[i] for i in members])
    return out


def _column(values: Seq[float], like: Tensor) -> Tensor:
    """The numbers as [rows, 1] float64."""
    return torch.tensor(values, device=like.device, dtype=torch.float64).unsqueeze(1)


def _reaches(logits: Tensor, params: Seq[SamplingParams], rows: Seq[int]) -> list[bool]:
    """For each of the rows whether its `TOP_K_WIDTH` best tokens surely hold its top_p: the rest need no sorting."""
    if not rows or logits.shape[1] <= TOP_K_WIDTH:
        return [True] * len(rows)
    chosen = [params[i] for i in rows]
    scaled = logits[torch.tensor(rows, device=logits.device)]
    scaled = scaled / _column([p.temperature for p in chosen], logits).float()
    best = torch.topk(scaled, TOP_K_WIDTH, dim=-1).values
    share = (torch.logsumexp(best, -1, keepdim=True) - torch.logsumexp(scaled, -1, keepdim=True)).exp()
    enough: list[bool] = (share > _column([p.top_p for p in chosen], logits) + 1e-3).squeeze(1).tolist()
    return enough


def _draw_group(kind: str, logits: Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> Tensor:
    """Draws for rows of one kind; logits [rows, vocab] float32."""
    device, vocab = logits.device, logits.shape[1]
    logits = logits / _column([p.temperature for p in params], logits).float()
    whole = torch.logsumexp(logits, -1, keepdim=True).double()
    order: Tensor | None = None
    if kind == "best":
        logits, order = torch.topk(logits, min(TOP_K_WIDTH, vocab), dim=-1)
    elif kind == "sorted":
        logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if order is None:
        probs = torch.softmax(logits.double(), dim=-1)
    else:
        limits = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=device).unsqueeze(1)
        kept = logits.masked_fill(torch.arange(logits.shape[1], device=device) >= limits, float("-inf")).double()
        total = torch.where(limits < vocab, torch.logsumexp(kept, -1, keepdim=True), whole)
        probs = (kept - total).exp()
        keep = probs.cumsum(-1) - probs < _column([p.top_p for p in params], logits)
        keep[:, 0] = True
        probs = probs * keep
    if any(p.min_p > 0 for p in params):
        probs = probs * (probs >= _column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True))
    mass = probs.cumsum(-1)
    u = _column([uniform(p.seed, n) for p, n in zip(params, positions, strict=True)], logits)
    target = torch.minimum(u * mass[:, -1:], torch.nextafter(mass[:, -1:], torch.zeros_like(mass[:, -1:])))
    at = torch.searchsorted(mass, target, right=True).clamp_(max=probs.shape[1] - 1)
    return (at if order is None else order.gather(1, at)).squeeze(1)
