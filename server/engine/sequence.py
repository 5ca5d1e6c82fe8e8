"""One request on its way through the engine: its tokens, its spans of adapter sets, its cache blocks."""

import struct
from array import array
from dataclasses import dataclass, field

from torch import Tensor

from loramux.server.engine.grammars import Matcher
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
    """Tokens from `start` on (until the next span's start) are computed with this adapter set.

    `mark` stands for it in the hash of a block that it begins: see `mark_at`.
    """

    start: int
    adapters: tuple[AdapterRef, ...]
    key: bytes
    mark: bytes

    @staticmethod
    def of(start: int, adapters: tuple[AdapterRef, ...]) -> "Span":
        """The span of a canonical set."""
        key = set_key(adapters)
        return Span(start, adapters, key, struct.pack("<qq", 0, len(key)) + key)

    def mark_at(self, offset: int) -> bytes:
        """The offset in its block at which the set begins to hold, the length of its key, and the key."""
        return self.mark if offset == 0 else struct.pack("<qq", offset, len(self.key)) + self.key


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

    `generates` says that tokens are wanted, and not only what is known of the prompt. `scores_prompt`: so are the
    log-probabilities of the prompt's tokens, those after its first `num_scored` ones still; `prompt_scores` are the
    ones that nobody was told yet, as `EngineOutput` has them. `counts` is the sequence's row in `penalties.Penalties`.
    `matcher` follows the request's constraint, from the queue's end on: it has taken all tokens that the host has seen.
    `broken` says why it cannot go on.

    `source` is the number of the pending token among those that its step chooses. `row` is the sequence's row in the
    decode batch; while it has one, `tokens`, `num_computed` and `source` lag behind (see `batch.Batch`).
    """

    request: EngineRequest
    tokens: list[int]
    prompt_len: int
    limit: int
    pools: bool
    is_plain: bool
    spans: list[Span]
    generates: bool = True
    scores_prompt: bool = False
    num_computed: int = 0
    cached_tokens: int = 0
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    slots: dict[str, int] | None = None
    pooled: Tensor | None = None
    scheduled_at: float | None = None
    has_ended: bool = False
    source: int = 0
    row: int | None = None
    num_scored: int = 0
    prompt_scores: list[bytes] = field(default_factory=list)
    counts: int | None = None
    matcher: Matcher | None = None
    broken: str | None = None

    @classmethod
    def from_request(cls, request: EngineRequest) -> "Sequence":
        """A fresh sequence with one span over everything."""
        sampling, pools = request.sampling, request.pooling is not None
        return cls(
            request=request,
            tokens=list(request.prompt_token_ids),
            prompt_len=len(request.prompt_token_ids),
            limit=len(request.prompt_token_ids) + max(1, sampling.max_tokens),
            pools=pools,
            is_plain=sampling.is_greedy and sampling.min_tokens <= 0 and not sampling.is_adjusted,
            spans=[Span.of(0, canonical_set(request.adapters))],
            generates=not pools and sampling.max_tokens > 0,
            scores_prompt=not pools and sampling.prompt_logprobs is not None,
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
    def reusable(self) -> int:
        """How many tokens may be taken from the cache: all but the last, unless logits of the prompt are wanted."""
        if self.scores_prompt and self.num_scored < self.prompt_len - 1:
            return self.num_scored
        return len(self.tokens) - 1

    @property
    def free_at(self) -> int:
        """The position of the first token that may end the sequence."""
        return self.prompt_len + self.request.sampling.min_tokens

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
        """Tokens from here on use another set; what is in the cache stays as it was computed.

        Raises ValueError for a sequence in the decode batch, which it has to leave first: see `Scheduler.take_out`.
        """
        if self.row is not None:
            raise ValueError(f"request {self.request_id} is in the decode batch")
        span = Span.of(len(self.tokens), canonical_set(adapters))
        if span.key == self.current_span.key:
            return
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
