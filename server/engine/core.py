"""The engine without its process: requests in, one step at a time, outputs out.

Runs wherever torch does; the tests and the benchmarks drive it directly.
"""

import logging
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from loramux.adapters_store.device import AdapterLoadFailure, DeviceTier
from loramux.adapters_store.host import HostTier
from loramux.kernels.lora import make_backend
from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.config import EngineConfig
from loramux.server.engine.loading import LoadedModel, UnsupportedModelError, context_limit, load_model
from loramux.server.engine.output import INVALID_TOKEN, accept_token
from loramux.server.engine.protocol import (
    AdapterResidency,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    StepEvent,
)
from loramux.server.engine.runner import Runner
from loramux.server.engine.scheduler import Chunk, Scheduler
from loramux.server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

DEFAULT_KV_BYTES_CPU = 2 << 30
KV_SHARE_OF_FREE_DEVICE = 0.85
MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced."""

    outputs: tuple[EngineOutput, ...]
    event: StepEvent


class EngineCore:
    """One model, its cache, its adapters and its queues. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, model: LoadedModel | None = None) -> None:
        """Loads the model (or takes a prepared one) and allocates everything.

        Raises UnsupportedModelError when the model cannot be served or does not fit, naming the setting to change.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.model = model or load_model(
            config.model_path, dtype=config.dtype, device=config.device, pack=config.packed_projections
        )
        self.max_model_len = context_limit(self.model.config, config.max_model_len)
        self.num_blocks = self._plan_cache()
        use_workspace = config.decode_workspace and self.model.device.type == "cpu"
        workspace_tokens = self.num_blocks * config.block_size // 2 if use_workspace else 0
        self.model.allocate(self.num_blocks, config.block_size, workspace_tokens)
        self.backend = make_backend(
            [p.site for p in self.model.projections if p.site is not None],
            dtype=self.model.dtype,
            device=self.model.device,
            budget_bytes=config.device_adapter_bytes,
            max_slots=config.max_device_adapters,
            max_set_size=config.max_adapters_per_set,
            max_set_rank=config.max_set_rank,
            max_tokens=config.max_batched_tokens,
            implementation=config.lora_implementation,
        )
        self.host = HostTier(
            config.blob_path,
            budget_bytes=config.host_adapter_bytes,
            dtype=self.model.dtype,
            pin_memory=self.model.device.type == "cuda",
        )
        self.tier = DeviceTier(self.backend, self.host)
        self.blocks = BlockManager(self.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            self.tier,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            check_set=self.backend.check_set,
            order=self.backend.order,
            load_errors=(AdapterLoadFailure,),
        )
        self.runner = Runner(self.model, self.backend, block_size=config.block_size)
        self._sequences: dict[str, Sequence] = {}
        self._vocab_size = int(self.model.module.get_input_embeddings().weight.shape[0])
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
        )

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises ValueError for what no step could compute, so that it never meets other requests."""
        prompt = len(request.prompt_token_ids)
        if not prompt:
            raise ValueError("the prompt is empty")
        _check_numbers(request, self._vocab_size)
        if prompt + request.sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"{prompt} prompt tokens and {request.sampling.max_tokens} new ones exceed the context of "
                f"{self.max_model_len}"
            )
        if len(request.adapters) > self.config.max_adapters_per_set:
            raise ValueError(f"an adapter set has at most {self.config.max_adapters_per_set} members")
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id} is in use")
        seq = Sequence.from_request(request)
        self._sequences[request.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Ends a request at once and frees what it holds; unknown ids (already finished) are ignored."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self.scheduler.finish(seq)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: sequences, or adapters on the move."""
        return bool(self._sequences) or not self.tier.idle()

    def is_waiting_only(self) -> bool:
        """Whether nothing can be computed now: no sequence runs and those that wait, wait for adapters."""
        return not self.scheduler.running and len(self.scheduler.waiting) == self.scheduler.waiting_for_adapter

    def step(self) -> StepResult:
        """Moves adapters, computes one batch, and returns what each request got."""
        loads = self.tier.poll()
        chunks, failures = self.scheduler.schedule()
        outputs = [self._fail(f.seq, f.message) for f in failures]
        if chunks:
            outputs += self._guarded(chunks)
        tokens = sum(c.end - c.start for c in chunks)
        self._scheduled_tokens += tokens
        done = tuple((e.digest, e.seconds) for e in loads if e.error is None)
        for event in loads:
            if event.error is not None:
                logger.warning("adapter %s was not loaded: %s", event.digest[:12], event.error)
        return StepResult(tuple(outputs), StepEvent(tokens, done))

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
        """Ends the loader's threads and frees adapter memory."""
        self.tier.close()

    def _guarded(self, chunks: Seq[Chunk]) -> list[EngineOutput]:
        """One batch; if it cannot be computed, its requests fail and the engine goes on.

        On a card the device's state is unknown after an exception, and a step that fails again and again is no
        request's fault: then the exception ends the process, and its supervisor starts a new one.
        """
        try:
            outputs = self._compute(chunks)
        except Exception as error:
            self._failed_steps += 1
            if self.model.device.type != "cpu" or self._failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception("a step failed; its %d requests are given up", len(chunks))
            for chunk in chunks:
                self.abort(chunk.seq.request_id)
            message = f"the engine could not compute this request's step: {type(error).__name__}"
            return [
                EngineOutput(c.seq.request_id, finish_reason="error", error=message, error_kind="model") for c in chunks
            ]
        self._failed_steps = 0
        return outputs

    def _compute(self, chunks: Seq[Chunk]) -> list[EngineOutput]:
        self._steps += 1
        fresh = self.blocks.take_fresh()
        if fresh:
            self.model.clear_blocks(fresh)
        tokens = self.runner.run(chunks)
        outputs = []
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed = chunk.end
            if tokens.get(seq.request_id) != INVALID_TOKEN:
                self.blocks.register(seq)
            if seq.request_id not in tokens:
                continue
            output = accept_token(seq, tokens[seq.request_id], self.model.eos_token_ids)
            outputs.append(output)
            if output.finish_reason is not None:
                self.abort(seq.request_id)
        return outputs

    def _fail(self, seq: Sequence, message: str) -> EngineOutput:
        self._sequences.pop(seq.request_id, None)
        return EngineOutput(seq.request_id, finish_reason="error", error=message, error_kind="adapter")

    def _plan_cache(self) -> int:
        """The number of KV blocks that the budget holds. Raises UnsupportedModelError when one sequence cannot fit."""
        config, per_block = self.config, self.model.kv_bytes_per_token * self.config.block_size
        budget = config.kv_cache_bytes
        if budget is None:
            if self.model.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.model.device)
                budget = int(free * KV_SHARE_OF_FREE_DEVICE) - config.device_adapter_bytes
            else:
                budget = DEFAULT_KV_BYTES_CPU
            budget = min(budget, per_block * -(-self.max_model_len // config.block_size) * config.max_num_seqs)
        blocks = max(budget, 0) // per_block
        needed = -(-self.max_model_len // config.block_size)
        if blocks < needed:
            shorter = f"lower --max-model-len to {blocks * config.block_size} or " if blocks else ""
            raise UnsupportedModelError(
                f"one sequence of {self.max_model_len} tokens needs {needed * per_block} bytes of KV cache, the budget "
                f"is {max(budget, 0)}: {shorter}raise --kv-cache-bytes"
            )
        return blocks


def _check_numbers(request: EngineRequest, vocab_size: int) -> None:
    """Raises ValueError for token ids outside the vocabulary and for settings that are no sensible numbers."""
    sampling = request.sampling
    ids = (*request.prompt_token_ids, *sampling.stop_token_ids)
    if min(ids) < 0 or max(request.prompt_token_ids) >= vocab_size:
        wrong = next(t for t in ids if not 0 <= t < vocab_size)
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    if sampling.max_tokens < 1 or sampling.min_tokens < 0:
        raise ValueError("max_tokens must be at least 1 and min_tokens at least 0")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError("temperature must be a finite number of at least 0")
    if not (0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1):
        raise ValueError("top_p must be above 0 and at most 1, min_p from 0 to 1")
    if not all(math.isfinite(a.weight) for a in request.adapters):
        raise ValueError("adapter weights must be finite")
