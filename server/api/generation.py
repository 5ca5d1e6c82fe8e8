"""One request's tokens on their way out: from the engine to text, with stop strings, usage and timing.

Chat and text completions share all of this; they differ in how they make prompts and in the shape of what they send.
"""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from loramux.server.api.detokenize import Stopped, StopStrings
from loramux.server.api.errors import APIError, bad_request
from loramux.server.api.logprobs import Echo, TokenScore, read_echo, read_scores
from loramux.server.api.metrics import RequestTimes, Status
from loramux.server.api.resolve import Selection
from loramux.server.api.schemas.common import MAX_CHOICES, MAX_STOP_CHARS, MAX_STOPS, GenerationRequest, Usage
from loramux.server.api.state import ServerState
from loramux.server.engine.protocol import (
    Constraint,
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
    """What an answer grew by. `stop_reason` is the stop string or the stop token id that ended it.

    `scores` are those of the tokens whose text has begun to be shown, where they are wanted.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    scores: Sequence[TokenScore] = ()


@dataclass(slots=True)
class Choice:
    """One sequence: its prompt, and what has been generated and counted so far.

    Choices of one prompt have the first of them as `leader` (which has none itself): they are sent to the engine when
    it has its first token (`has_begun`), so that they find the prompt's blocks in the prefix cache. Without such a
    cache each computes the prompt itself. `echo` is the prompt as it is shown, where it is. `logprob` is the sum over
    the generated tokens, where it is known.
    """

    index: int
    prompt: Sequence[int]
    times: RequestTimes
    leader: "Choice | None" = None
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    echo: Echo = field(default_factory=Echo)
    scores: list[TokenScore] = field(default_factory=list)
    logprob: float = 0.0
    cached_tokens: int = 0
    generated: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def too_long(prompt_tokens: int, max_model_len: int, field_name: str) -> APIError:
    """The 400 for a prompt that does not fit, or leaves no room for an answer."""
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens, but `{field_name}` alone has {prompt_tokens}: "
        "shorten it.", field_name, "context_length_exceeded",
    )  # fmt: skip


def limit_tokens(prompt_tokens: int, wanted: int | None, default: int | None, max_model_len: int) -> int:
    """How many tokens may be generated: what was asked for, or `default`, or the rest of the context.

    Raises a 400 `context_length_exceeded` that states the limit and the lengths when that cannot fit.
    """
    room = max_model_len - prompt_tokens
    if room < (0 if wanted == 0 else 1):
        raise too_long(prompt_tokens, max_model_len, "messages" if default is None else "prompt")
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
    check_token_ids(tuple(body.biases), vocab_size, "logit_bias")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field_name: str) -> None:
    """Raises a 400 for an id that the model does not have."""
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        shown = wrong if abs(wrong) < 1 << 64 else "a huge number"
        raise bad_request(f"Token id {shown} is out of range: this model has ids 0 to {vocab_size - 1}.", field_name)


def sampling_params(
    state: ServerState,
    body: GenerationRequest,
    prompt_tokens: int,
    *,
    wanted: int | None,
    default: int | None,
    constraint: Constraint | None = None,
) -> SamplingParams:
    """The request's sampling with the model's defaults filled in. `default` None means the rest of the context.

    `constraint` has been checked: see `structured.check_constraint`.
    """
    max_tokens = limit_tokens(prompt_tokens, wanted, default, state.require_engine().max_model_len)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(f"min_tokens is {min_tokens}, but at most {max_tokens} can be generated.", "min_tokens")
    defaults = state.renderer.defaults
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    top_k = defaults.top_k if body.top_k is None else body.top_k
    repetition = defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
    about_prompt = body.wanted_prompt_logprobs
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
        presence_penalty=float(body.presence_penalty or 0),
        frequency_penalty=float(body.frequency_penalty or 0),
        repetition_penalty=float(repetition),
        logit_bias=tuple(body.biases.items()),
        logprobs=body.wanted_logprobs,
        prompt_logprobs=0 if about_prompt is None and not max_tokens else about_prompt,
        constraint=constraint,
    )


def count_choices(state: ServerState, wanted: int, prompts: int, field_name: str) -> int:
    """How many answers each prompt gets: `wanted`. Raises a 400 for more than may be computed at once."""
    bound = min(MAX_CHOICES, state.require_engine().max_num_seqs)
    if wanted > bound or wanted * prompts > max(MAX_CHOICES, prompts):
        raise bad_request(
            f"{field_name} is {wanted}: this server generates at most {bound} answers to a prompt at once "
            f"(--max-num-seqs), and {MAX_CHOICES} in one request, of {prompts} prompts.", field_name, "invalid_value",
        )  # fmt: skip
    return wanted


def choice_seed(seed: int, number: int) -> int:
    """The seed of a prompt's answer number `number`: the request's own for the first, and a hash for the others."""
    if not number:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()) >> 1


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
        copies: int = 1,
        keep: int | None = None,
        echo: bool = False,
        hidden: Set[int] | None = None,
    ) -> None:
        """`sampling` is that of each prompt, which gets `copies` answers, of which the best `keep` are kept in the end.
        With `echo` an answer begins with its prompt. `hidden` tokens have no text: all special ones if it is None."""
        self._state = state
        self._selection = selection
        self._body = body
        self._request_id = request_id
        self._echo = echo
        self._hidden = hidden
        self._copies, self._keep = copies, keep or copies
        self._sampling: list[SamplingParams] = []
        self.choices: list[Choice] = []
        for prompt, params in zip(prompts, sampling, strict=True):
            if self._keep < copies and params.logprobs is None:
                params = replace(params, logprobs=0)
            leader = Choice(len(self.choices), prompt, RequestTimes(start))
            self.choices.append(leader)
            self._sampling.append(params)
            for number in range(1, copies):
                self.choices.append(Choice(len(self.choices), prompt, RequestTimes(start), leader))
                seed = choice_seed(params.seed, number)
                self._sampling.append(replace(params, seed=seed, prompt_logprobs=None if params.max_tokens else 0))
        self._all = self.choices
        room = state.require_engine().max_model_len
        selection.admission.reserve(
            [self._prompt_cost(choice) for choice in self.choices],
            [None if params.max_tokens == room - len(choice.prompt) else params.max_tokens
             for choice, params in zip(self.choices, self._sampling, strict=True)],
        )  # fmt: skip

    @staticmethod
    def _prompt_cost(choice: Choice) -> int:
        """Prompt tokens that the choice is charged with: a prompt counts once, however many answers it gets."""
        return 0 if choice.leader else len(choice.prompt)

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all answers, shown or not. Tokens after a stop string are neither shown nor counted."""
        return Usage.of(
            sum(self._prompt_cost(choice) for choice in self._all),
            sum(choice.generated for choice in self._all),
            sum(choice.cached_tokens for choice in self._all if not choice.leader),
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
        if self._keep < self._copies:
            self.choices = self._best()

    def _best(self) -> list[Choice]:
        """Of each prompt's answers those with the highest mean log-probability, best first, numbered anew."""
        kept: list[Choice] = []
        for first in range(0, len(self._all), self._copies):
            answers = self._all[first : first + self._copies]
            kept += sorted(answers, key=lambda choice: -choice.logprob / max(1, choice.generated))[: self._keep]
        for index, choice in enumerate(kept):
            choice.index = index
        return kept

    async def _begin(self, choice: Choice, output: EngineOutput) -> None:
        """The first output of a choice is there: its prompt is read, if it is shown, and its siblings may follow."""
        if choice.leader is not None:
            choice.echo = choice.leader.echo
        elif self._echo:
            wanted = self._body.wanted_prompt_logprobs is not None
            choice.echo = await self._state.renderer.in_thread(
                partial(
                    read_echo, self._state.renderer, choice.prompt,
                    (output.prompt_logprobs or b"") if wanted else None,
                    skip_special_tokens=self._body.skip_special_tokens is not False,
                )
            )  # fmt: skip
        choice.has_begun.set()

    async def _run(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        """One sequence. Whatever way it ends, it is counted once."""
        if choice.leader is not None:
            await choice.leader.has_begun.wait()
        request = EngineRequest(
            request_id=f"{self._request_id}-{next(self._state.sequence_numbers)}",  # clients may repeat their ids
            prompt_token_ids=tuple(choice.prompt),
            sampling=self._sampling[choice.index],
            adapters=self._selection.refs,
            salt=self._selection.salt,
            tenant=self._selection.tenant,
        )
        admission, place, cost = self._selection.admission, choice.index, self._prompt_cost(choice)
        admission.used(place, cost)
        status: Status = "abort"
        try:
            outputs = _closable(self._state.engine.generate(request))
            async with aclosing(outputs):
                text = _Text(self._state, self._body, choice, request.sampling.min_tokens, self._hidden)
                async for output in outputs:
                    if not choice.has_begun.is_set() and output.finish_reason not in ("abort", "error"):
                        await self._begin(choice, output)
                        text.begin()
                    choice.cached_tokens = output.cached_tokens
                    choice.times.scheduled = output.scheduled_at or choice.times.scheduled
                    if output.token_ids:
                        self._state.metrics.arrived(choice.times)
                    if output.finish_reason in ("abort", "error"):
                        raise EngineDeadError(output.error or "the engine gave the request up")
                    delta = text.take(output)
                    admission.used(place, cost + choice.generated)
                    yield delta
                    if choice.finish_reason is not None:
                        status = "length" if choice.finish_reason == "length" else "stop"
                        return
            raise EngineDeadError("the engine stopped without finishing the request")
        except QueueFullError:
            status = "rejected"
            admission.used(place, 0)
            raise
        except Exception:
            status = "error"
            raise
        finally:
            self._state.metrics.finished(
                self._selection.labels(self._state.settings.base_name), status, choice.times,
                prompt_tokens=len(choice.prompt), generated_tokens=choice.generated,
                cached_tokens=choice.cached_tokens, model=self._selection.model,
            )  # fmt: skip


class _Text:
    """Turns one sequence's engine outputs into deltas, token by token, and notices stop strings."""

    def __init__(
        self, state: ServerState, body: GenerationRequest, choice: Choice, min_tokens: int, hidden: Set[int] | None
    ) -> None:
        skip = body.skip_special_tokens is not False
        self._tokens = state.renderer.detokenizer(
            choice.prompt, skip_special_tokens=skip, hidden=hidden if skip else None
        )
        self._include_stop = bool(body.include_stop_str_in_output)
        self._stops = StopStrings(body.stops, include=self._include_stop)
        self._stop_token_ids = frozenset(body.stop_token_ids or ())
        self._choice = choice
        self._min_tokens = min_tokens
        self._made = 0
        self._shown = 0
        self._unshown: list[TokenScore] = []
        self._prefix = ""

    def begin(self) -> None:
        """The choice's echo, if it has one, comes first."""
        echo = self._choice.echo
        self._prefix, self._made, self._unshown = echo.text, len(echo.text), list(echo.scores)

    def take(self, output: EngineOutput) -> Delta:
        """The delta of one output; the choice's counters and, at its end, its finish_reason are updated."""
        choice = self._choice
        pieces: list[str] = [self._prefix]
        self._prefix = ""
        taken: list[int] = []
        scores = None if output.logprobs is None else read_scores(output.token_ids, output.logprobs)
        for i, token in enumerate(output.token_ids):
            taken.append(token)
            choice.generated += 1
            if scores is not None:
                choice.logprob += scores[i].logprob or 0.0
                self._unshown.append(replace(scores[i], offset=self._made))
            is_stop_token = output.stop_token_id is not None and len(taken) == len(output.token_ids)
            piece = "" if is_stop_token and not self._include_stop else self._tokens.feed(token)
            self._made += len(piece)
            if self._pass(piece, pieces):
                break
        ended = choice.finish_reason is None and output.finish_reason is not None
        if ended and not self._pass(self._tokens.flush(), pieces):
            pieces.append(self._stops.flush())
            choice.finish_reason = output.finish_reason
            if output.stop_token_id in self._stop_token_ids:  # the model's own end of sequence is not named
                choice.stop_reason = output.stop_token_id
        text = "".join(pieces)
        self._shown += len(text)
        cut = isinstance(choice.stop_reason, str)
        shown = self._scores(everything=choice.finish_reason is not None and not cut)
        choice.text.append(text)
        choice.token_ids.extend(taken)
        choice.scores.extend(shown)
        return Delta(choice.index, text, taken, choice.finish_reason, choice.stop_reason, shown)

    def _scores(self, *, everything: bool) -> list[TokenScore]:
        """The scores that are due: of tokens that begin in the text that is shown, or all that there are."""
        count = len(self._unshown)
        if not everything:
            count = next((i for i, score in enumerate(self._unshown) if score.offset >= self._shown), count)
        due, self._unshown = self._unshown[:count], self._unshown[count:]
        return due

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
