"""One request on its way through the engine: its tokens, its spans of adapter sets, its cache blocks."""

import struct
from array import array
from dataclasses import dataclass, field

from torch import Tensor

from loramux.server.engine.protocol import AdapterRef, EngineRequest

PENDING = -1
"""Stands in `Sequence.tokens` for a token that the device has chosen and the host has not seen yet."""


def set_key(adapters: tuple[AdapterRef, ...]) -> bytes:
    """The identity of an adapter set: its sorted digests with weights; empty for the base model."""
    return b"".join(a.digest.encode() + struct.pack("<d", a.weight) for a in adapters)


def canonical_set(adapters: tuple[AdapterRef, ...]) -> tuple[AdapterRef, ...]:
    """The set in its one order (by digest), so that the order in which a client names adapters is irrelevant."""
    return tuple(sorted(adapters, key=lambda a: (a.digest, a.weight)))


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens from `start` on (until the next span's start) are computed with this adapter set."""

    start: int
    adapters: tuple[AdapterRef, ...]
    key: bytes


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    `tokens` is prompt and output; `num_computed` of them have their keys and values in `blocks` (or will have when the
    steps that were launched have run). A sequence is decoding when all tokens but the last are computed; that last one
    may be `PENDING`, no other is. `limit` is the length at which generation ends; `pools` says that the request wants
    hidden states instead, `is_plain` that its tokens are the best ones from the first on. `slots` maps a digest to its
    device slot while the sequence holds its adapters, and is None while it waits. The first `num_registered` blocks are
    findable by the hashes in `block_hashes` (which are kept when blocks are given back). `spans` is never empty and
    starts at token 0. `pooled` float32, on the device, is what a pooling request has so far: the sum of its hidden
    states [layers, hidden], or the last of them [layers, tokens, hidden]. `scheduled_at` (seconds, `time.monotonic()`)
    is when its first tokens were first scheduled. `has_ended`: what is still under way for it counts for nothing.
    """

    request: EngineRequest
    tokens: list[int]
    prompt_len: int
    limit: int
    pools: bool
    is_plain: bool
    spans: list[Span]
    num_computed: int = 0
    cached_tokens: int = 0
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    slots: dict[str, int] | None = None
    pooled: Tensor | None = None
    scheduled_at: float | None = None
    has_ended: bool = False

    @classmethod
    def from_request(cls, request: EngineRequest) -> "Sequence":
        """A fresh sequence with one span over everything."""
        adapters = canonical_set(request.adapters)
        return cls(
            request=request,
            tokens=list(request.prompt_token_ids),
            prompt_len=len(request.prompt_token_ids),
            limit=len(request.prompt_token_ids) + request.sampling.max_tokens,
            pools=request.pooling is not None,
            is_plain=request.sampling.is_greedy and request.sampling.min_tokens <= 0,
            spans=[Span(0, adapters, set_key(adapters))],
        )

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_output(self) -> int:
        """Tokens generated so far, the pending one included."""
        return len(self.tokens) - self.prompt_len

    @property
    def is_full(self) -> bool:
        """Whether `max_tokens` are generated, the pending one included: nothing is left to compute."""
        return len(self.tokens) >= self.limit

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def current_span(self) -> Span:
        """The span that new tokens belong to."""
        return self.spans[-1]

    @property
    def digests(self) -> tuple[str, ...]:
        """The distinct adapters of all spans that may still have to be computed, in first-use order."""
        seen = dict.fromkeys(a.digest for span in self.spans for a in span.adapters)
        return tuple(seen)

    def switch(self, adapters: tuple[AdapterRef, ...]) -> None:
        """Tokens from here on use another set; what is in the cache stays as it was computed."""
        adapters = canonical_set(adapters)
        key = set_key(adapters)
        if key == self.current_span.key:
            return
        span = Span(len(self.tokens), adapters, key)
        if self.current_span.start == span.start:
            self.spans[-1] = span
        else:
            self.spans.append(span)

    def spans_between(self, start: int, end: int) -> list[tuple[int, int, Span]]:
        """The pieces of tokens [start, end) by span, in order, as (start, end, span)."""
        if len(self.spans) == 1:
            return [(start, end, self.spans[0])] if start < end else []
        pieces = []
        for i, span in enumerate(self.spans):
            stop = self.spans[i + 1].start if i + 1 < len(self.spans) else end
            low, high = max(start, span.start), min(end, stop)
            if low < high:
                pieces.append((low, high, span))
        return pieces
