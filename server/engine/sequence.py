"""One request on its way through the engine: its tokens, its spans of adapter sets, its cache blocks."""

import struct
from dataclasses import dataclass, field

from loramux.server.engine.protocol import AdapterRef, EngineRequest


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

    `tokens` is prompt and output; `num_computed` of them have their keys and values in `blocks`. A sequence is
    decoding when all tokens but the last are computed. `slots` maps a digest to its device slot while the sequence
    holds its adapters, and is None while it waits. The first `num_registered` blocks are findable by the hashes in
    `block_hashes` (which are kept when blocks are given back). `spans` is never empty and starts at token 0.
    `scheduled_at` (seconds, `time.monotonic()`) is when its first tokens were first scheduled.
    """

    request: EngineRequest
    tokens: list[int]
    prompt_len: int
    spans: list[Span]
    num_computed: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    slots: dict[str, int] | None = None
    scheduled_at: float | None = None

    @classmethod
    def from_request(cls, request: EngineRequest) -> "Sequence":
        """A fresh sequence with one span over everything."""
        adapters = canonical_set(request.adapters)
        return cls(
            request=request,
            tokens=list(request.prompt_token_ids),
            prompt_len=len(request.prompt_token_ids),
            spans=[Span(0, adapters, set_key(adapters))],
        )

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

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
        pieces = []
        for i, span in enumerate(self.spans):
            stop = self.spans[i + 1].start if i + 1 < len(self.spans) else end
            low, high = max(start, span.start), min(end, stop)
            if low < high:
                pieces.append((low, high, span))
        return pieces
