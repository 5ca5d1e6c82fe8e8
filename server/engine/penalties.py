"""Penalties and biases: what changes a row's logits before its token is chosen, for the whole batch at once.

With l the model's logits, c_t how often token t was generated and s_t whether it was, or stands in the prompt:

    l_t := l_t + bias_t
    l_t := l_t / r if l_t > 0 else l_t * r     where s_t       (repetition; Keskar et al., "CTRL", 2019)
    l_t := l_t - frequency * c_t - presence * [c_t > 0]        (OpenAI's API reference)

c and s lie on the device and are brought up to date there by the chosen tokens, so that a step that is launched before
the host has seen the last one's tokens is right, and nothing waits.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.server.engine.sequence import Sequence
from loramux.server.engine.staging import Staging
from loramux.server.engine.step import Ints, Layout

_IN_PROMPT = 1 << 30
_FIRST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Adjusted:
    """The rows of a step's logits that are changed, on the device.

    `rows` int64 [n] are the penalised ones, `counts` int64 [n] their rows of the counts and `numbers` float32 [3, n, 1]
    their repetition, frequency and presence penalties. `biased` int64 and `tokens` int64 [m] name what `biases`
    float32 [m] is added to.
    """

    rows: Tensor
    counts: Tensor
    numbers: Tensor
    biased: Tensor
    tokens: Tensor
    biases: Tensor


class Penalties:
    """The counts of the sequences that have penalties, one row each from their first token to their end.

    A row is int32 [vocab]: how often the token was generated, plus 2**30 where the prompt has it. Rows are allocated
    when sequences need them, in powers of two, and kept through preemption, which changes no token.
    """

    def __init__(self, device: torch.device) -> None:
        """Allocates nothing yet."""
        self._device = device
        self._staging = Staging(device)
        self._counts: Tensor | None = None
        self._free: list[int] = []
        self._kept: tuple[Layout, Adjusted] | None = None

    def of(self, layout: Layout | None, others: Seq[Sequence], vocab: int) -> Adjusted:
        """The changed rows of a step: those of the layout, then the other sequences'. Kept while a layout recurs."""
        if layout is not None and not others and self._kept is not None and self._kept[0] is layout:
            return self._kept[1]
        made = self._make([*(() if layout is None else layout.seqs), *others], vocab)
        if layout is not None and not others:
            self._kept = layout, made
        return made

    def apply(self, logits: Tensor, adjusted: Adjusted) -> Tensor:
        """The changed logits, float32 [rows, vocab]; those given are left as they are."""
        logits = logits.float()
        if len(adjusted.biased):
            logits = logits.index_put((adjusted.biased, adjusted.tokens), adjusted.biases, accumulate=True)
        if not len(adjusted.rows) or self._counts is None:
            return logits
        repetition, frequency, presence = adjusted.numbers
        state = self._counts.index_select(0, adjusted.counts)
        counts = state & (_IN_PROMPT - 1)
        chosen = logits.index_select(0, adjusted.rows)
        repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(state > 0, repeated, chosen) - frequency * counts - presence * (counts > 0)
        return logits.index_copy(0, adjusted.rows, chosen)

    def count(self, adjusted: Adjusted, tokens: Tensor) -> None:
        """Counts the rows' new tokens, int64 [rows] on the device; -1, the end of a sequence, counts for nothing."""
        if len(adjusted.rows) and self._counts is not None:
            chosen = tokens.index_select(0, adjusted.rows)
            self._counts.index_put_(
                (adjusted.counts, chosen.clamp(min=0)), (chosen >= 0).to(torch.int32), accumulate=True
            )

    def release(self, seq: Sequence) -> None:
        """The sequence has ended; steps that are under way may still count for it, before the row's next user."""
        if seq.counts is not None:
            self._free.append(seq.counts)
            seq.counts = None

    def _make(self, seqs: Seq[Sequence], vocab: int) -> Adjusted:
        rows = [i for i, seq in enumerate(seqs) if seq.request.sampling.is_penalised]
        fresh = [seqs[i] for i in rows if seqs[i].counts is None]
        self._reserve(len(fresh), vocab)
        prompts: list[Ints] = []
        for seq in fresh:
            seq.counts = self._free.pop()
            ids = np.unique(np.asarray(seq.tokens[: seq.prompt_len], dtype=np.int64))
            prompts.append(ids[ids < vocab])
        penalties = [seqs[i].request.sampling for i in rows]
        biases = [(i, token, bias) for i, seq in enumerate(seqs) for token, bias in seq.request.sampling.logit_bias
                  if token < vocab]  # fmt: skip
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in penalties]
        index, counts, flat, biased, tokens, added, new, owners, seen = self._staging.upload(
            np.array(rows, dtype=np.int64),
            np.array([seqs[i].counts for i in rows], dtype=np.int64),
            np.array(numbers, dtype=np.float64).T.reshape(-1).copy(),
            np.array([i for i, _, _ in biases], dtype=np.int64),
            np.array([token for _, token, _ in biases], dtype=np.int64),
            np.array([bias for _, _, bias in biases], dtype=np.float64),
            np.array([seq.counts for seq in fresh], dtype=np.int64),
            np.repeat(np.array([seq.counts for seq in fresh], dtype=np.int64), [len(ids) for ids in prompts]),
            np.concatenate([np.zeros(0, dtype=np.int64), *prompts]),
        )
        if self._counts is not None and fresh:
            self._counts.index_fill_(0, new, 0)
            self._counts.index_put_((owners, seen), self._counts.new_full((), _IN_PROMPT))
        return Adjusted(index, counts, flat.float().view(3, -1, 1), biased, tokens, added.float())

    def _reserve(self, rows: int, vocab: int) -> None:
        """Makes sure that so many rows are free."""
        held = 0 if self._counts is None else len(self._counts)
        if rows <= len(self._free):
            return
        size = max(_FIRST_ROWS, 1 << (held + rows - len(self._free) - 1).bit_length())
        grown = torch.zeros(size, vocab, dtype=torch.int32, device=self._device)
        if self._counts is not None:
            grown[:held].copy_(self._counts)
        self._counts = grown
        self._free.extend(range(size - 1, held - 1, -1))
