"""The engine without its process: requests in, one step at a time, outputs out.

Runs wherever torch does; the tests and the benchmarks drive it directly.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from loramux.adapters_store.device import AdapterLoadFailure, DeviceTier
from loramux.adapters_store.host import HostTier
from loramux.server.engine.assembly import assemble
from loramux.server.engine.batch import Batch
from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.constraints import Constraints
from loramux.server.engine.loading import LoadedModel
from loramux.server.engine.logprobs import MAX_LOGPROBS, Floats
from loramux.server.engine.output import answer, pooled_output, prompt_output
from loramux.server.engine.protocol import (
    AdapterResidency,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    PoolingParams,
    StepEvent,
)
from loramux.server.engine.runner import Launched
from loramux.server.engine.sampler import INVALID_TOKEN
from loramux.server.engine.scheduler import Failure, Scheduler
from loramux.server.engine.sequence import PENDING, Sequence
from loramux.server.engine.step import Decodes, Ints, Step

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class TokenColumn:
    """One more token, `tokens[i]`, for each of the sequences, of which there is nothing else to tell.

    `request_ids` is the same object as in the step before when it has the same requests.
    """

    seqs: Seq[Sequence] = ()
    request_ids: tuple[str, ...] = ()
    tokens: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def outputs(self) -> Iterator[EngineOutput]:
        """An output for each."""
        for seq, token in zip(self.seqs, self.tokens.tolist(), strict=True):
            yield EngineOutput(
                seq.request_id, (token,), cached_tokens=seq.cached_tokens, scheduled_at=seq.scheduled_at
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced: `column` for requests that go on with a token, `others` for those with more to tell.

    A request's first output is always one of the others. No request is in both.
    """

    column: TokenColumn
    others: tuple[EngineOutput, ...]
    event: StepEvent

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.column.request_ids or self.others or self.event.adapter_loads or self.event.scheduled_tokens)

    @property
    def outputs(self) -> tuple[EngineOutput, ...]:
        """All outputs of the step."""
        return (*self.others, *self.column.outputs())


