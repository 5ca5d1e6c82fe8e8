"""What is known of one request when it has ended: for its log line and its span. Never what was asked or answered."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from loramux.adapters_store.names import LOCAL_TENANT


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. Times are seconds of `time.monotonic`; None for what did not happen.

    `model` is what the client asked for, `served` whom it counts for (adapters, or the base). With several sequences
    `scheduled` and `first_token` are the earliest, `last_token` is the latest; `finish_reasons` and `token_seconds`
    (mean time per token after the first) hold one entry per sequence, tokens are summed.
    """

    id: str
    arrived: float
    tenant: str = LOCAL_TENANT
    model: str | None = None
    served: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)

    def add_sequence(
        self,
        served: Iterable[str],
        finish_reason: str,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        generated_tokens: int,
        scheduled: float | None,
        first_token: float | None,
        last_token: float | None,
    ) -> None:
        """One sequence of the request has ended."""
        self.served = tuple(dict.fromkeys((*self.served, *served)))
        self.finish_reasons.append(finish_reason)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.generated_tokens += generated_tokens
        self.scheduled = _least(self.scheduled, scheduled)
        self.first_token = _least(self.first_token, first_token)
        self.last_token = max((t for t in (self.last_token, last_token) if t is not None), default=None)
        if first_token is not None and last_token is not None and generated_tokens > 1:
            self.token_seconds.append((last_token - first_token) / (generated_tokens - 1))

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step."""
        return _between(self.arrived, self.scheduled)

    @property
    def prefill_seconds(self) -> float | None:
        """From the first step to the first token."""
        return _between(self.scheduled, self.first_token)

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the last."""
        return _between(self.first_token, self.last_token)


def _least(first: float | None, second: float | None) -> float | None:
    return min((t for t in (first, second) if t is not None), default=None)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


_current: ContextVar[RequestRecord | None] = ContextVar("loramux_request", default=None)


def current() -> RequestRecord | None:
    """The record of the request that this task, or the one that started it, serves."""
    return _current.get()


@contextmanager
def serving(record: RequestRecord) -> Iterator[RequestRecord]:
    """Makes the record the current one, for this task and those that it starts."""
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)
