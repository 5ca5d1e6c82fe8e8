"""Each tenant's share of the server: how much of it may be under way at once, and how many tokens a minute it may use.

All numbers change on the event loop's thread and each check changes them in the same step, so that concurrent requests
cannot pass one check together. Two answers say "too much": 429 here, for a tenant over its share, and 503 for the
server as a whole (the engine's queue is full).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from loramux.server.api.caller import Caller
from loramux.server.api.errors import APIError, bad_request

BUSY_RETRY_SECONDS = 1
UNSAID_TOKENS = 256  # held back for an answer whose length the client leaves open
MINUTE = 60.0


def over_share(message: str, kind: str, retry_after: float, headers: dict[str, str]) -> APIError:
    """The 429 of one tenant: its `Retry-After` is in whole seconds, at least one."""
    wait = {"retry-after": str(max(1, math.ceil(retry_after)))}
    return APIError(429, message, type=kind, code="rate_limit_exceeded", headers={**headers, **wait})


class TokenBucket:
    """Tokens that may be used now: at most `limit`, refilled at limit / 60 a second.

    More may be taken than there is, when an answer grows longer than what was held back for it: that debt is waited
    for before anything else is let in.
    """

    def __init__(self, limit: int, now: float) -> None:
        self._limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, limit: int, now: float) -> float:
        """Tokens that are there at `now` (`time.monotonic`), under the limit as it is by now."""
        self._level += (now - self._at) * self._limit / MINUTE + max(0, limit - self._limit)
        self._level = min(self._level, float(limit))
        self._limit, self._at = limit, now
        return self._level

    def take(self, tokens: float) -> None:
        """Takes tokens, or gives back with a negative number."""
        self._level = min(self._level - tokens, float(self._limit))

    def seconds_to(self, tokens: float) -> float:
        """How long until the level is `tokens`."""
        return max(0.0, (tokens - self._level) * MINUTE / self._limit) if self._limit else MINUTE


@dataclass(slots=True)
class Use:
    """What one tenant has under way: sequences (and uploads), and its tokens, where it has a limit of them."""

    sequences: int = 0
    bucket: TokenBucket | None = None


class TenantGate:
    """Who has how much under way. `bound` is the number of sequences that the server takes in at once, None while
    that is not known.

    Where there are several tenants, one that has something under way may add to it while it has no more than what is
    left free (the dynamic threshold of Choudhury and Hahne, 1998, with alpha 1): alone it may fill half of the queue,
    n that ask for all of it get 1 / (n + 1) each, and there is always room for one more.
    """

    def __init__(self, bound: Callable[[], int | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound = bound
        self._clock = clock
        self._uses: dict[str, Use] = {}
        self._sequences = 0

    def admit(self, caller: Caller) -> "Admission":
        """One request's admission, to be entered."""
        return Admission(self, caller)

    def of(self, tenant: str) -> Use:
        """What a tenant has under way."""
        return self._uses.get(tenant) or Use()

    def _open(self, tenant: str) -> Use:
        return self._uses.setdefault(tenant, Use())

    def add(self, caller: Caller, sequences: int) -> None:
        """Counts sequences of a caller's. Raises a 429, and counts none, where they go beyond its share."""
        if sequences < 1:
            return
        use = self._open(caller.tenant)
        limit, bound = caller.limits.requests, self._bound()
        if limit is not None and use.sequences + sequences > limit:
            raise over_share(
                f"You have {use.sequences} requests under way; your limit is {limit}.", "requests", BUSY_RETRY_SECONDS,
                {},
            )  # fmt: skip
        if not caller.is_alone and bound is not None and use.sequences:
            free = bound - self._sequences
            if use.sequences + sequences > free:
                raise over_share(
                    f"The server is busy and you have {use.sequences} requests under way, which is your share.",
                    "requests", BUSY_RETRY_SECONDS, {},
                )  # fmt: skip
        use.sequences += sequences
        self._sequences += sequences

    def remove(self, tenant: str, sequences: int) -> None:
        """The sequences have ended."""
        self._open(tenant).sequences -= sequences
        self._sequences -= sequences

    def bucket(self, caller: Caller) -> TokenBucket | None:
        """The caller's tokens, None where it has no limit of them. What it has is kept while it has one."""
        use, limit = self._open(caller.tenant), caller.limits.tokens_per_minute
        if limit is None:
            use.bucket = None
        elif use.bucket is None:
            use.bucket = TokenBucket(limit, self._clock())
        return use.bucket

    def tokens_left(self, tenant: str, limit: int | None) -> float | None:
        """What a tenant may use right now under its limit, None without one."""
        bucket = self.of(tenant).bucket
        if limit is None:
            return None
        return float(limit) if bucket is None else bucket.level(limit, self._clock())

    def now(self) -> float:
        """The gate's clock, in seconds."""
        return self._clock()