class EngineCore:
    """One model, its cache, its adapters and its queues. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, model: LoadedModel | None = None) -> None:
        """Loads the model (or takes a prepared one) and allocates everything.

        Raises UnsupportedModelError when the model cannot be served or does not fit, naming the setting to change.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        parts = assemble(config, model)
        self.model, self.backend, self.runner = parts.model, parts.backend, parts.runner
        self.max_model_len, self.num_blocks = parts.max_model_len, parts.num_blocks
        self.host = HostTier(
            config.blob_path,
            budget_bytes=config.host_adapter_bytes,
            dtype=self.model.dtype,
            pin_memory=self.model.device.type == "cuda",
        )
        self.tier = DeviceTier(self.backend, self.host)
        self.blocks = BlockManager(self.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching)
        self._vocab_size = int(self.model.module.get_input_embeddings().weight.shape[0])
        outputs = self.model.num_logits
        self.batch = Batch(
            config.max_num_seqs, config.block_size, eos_token_ids=self.model.eos_token_ids, order=self.backend.order,
            vocab_size=max(self._vocab_size, outputs),
        )  # fmt: skip
        self.constraints = Constraints(
            Path(config.model_path), vocab_size=outputs, eos_token_ids=self.model.eos_token_ids,
            limit=config.max_num_seqs,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.blocks,
            self.tier,
            self.batch,
            self.constraints,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            check_set=self.backend.check_set,
            order=self.backend.order,
            load_errors=(AdapterLoadFailure,),
        )
        self._overlap = self.model.device.type == "cuda" if config.overlap is None else config.overlap
        self._in_flight: Launched | None = None
        self._sequences: dict[str, Sequence] = {}
        self._failed_steps = 0
        self._steps = 0
        self._scheduled_tokens = 0

    @property
    def info(self) -> EngineInfo:
        """What clients need to know; constant."""
        return EngineInfo(
            max_model_len=self.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            block_size=self.config.block_size,
            num_blocks=self.num_blocks,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            eos_token_ids=self.model.eos_token_ids,
            device_adapter_bytes=self.config.device_adapter_bytes,
            host_adapter_bytes=self.config.host_adapter_bytes,
            max_adapters_per_set=self.config.max_adapters_per_set,
            hidden_size=int(self.model.module.get_input_embeddings().weight.shape[1]),
            num_layers=len(self.model.layers),
        )

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises ValueError for what no step could compute, so that it never meets other requests."""
        prompt = len(request.prompt_token_ids)
        if not prompt:
            raise ValueError("the prompt is empty")
        _check_numbers(request, self._vocab_size)
        new = request.sampling.max_tokens if request.pooling is None else 0
        if prompt + new > self.max_model_len:
            raise ValueError(f"{prompt} prompt tokens and {new} new ones exceed the context of {self.max_model_len}")
        if request.pooling is not None:
            request = self._resolved(request, request.pooling)
        if len(request.adapters) > self.config.max_adapters_per_set:
            raise ValueError(f"an adapter set has at most {self.config.max_adapters_per_set} members")
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id} is in use")
        seq = Sequence.from_request(request)
        self._sequences[request.request_id] = seq
        self.scheduler.add(seq)

    def _resolved(self, request: EngineRequest, pooling: PoolingParams) -> EngineRequest:
        """The pooling request with its layers counted from 0. Raises ValueError for layers that are not there."""
        count = len(self.model.layers)
        layers = tuple(count + 1 + layer if layer < 0 else layer for layer in pooling.layers)
        wrong = next((layer for layer in layers if not 0 <= layer <= count), None)
        if not layers or wrong is not None:
            raise ValueError(f"layers must be one or more numbers from 0 to {count}, or -1; got {pooling.layers}")
        if pooling.tokens < 0:
            raise ValueError(f"tokens must be 0 for the mean, or a number of tokens; got {pooling.tokens}")
        return replace(request, pooling=replace(pooling, layers=layers))

    def abort(self, request_id: str) -> None:
        """Ends a request at once and frees what it holds; unknown ids (already finished) are ignored."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            seq.has_ended = True
            self.scheduler.finish(seq)
            self.runner.penalties.release(seq)
            self.constraints.release(seq)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: sequences, or adapters on the move."""
        return bool(self._sequences) or self._in_flight is not None or not self.tier.idle()

    def is_waiting_only(self) -> bool:
        """Whether nothing can be computed now: no sequence runs, and those that wait need an adapter or a matcher."""
        if self._in_flight is not None or self.scheduler.running:
            return False
        missing = self.scheduler.waiting_for_adapter + self.scheduler.waiting_for_constraint
        return len(self.scheduler.waiting) == missing

    def step(self) -> StepResult:
        """Moves adapters, starts one batch, and returns what each request got.

        With `overlap` that is the batch before: the device computes this one while the host goes through the results
        of the last and prepares the next. A sequence that turns out to have ended has then one token too many under
        way, which nobody sees.
        """
        loads = self.tier.poll()
        step, failures = self.scheduler.schedule()
        others = [self._fail(failure) for failure in failures]
        column = self._guarded(step, others)
        tokens = step.num_tokens
        self._scheduled_tokens += tokens
        done = tuple((e.digest, e.seconds) for e in loads if e.error is None)
        for event in loads:
            if event.error is not None:
                logger.warning("adapter %s was not loaded: %s", event.digest[:12], event.error)
        return StepResult(column, tuple(others), StepEvent(tokens, done))

    def stats(self) -> EngineStats:
        """A snapshot of gauges and counters."""
        running = dict.fromkeys(d for s in self.scheduler.running for d in s.digests)
        waiting = dict.fromkeys(d for s in self.scheduler.waiting for d in s.digests if d not in running)
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            waiting_for_adapter=self.scheduler.waiting_for_adapter,
            blocks_total=self.num_blocks,
            blocks_used=self.blocks.num_used,
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            prefix_queried_tokens=self.blocks.queried_tokens,
            prefix_hit_tokens=self.blocks.hit_tokens,
            scheduled_tokens=self._scheduled_tokens,
            adapter_loads=self.tier.loads,
            adapter_load_seconds_sum=self.tier.load_seconds_sum,
            adapter_evictions=self.tier.evictions,
            device_adapter_bytes_used=self.tier.bytes_used,
            host_adapter_bytes_used=self.host.bytes_used,
            running_adapters=tuple(running),
            waiting_adapters=tuple(waiting),
            adapters=tuple(
                AdapterResidency(r.digest, r.device, r.host, r.pinned, r.users, r.bytes) for r in self.tier.residency()
            ),
        )

    def forget_adapter(self, digest: str) -> None:
        """Frees the adapter as soon as no request uses it."""
        self.tier.forget(digest)

    def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Keeps the adapter on the device, or lets it go. Raises `AdapterLoadFailure`."""
        self.tier.pin(digest, pinned)

    def close(self) -> None:
        """Ends the threads that load adapters and compile constraints, and frees adapter memory."""
        self.constraints.close()
        self.tier.close()

    def _guarded(self, step: Step, others: list[EngineOutput]) -> TokenColumn:
        """One batch; if it cannot be computed, its requests fail and the engine goes on. Adds to `others`.

        On a card the device's state is unknown after an exception, and a step that fails again and again is no
        request's fault: then the exception ends the process, and its supervisor starts a new one.
        """
        launched: Launched | None = None
        try:
            if len(step):
                launched = self._launch(step)
        except Exception as error:
            self._failed_steps += 1
            if self.model.device.type != "cpu" or self._failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception("a step failed; its %d requests are given up", len(step))
            message = f"the engine could not compute this request's step: {type(error).__name__}"
            for seq, _, _ in step:
                self.abort(seq.request_id)
                others.append(EngineOutput(seq.request_id, finish_reason="error", error=message, error_kind="model"))
        else:
            self._failed_steps = 0
        finished = launched
        if self._overlap:
            finished, self._in_flight = self._in_flight, launched
        return TokenColumn() if finished is None else self._complete(finished, others)

    def _launch(self, step: Step) -> Launched:
        """Hands a batch to the device; from now on its tokens count as computed and its next ones are pending."""
        self._steps += 1
        fresh = self.blocks.take_fresh()
        if fresh:
            self.runner.attention.clear(fresh)
        launched = self.runner.launch(step, self._in_flight)
        if step.decodes is not None:
            self.batch.advance(step.decodes)
        for seq, _, end in step.chunks:
            seq.num_computed = end
        for part in launched.scored_prompts:
            part.seq.num_scored = part.end - 1
        for source, (seq, _, _) in enumerate(launched.sampling.chunks, step.num_decodes):
            seq.tokens.append(PENDING)
            seq.source = source
        return launched

    def _complete(self, launched: Launched, others: list[EngineOutput]) -> TokenColumn:
        """The tokens of a batch, once the device has them: `others` get the outputs that say more than a token."""
        tokens = launched.result()
        self.runner.take(launched)
        if launched.prompt_scores is not None:
            found = iter(launched.prompt_scores.rows())
            for part in launched.scored_prompts:
                part.seq.prompt_scores.extend(row.tobytes() for row in islice(found, len(part)))
        scores: Mapping[int, Floats] = {}
        if launched.scores is not None:
            scores = dict(zip(launched.scored_rows, launched.scores.rows(), strict=True))
        column, decodes = TokenColumn(), launched.sampling.decodes
        if decodes is not None:
            column = self._complete_decodes(decodes, tokens[: len(decodes)], others, scores)
        first = launched.sampling.num_decodes
        chosen = tokens[first:].tolist()
        for row, ((seq, _, end), token) in enumerate(zip(launched.sampling.chunks, chosen, strict=True), first):
            self._complete_one(seq, end, token, others, scores.get(row))
        for seq, _, end in launched.step.chunks:
            if seq.has_ended:
                continue
            if end // self.config.block_size > seq.num_registered:
                self.blocks.register(seq, end)
            if seq in launched.pooled:
                others.append(pooled_output(seq, launched.pooled[seq].tensor()))
                self.abort(seq.request_id)
            elif not seq.generates and not seq.pools and end == seq.prompt_len:
                others.append(prompt_output(seq))
                self.abort(seq.request_id)
        return column

    def _complete_decodes(
        self, decodes: Decodes, tokens: Ints, others: list[EngineOutput], scores: Mapping[int, Floats]
    ) -> TokenColumn:
        """Decodes that go on come back as a column; those that end, or left the batch meanwhile, are in `others`."""
        layout, accepted = decodes.layout, self.batch.accept(decodes, tokens)
        for i in accepted.full:
            if tokens[i] != INVALID_TOKEN:
                self.blocks.register(layout.seqs[i], int(decodes.ends[i]))
        column = TokenColumn(layout.seqs, layout.request_ids, tokens)
        if accepted.plain is not None:
            rows = accepted.plain.tolist()
            column = TokenColumn(
                [layout.seqs[i] for i in rows], tuple(layout.request_ids[i] for i in rows), tokens[accepted.plain]
            )  # fmt: skip
        for i in accepted.asking:
            self._tell(layout.seqs[i], int(decodes.ends[i]), int(tokens[i]), others, scores.get(i))
        for i in accepted.left:
            self._complete_one(layout.seqs[i], int(decodes.ends[i]), int(tokens[i]), others, scores.get(i))
        return column

    def _complete_one(
        self, seq: Sequence, end: int, token: int, others: list[EngineOutput], scores: Floats | None
    ) -> None:
        """The token after a sequence's first `end` ones, wherever the sequence is now."""
        if seq.has_ended:  # while this was under way
            return
        self.batch.put(seq, end, token)
        if end // self.config.block_size > seq.num_registered and token != INVALID_TOKEN:
            self.blocks.register(seq, end)
        self._tell(seq, end, token, others, scores)

    def _tell(self, seq: Sequence, end: int, token: int, others: list[EngineOutput], scores: Floats | None) -> None:
        output = answer(seq, end, token, self.model.eos_token_ids, scores)
        others.append(output)
        if output.finish_reason is not None:
            self.abort(seq.request_id)

    def _fail(self, failure: Failure) -> EngineOutput:
        seq = failure.seq
        self._sequences.pop(seq.request_id, None)
        seq.has_ended = True
        self.runner.penalties.release(seq)
        return EngineOutput(seq.request_id, finish_reason="error", error=failure.message, error_kind=failure.kind)


