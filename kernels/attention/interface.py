"""The one interface between the engine and paged attention on a device, whatever carries it out.

For a query head h of token i of a sequence, with g = heads / kv_heads and j over the sequence's tokens:

    u[j]   = scaling * <q[i, h], k[j, h // g]>,  or softcap * tanh(that / softcap)
    j visible when j <= i and (window is None or j > i - window)
    out    = sum_j exp(u[j]) v[j, h // g] / (sum_j exp(u[j]) + exp(sinks[h]))     over visible j; no sinks, no last term

Keys and values live in blocks: a cache is [blocks, block_size, kv_heads, dim], and token j of a sequence lies in row
j % block_size of block table[j // block_size]. A slot is block * block_size + row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

MAX_HEAD_DIM = 256

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads and dims of a layer. `heads` is a multiple of `kv_heads`; dims are 1..256 and need not be equal."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that is not served."""
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly")
        for dim in (self.k_dim, self.v_dim):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise ValueError(f"head dim {dim} is not served; it must be 1..{MAX_HEAD_DIM}")

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """Bounds of a step: its tokens, its sequences, and the entries of all its sequences' block tables together."""

    max_tokens: int
    max_sequences: int
    max_table_entries: int


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step as host arrays. Sequence s has `query_lens[s]` consecutive tokens of the step, in order.

    `contexts[s]` counts its tokens up to and including its last query; `tables[s]` are its blocks, at least
    ceil(contexts[s] / block_size) of them (quickest as `array("i")`); `slots` [tokens] is where each token's key and
    value go. Sequences of one token that come first are decodes; no other sequence has a single token.
    """

    query_lens: Sequence[int] | Ints
    contexts: Sequence[int] | Ints
    tables: Sequence[Sequence[int] | Ints]
    slots: Sequence[int] | Ints


class AttentionPlan(Protocol):
    """What one step needs to know, built once on the host and used by every layer. Opaque to the engine."""

    @property
    def num_tokens(self) -> int:
        """Rows of q, key, value and out, padding included."""

    @property
    def num_decodes(self) -> int:
        """Leading rows that are one query each of as many sequences, padding included."""


class AttentionBackend(Protocol):
    """Paged attention over caches that the engine owns. One backend serves all layers of a model."""

    block_size: int

    @property
    def scratch_bytes(self) -> int:
        """Device bytes that the backend holds, whatever the steps are."""

    def plan(self, batch: AttentionBatch, *, decode_rows: int | None = None) -> AttentionPlan:
        """The step's plan, valid until the next call.

        With `decode_rows` the step has decodes only and is padded to that many rows, and the launches depend on
        nothing else: a graph captured over one such plan serves every later one with as many rows. Rows of the
        padding write nothing to the caches and have an output of zeros. Raises ValueError for a malformed batch and
        for passed limits.
        """

    def write(self, k: Tensor, v: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
        """k[slot of t] = key[t], v[slot of t] = value[t]. key and value are [tokens, kv_heads, dim]."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """q [tokens, heads, k_dim] against the caches k and v, after `write` -> [tokens, heads, v_dim] in q's dtype.

        `scaling` and `softcap` are positive; `sinks` [heads] are logits that only take weight.
        """