@dataclass(slots=True)
class _Held:
    """Tokens of one sequence: held back, and used so far."""

    held: float
    used: float = 0.0


@dataclass(slots=True)
class Admission:
    """One request's share of what its tenant may use, from when it arrives to when its answer has ended.

    Entering it counts the request; `reserve` counts its sequences and their tokens; leaving it gives back what was
    not used. Entering and reserving raise a 429 for what goes beyond the tenant's share.
    """

    gate: TenantGate
    caller: Caller
    _sequences: int = 0
    _held: list[_Held] = field(default_factory=list)

    def __enter__(self) -> "Admission":
        self._count(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.remove(self.caller.tenant, self._sequences)
        self._sequences = 0
        bucket = self.gate.bucket(self.caller)
        if bucket is not None:
            bucket.take(sum(min(0.0, item.used - item.held) for item in self._held))
        self._held.clear()

    def _count(self, sequences: int) -> None:
        self.gate.add(self.caller, sequences)
        self._sequences += sequences

    def reserve(self, prompts: Sequence[int], answers: Sequence[int | None]) -> None:
        """Counts a request's sequences, and takes the tokens of their prompts and of their answers.

        `answers` are the longest answers that the client asked for. For None, the rest of the context,
        `UNSAID_TOKENS` are held back, and what goes beyond is taken as it comes. Raises a 400 for more sequences than
        the tenant may ever have, a 429 for more than it may have now, or for more tokens.
        """
        limit = self.caller.limits.requests
        if limit is not None and len(prompts) > limit:
            raise bad_request(
                f"This request asks for {len(prompts)} answers at once; your limit is {limit}.", None, "limit_exceeded"
            )
        self._count(len(prompts) - self._sequences)
        per_minute, bucket = self.caller.limits.tokens_per_minute, self.gate.bucket(self.caller)
        held = [p + (UNSAID_TOKENS if a is None else a) for p, a in zip(prompts, answers, strict=True)]
        if bucket is not None and per_minute is not None:
            wanted = sum(held)
            needed = min(wanted, per_minute)  # one that asks for more than a minute's waits for a full bucket
            level = bucket.level(per_minute, self.gate.now())
            if level < needed:
                raise over_share(
                    f"This request needs {wanted} tokens; your limit is {per_minute} per minute, of which "
                    f"{max(0, math.floor(level))} are left.", "tokens", bucket.seconds_to(needed), self.headers,
                )  # fmt: skip
            bucket.take(wanted)
        self._held = [_Held(float(tokens)) for tokens in held]

    def used(self, index: int, tokens: int) -> None:
        """One sequence has used so many tokens by now, its prompt's included. Beyond what was held back they are taken
        at once."""
        if index >= len(self._held):
            return
        item = self._held[index]
        more = max(0.0, tokens - max(item.used, item.held))
        item.used = float(tokens)
        if more:
            bucket = self.gate.bucket(self.caller)
            if bucket is not None:
                bucket.take(more)

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*-tokens` as OpenAI names them, where there is such a limit: what is left now, and when all of
        it will be there again."""
        limit, bucket = self.caller.limits.tokens_per_minute, self.gate.bucket(self.caller)
        if bucket is None or limit is None:
            return {}
        level = bucket.level(limit, self.gate.now())
        return {
            "x-ratelimit-limit-tokens": str(limit),
            "x-ratelimit-remaining-tokens": str(max(0, math.floor(level))),
            "x-ratelimit-reset-tokens": f"{bucket.seconds_to(limit):.3f}s",
        }
