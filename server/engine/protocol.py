"""What crosses the boundary between the API and the engine: plain dataclasses, no transport.

The API talks to an `EngineClient`; whether the engine runs in this process or in another one is the client's
business. Everything here is made of numbers, strings, lists and dicts, so that msgpack carries it unchanged.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

GREEDY_BELOW = 1e-5

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["adapter", "model", "request"]
EngineState = Literal["starting", "ready", "draining", "dead"]

OVERLOAD_RETRY_SECONDS = 10


class EngineError(Exception):
    """The engine could not serve a request that was valid. `retryable` says whether the same request may succeed."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class EngineDeadError(EngineError):
    """The engine process ended; the supervisor restarts it."""


class QueueFullError(EngineError):
    """The waiting queue is at its bound; `retry_after` is in whole seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueTimeoutError(QueueFullError):
    """The request waited too long for its first token and was given up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=OVERLOAD_RETRY_SECONDS)


class DeadlineError(EngineError):
    """The answer was not done in the time that a request may take."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class AdapterLoadError(EngineError):
    """An adapter of the request's set could not be brought to the device (too large for the budget, blob gone)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class RequestRefusedError(EngineError):
    """The request asks for what cannot be computed; a constraint may show that only in the middle of an answer."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One member of an adapter set: the digest of its canonical form and its weight in the sum."""

    digest: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text must match, from its first token to its end.

    `text` is the JSON text of a schema, a regular expression, the JSON list of the strings to choose from, or a grammar
    in llguidance's variant of Lark (which may hold `%json {...}` and special tokens as `<|name|>`); empty for
    `json_object`, any JSON object.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch the filter off. `seed` fixes the noise:
    the uniform number of position p is a function of (seed, p) alone. `max_tokens` is already resolved to a number
    that fits the context. `stop_token_ids` end generation like end-of-sequence ids and are reported as "stop".

    The penalties and `logit_bias`, pairs of a token and what is added to its logit, change the logits before the
    temperature does: see `penalties`. `logprobs` asks for the log-probability of each chosen token and for that many
    of the likeliest ones; `prompt_logprobs` for the same of the prompt's tokens from the second on. Both are of the
    model's own distribution, which no setting changes: log_softmax(logits). `max_tokens` may be 0 for a request that
    asks for `prompt_logprobs`.

    With a `constraint` only tokens that may still lead to a matching text can be chosen, and generation ends as "stop"
    when the text is complete, whatever `min_tokens` and `ignore_eos` say.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether what was said before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def is_adjusted(self) -> bool:
        """Whether the token is chosen from other logits than the model's."""
        return self.is_penalised or bool(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken: at a temperature below 1e-5 nothing else has a chance."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Asks for a prompt's hidden states instead of generated tokens.

    `layers` number the decoder's layers from 0 and stand for the normalised input of the layer's first projection; the
    number of layers itself, or -1, stands for the model's final hidden states. `tokens` 0 averages over the prompt's
    tokens; otherwise the states of its last so many tokens are wanted as they are.
    """

    layers: tuple[int, ...] = (-1,)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate, or to pool. An empty `adapters` is the base model. `salt` separates prefix caches,
    `tenant` says whose turn it takes.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[AdapterRef, ...] = ()
    salt: str = ""
    pooling: PoolingParams | None = None
    tenant: str = ""


class EngineOutput(NamedTuple):
    """What one step added to one request.

    `cached_tokens` is the number of prompt tokens taken from the prefix cache (final from the first output on).
    With `finish_reason` set this is the request's last output; "error" carries `error` and `error_kind`: the adapter
    could not be loaded, the model's numbers were not finite, or the request was refused. The end-of-sequence or stop
    token itself, when generated, is included in `token_ids` (it is billed) and named by `stop_token_id`.
    `scheduled_at` (`time.monotonic()`, one clock for all processes of a host) is when the request left the queue.
    `embedding` answers a pooling request, as the bytes of float32 numbers: [layers, hidden] means, or
    [layers, tokens, hidden] states. `logprobs` (of `token_ids`) and `prompt_logprobs` (of the prompt's tokens from the
    second on, with the first output) are the bytes of float64 numbers [tokens, 1 + 2 * k]: a token's log-probability,
    then token and log-probability of the k likeliest ones in turn.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    stop_token_id: int | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    scheduled_at: float | None = None
    embedding: bytes | None = None
    logprobs: bytes | None = None
    prompt_logprobs: bytes | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine knows once the model is loaded; constant for its life."""

    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]
    device_adapter_bytes: int
    host_adapter_bytes: int
    max_adapters_per_set: int
    hidden_size: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """Where one adapter is right now: on the device, in host memory, and how many running requests hold it."""

    digest: str
    device: bool
    host: bool
    pinned: bool
    users: int
    bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of gauges and monotonic counters, sent four times a second while there is work and when it ends."""

    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    scheduled_tokens: int = 0
    adapter_loads: int = 0
    adapter_load_seconds_sum: float = 0.0
    adapter_evictions: int = 0
    device_adapter_bytes_used: int = 0
    host_adapter_bytes_used: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    adapters: tuple[AdapterResidency, ...] = ()


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What happened in one step, for histograms: tokens scheduled, and finished adapter loads as (digest, seconds)."""

    scheduled_tokens: int = 0
    adapter_loads: tuple[tuple[str, float], ...] = ()


class EngineClient(Protocol):
    """How the API reaches the engine."""

    @property
    def state(self) -> EngineState:
        """`ready` when requests are served; `dead` between a crash and the end of the restart."""

    @property
    def info(self) -> EngineInfo:
        """Raises `EngineDeadError` before the first `ready`."""

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""

    def drain_events(self) -> list[StepEvent]:
        """Step events since the last call (bounded; the oldest are dropped)."""

    async def start(self) -> None:
        """Starts the engine and returns at once; `state` becomes `ready` later (see `wait_ready`)."""

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Returns when ready; raises `EngineError` with the engine's own message when it cannot start."""

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, waits up to `drain_seconds` for running ones, then ends the engine."""

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Yields outputs until one has a `finish_reason`. Closing or cancelling the iterator aborts the request.

        Raises `QueueFullError`, `QueueTimeoutError`, `DeadlineError`, `EngineDeadError`, `AdapterLoadError`,
        `RequestRefusedError`.
        """

    async def forget_adapter(self, digest: str) -> None:
        """Frees the adapter from device and host memory as soon as no request uses it."""

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        """A pinned adapter is loaded and never evicted. Raises `AdapterLoadError` when it cannot be loaded."""
