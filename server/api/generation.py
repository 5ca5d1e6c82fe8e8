"""One request's tokens on their way out: from the engine to text, with stop strings, usage and timing.

Chat and text completions share all of this; they differ in how they make prompts and in the shape of what they send.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from loramux.server.api.detokenize import Stopped, StopStrings
from loramux.server.api.errors import bad_request
from loramux.server.api.metrics import RequestTimes, Status
from loramux.server.api.resolve import Selection
from loramux.server.api.schemas.common import MAX_STOP_CHARS, MAX_STOPS, GenerationRequest, Usage
from loramux.server.api.state import ServerState
from loramux.server.engine.protocol import (
    EngineDeadError,
    EngineOutput,
    EngineRequest,
    QueueFullError,
    SamplingParams,
)

logger = logging.getLogger(__name__)

MIN_TOP_P = 1e-6


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer grew by. `stop_reason` is the stop string or the stop token id that ended it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Choice:
    """One sequence: its prompt, and what has been generated and counted so far."""

    index: int
    prompt: Sequence[int]
    times: RequestTimes
    cached_tokens: int = 0
    generated: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def limit_tokens(prompt_tokens: int, wanted: int | None, default: int | None, max_model_len: int) -> int:
    """How many tokens may be generated: what was asked for, or `default`, or the rest of the context.

    Raises a 400 `context_length_exceeded` that states the limit and the lengths when that cannot fit.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise bad_request(
            f"This model's maximum context length is {max_model_len} tokens, prompt and answer together, but the "
            f"prompt alone has {prompt_tokens}. Shorten it.",
            "messages" if default is None else "prompt", "context_length_exceeded",
        )  # fmt: skip
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise bad_request(
            f"This model's maximum context length is {max_model_len} tokens, but {prompt_tokens + wanted} were asked "
            f"for ({prompt_tokens} in the prompt, {wanted} to generate). Ask for at most {room}.",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    return wanted


def check_request(body: GenerationRequest, vocab_size: int) -> None:
    """What pydantic cannot say in one field. Raises a 400 that names the field."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options is only allowed with `stream: true`.", "stream_options", "invalid_value")
    if len(body.stops) > MAX_STOPS:
        raise bad_request(
            f"At most {MAX_STOPS} stop strings are allowed, got {len(body.stops)}.", "stop", "invalid_value"
        )
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in body.stops):
        raise bad_request(f"A stop string has 1 to {MAX_STOP_CHARS} characters.", "stop", "invalid_value")
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field_name: str) -> None:
    """Raises a 400 for an id that the model does not have."""
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        shown = wrong if abs(wrong) < 1 << 64 else "a huge number"
        raise bad_request(f"Token id {shown} is out of range: this model has ids 0 to {vocab_size - 1}.", field_name)


def sampling_params(
    state: ServerState, body: GenerationRequest, prompt_tokens: int, *, wanted: int | None, default: int | None
) -> SamplingParams:
    """The request's sampling with the model's defaults filled in. `default` None means the rest of the context."""
    max_tokens = limit_tokens(prompt_tokens, wanted, default, state.require_engine().max_model_len)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(f"min_tokens is {min_tokens}, but at most {max_tokens} can be generated.", "min_tokens")
    defaults = state.renderer.defaults
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    top_k = defaults.top_k if body.top_k is None else body.top_k
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(temperature),
        top_p=max(float(top_p), MIN_TOP_P),
        top_k=max(top_k, 0),
        min_p=float(defaults.min_p if body.min_p is None else body.min_p),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
    )


class Generation:
    """All sequences of one HTTP request, from the engine's tokens to the client's text."""

    def __init__(
        self,
        state: ServerState,
        selection: Selection,
        body: GenerationRequest,
        *,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        start: float,
    ) -> None:
        self._state = state
        self._selection = selection
        self._body = body
        self._request_id = request_id
        self._sampling = sampling
        self.choices = [Choice(i, prompt, RequestTimes(start)) for i, prompt in enumerate(prompts)]

    @property
    def usage(self) -> Usage:
        """Tokens so far. Tokens after a stop string are neither shown nor counted."""
        return Usage.of(
            sum(len(choice.prompt) for choice in self.choices),
            sum(choice.generated for choice in self.choices),
            sum(choice.cached_tokens for choice in self.choices),
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices as they come; each choice's last one has a finish_reason.

        Closing it, or cancelling whoever waits for it, aborts what the engine still runs. Raises `EngineError`.
        """
        if len(self.choices) == 1:
            stream = self._run(self.choices[0])
        else:
            stream = _merged([self._run(choice) for choice in self.choices])
        async with aclosing(stream):
            async for delta in stream:
                yield delta

    async def _run(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        """One sequence. Whatever way it ends, it is counted once."""
        request = EngineRequest(
            request_id=f"{self._request_id}-{next(self._state.sequence_numbers)}",  # clients may repeat their ids
            prompt_token_ids=tuple(choice.prompt),
            sampling=self._sampling[choice.index],
            adapters=self._selection.refs,
            salt=self._body.cache_salt or "",
        )
        status: Status = "abort"
        try:
            outputs = _closable(self._state.engine.generate(request))
            async with aclosing(outputs):
                text = _Text(self._state, self._body, choice, request.sampling.min_tokens)
                async for output in outputs:
                    choice.cached_tokens = output.cached_tokens
                    choice.times.scheduled = output.scheduled_at or choice.times.scheduled
                    if output.token_ids:
                        choice.times.token(time.monotonic())
                    if output.finish_reason in ("abort", "error"):
                        raise EngineDeadError(output.error or "the engine gave the request up")
                    yield text.take(output)
                    if choice.finish_reason is not None:
                        status = "length" if choice.finish_reason == "length" else "stop"
                        return
            raise EngineDeadError("the engine stopped without finishing the request")
        except QueueFullError:
            status = "rejected"
            raise
        except Exception:
            status = "error"
            raise
        finally:
            self._state.metrics.finished(
                self._selection.labels(self._state.settings.base_name), status, choice.times,
                prompt_tokens=len(choice.prompt), generated_tokens=choice.generated,
            )  # fmt: skip


class _Text:
    """Turns one sequence's engine outputs into deltas, token by token, and notices stop strings."""

    def __init__(self, state: ServerState, body: GenerationRequest, choice: Choice, min_tokens: int) -> None:
        skip = body.skip_special_tokens is not False
        self._tokens = state.renderer.detokenizer(choice.prompt, skip_special_tokens=skip)
        self._include_stop = bool(body.include_stop_str_in_output)
        self._stops = StopStrings(body.stops, include=self._include_stop)
        self._stop_token_ids = frozenset(body.stop_token_ids or ())
        self._choice = choice
        self._min_tokens = min_tokens

    def take(self, output: EngineOutput) -> Delta:
        """The delta of one output; the choice's counters and, at its end, its finish_reason are updated."""
        choice = self._choice
        pieces: list[str] = []
        taken: list[int] = []
        for token in output.token_ids:
            taken.append(token)
            choice.generated += 1
            is_stop_token = output.stop_token_id is not None and len(taken) == len(output.token_ids)
            piece = "" if is_stop_token and not self._include_stop else self._tokens.feed(token)
            if self._pass(piece, pieces):
                break
        ended = choice.finish_reason is None and output.finish_reason is not None
        if ended and not self._pass(self._tokens.flush(), pieces):
            pieces.append(self._stops.flush())
            choice.finish_reason = output.finish_reason
            if output.stop_token_id in self._stop_token_ids:  # the model's own end of sequence is not named
                choice.stop_reason = output.stop_token_id
        text = "".join(pieces)
        choice.text.append(text)
        choice.token_ids.extend(taken)
        return Delta(choice.index, text, taken, choice.finish_reason, choice.stop_reason)

    def _pass(self, piece: str, pieces: list[str]) -> bool:
        """Sends text through the stop strings; True when one of them ended the answer."""
        if not piece:
            return False
        result = self._stops.feed(piece, armed=self._choice.generated > self._min_tokens)
        if isinstance(result, Stopped):
            pieces.append(result.text)
            self._choice.finish_reason, self._choice.stop_reason = "stop", result.stop
            return True
        pieces.append(result)
        return False


def _closable(outputs: AsyncIterator[EngineOutput]) -> AsyncGenerator[EngineOutput, None]:
    """Engine clients give async generators; the protocol only promises that closing them aborts."""
    return cast(AsyncGenerator[EngineOutput, None], outputs)


async def _merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Several streams as one, in order of arrival. The first failure ends all of them."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(2 * len(streams))

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