def _check_numbers(request: EngineRequest, vocab_size: int) -> None:
    """Raises ValueError for token ids outside the vocabulary and for settings that are no sensible numbers."""
    sampling = request.sampling
    biased = [token for token, _ in sampling.logit_bias]
    ids = (*request.prompt_token_ids, *sampling.stop_token_ids, *biased)
    if min(ids) < 0 or max(*biased, *request.prompt_token_ids, 0) >= vocab_size:
        wrong = next(t for t in ids if not 0 <= t < vocab_size)
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    if sampling.max_tokens < (1 if sampling.prompt_logprobs is None else 0) or sampling.min_tokens < 0:
        raise ValueError("max_tokens must be at least 1 (0 with prompt_logprobs) and min_tokens at least 0")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError("temperature must be a finite number of at least 0")
    if not (0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1):
        raise ValueError("top_p must be above 0 and at most 1, min_p from 0 to 1")
    changes = (sampling.presence_penalty, sampling.frequency_penalty, *(bias for _, bias in sampling.logit_bias))
    if not all(map(math.isfinite, changes)) or not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError("penalties and biases must be finite numbers, repetition_penalty above 0")
    most = min(MAX_LOGPROBS, vocab_size)
    if not all(0 <= wanted <= most for wanted in (sampling.logprobs or 0, sampling.prompt_logprobs or 0)):
        raise ValueError(f"logprobs and prompt_logprobs must be from 0 to {most}")
    if not all(math.isfinite(a.weight) for a in request.adapters):
        raise ValueError("adapter weights must be finite")
