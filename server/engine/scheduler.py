"""Which tokens of which sequences the next step computes.

Each step has a budget of tokens. Decoding sequences, the rows of the batch, come first, one token each; then prompts
that are partly computed; then waiting requests, in an order that is fair to tenants and adapter sets (`FairQueue`), in
chunks that fill the budget. Requests whose adapters are on their way to the device, or whose constraint is being
compiled, wait without holding others up. When blocks run out the youngest running sequence gives its blocks back and is
recomputed later.
"""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from loramux.server.engine.batch import Batch
from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.fair_queue import FairQueue
from loramux.server.engine.grammars import ConstraintError
from loramux.server.engine.protocol import ErrorKind
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.step import Chunk, Ints, Step

LOOK_AHEAD = 8
PROMPT_LOGIT_ROWS = 512
"""Tokens in one step of prompts whose log-probabilities are wanted: a row of logits each, so this bounds its memory."""


class AdapterGate(Protocol):
    """What the scheduler needs of the device tier."""

    def acquire(self, digests: Seq[str]) -> tuple[int, ...] | None:
        """Slots of resident adapters, one use taken of each; None while some are still loading."""

    def release(self, digests: Seq[str]) -> None:
        """Gives the uses back."""

    def prefetch(self, digests: Seq[str]) -> None:
        """Starts loading adapters that are wanted soon, as far as memory is idle."""

    def abandon(self, digests: Seq[str]) -> None:
        """The caller that waited for this set no longer does."""


class ConstraintGate(Protocol):
    """What the scheduler needs of the constraints."""

    def ready(self, seq: Sequence) -> bool:
        """Whether the sequence can be held to its constraint now; raises ConstraintError when it never can."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence that left the queue because it can never run."""

    seq: Sequence
    message: str
    kind: ErrorKind


class Scheduler:
    """Owns the queues. All methods are called from the engine's one thread."""

    def __init__(
        self,
        blocks: BlockManager,
        adapters: AdapterGate,
        batch: Batch,
        constraints: ConstraintGate,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        check_set: Callable[[Seq[int]], None],
        order: Callable[[int], tuple[int, ...]],
        load_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        """`batch` has those of the running sequences that decode. `check_set` raises ValueError for a set of slots that
        the kernels cannot compute; `order` sorts slots as the kernels like to meet them."""
        self.blocks = blocks
        self.adapters = adapters
        self.batch = batch
        self.constraints = constraints
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: FairQueue[Sequence] = FairQueue(lambda seq: (seq.request.tenant, seq.spans[0].key))
        self.running: dict[Sequence, None] = {}
        self.waiting_for_adapter = self.waiting_for_constraint = 0
        self.preemptions = 0
        self._check_set = check_set
        self._order = order
        self._load_errors = load_errors
        self._outside: dict[Sequence, None] = {}

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.add(seq)

    def schedule(self) -> tuple[Step, list[Failure]]:
        """The next step (decodes first, each part in the kernels' order), and sequences that failed."""
        self.waiting.tick()
        self._enter()
        preemptions = self.preemptions
        rows = self._decoding_rows()
        chunks: dict[Sequence, Chunk] = {}
        budget = self.max_batched_tokens - len(rows)
        for seq in tuple(self._outside):
            missing = min(seq.remaining, budget, self._logit_room(seq, chunks))
            if missing < 1 or seq.slots is None or (seq.remaining == 1 and seq.is_full):
                continue  # nothing to compute, or it was preempted for an earlier sequence of this very step
            end = seq.num_computed + missing
            if self._make_room(seq, end, chunks):
                chunks[seq] = Chunk(seq, seq.num_computed, end)
                budget -= missing
        if self.preemptions > preemptions:  # rows and chunks were taken back
            rows = self.batch.ready()
            budget = self.max_batched_tokens - len(rows) - sum(c.end - c.start for c in chunks.values())
        failures = self._admit(budget, chunks)
        return Step(self.batch.decodes(rows), self._ordered(chunks.values())), failures

    def finish(self, seq: Sequence) -> None:
        """Takes the sequence out, wherever it is, and frees what it holds."""
        if seq in self.running:
            self._stop(seq)
            self.waiting.end(seq)
        elif self.waiting.remove(seq):
            self.adapters.abandon(seq.digests)

    def preempt(self, seq: Sequence) -> None:
        """A running sequence gives back what it holds; it is the first to be admitted again, and computed anew."""
        self._stop(seq)
        self.waiting.put_back(seq)
        self.preemptions += 1

    def take_out(self, seq: Sequence) -> None:
        """Takes a sequence out of the batch, so that it may be changed; the next step lets it in again."""
        if seq.row is not None:
            self.batch.leave(seq)
            self._outside[seq] = None

    def _enter(self) -> None:
        """Sequences that have a first token, computed with the present adapters, become rows of the batch."""
        for seq in tuple(self._outside):
            if seq.remaining == 1 and seq.num_output and not seq.is_full and seq.current_span.start < len(seq.tokens):
                del self._outside[seq]
                self.batch.enter(seq)
        self.batch.sort()

    def _decoding_rows(self) -> Ints:
        """The batch's rows of this step, each with a block for its token; without those preempted for others."""
        rows = self.batch.ready()
        short = self.batch.short(rows)
        if len(short) <= self.blocks.num_free:
            if len(short):
                self.batch.give_blocks(short, self.blocks.take(len(short)))
            return rows
        in_need = set(self.batch.sequences(short))
        for seq in [seq for seq in self.running if seq in in_need]:  # the oldest first
            if seq.row is not None and self._make_room(seq, self.batch.length(seq), {}):
                self.batch.take_blocks(seq)
        return self.batch.ready()

    def _admit(self, budget: int, chunks: dict[Sequence, Chunk]) -> list[Failure]:
        failures: list[Failure] = []
        uncompiled = 0
        while budget > 0 and len(self.running) < self.max_num_seqs and (seq := self.waiting.peek()) is not None:
            try:
                if not self.constraints.ready(seq):
                    uncompiled += 1
                    self.waiting.set_aside()
                    continue
                slots = self.adapters.acquire(seq.digests)
            except ConstraintError as error:
                self.waiting.drop()
                failures.append(Failure(seq, str(error), "request"))
                continue
            except self._load_errors as error:
                self.waiting.drop()
                failures.append(Failure(seq, str(error), "adapter"))
                continue
            if slots is None:
                self.waiting.set_aside()
                continue
            seq.slots = dict(zip(seq.digests, slots, strict=True))
            try:
                for span in seq.spans:
                    self._check_set([seq.slots[a.digest] for a in span.adapters])
            except ValueError as error:
                self._give_back(seq)
                self.waiting.drop()
                failures.append(Failure(seq, str(error), "adapter"))
                continue
            if not self._fits(seq):
                self._give_back(seq)
                break
            room = min(budget, self._logit_room(seq, chunks))
            if not room:
                self._give_back(seq)
                break
            cached = self.blocks.match_prefix(seq) if seq.request.pooling is None else 0
            end = cached + min(seq.remaining, room)
            if not self.blocks.grow(seq, end):
                self._give_back(seq)
                break
            if seq.scheduled_at is None:
                seq.scheduled_at = time.monotonic()
                seq.cached_tokens = cached
                self.blocks.count_query(seq)
            self.waiting.admit(len(seq.tokens) - cached)
            self.running[seq] = self._outside[seq] = None
            chunks[seq] = Chunk(seq, cached, end)
            budget -= end - cached
        ahead = self.waiting.upcoming(LOOK_AHEAD)
        self.adapters.prefetch([digest for seq in ahead for digest in seq.digests])
        self.waiting_for_constraint = uncompiled
        self.waiting_for_adapter = self.waiting.set_aside_count - uncompiled
        self.waiting.resume()
        return failures

    def _ordered(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Decodes before prompts, each by adapter set: base, single adapters, larger sets, in the kernels' order."""
        groups: dict[tuple[bool, bytes], list[Chunk]] = {}
        for chunk in chunks:
            seq, start, end = chunk
            group = end - start > 1, seq.spans[-1].key
            if group in groups:
                groups[group].append(chunk)
            else:
                groups[group] = [chunk]

        def place(group: tuple[bool, bytes]) -> tuple[bool, int, list[tuple[int, ...]], bytes]:
            seq = groups[group][0].seq
            slots = seq.slots or {}
            places = [self._order(slots[a.digest]) for a in seq.current_span.adapters]
            return group[0], len(places), places, group[1]

        return [chunk for group in sorted(groups, key=place) for chunk in groups[group]]

    def _logit_room(self, seq: Sequence, chunks: dict[Sequence, Chunk]) -> int:
        """How many of the sequence's tokens the step may compute beside these chunks, for the logits that they need."""
        if not seq.scores_prompt:
            return self.max_batched_tokens
        return PROMPT_LOGIT_ROWS - sum(end - start for seq, start, end in chunks.values() if seq.scores_prompt)

    def _fits(self, seq: Sequence) -> bool:
        """Whether the whole of the sequence's present tokens could fit now: admitting less only leads to preemption.

        Cached blocks that nobody holds are counted as free here although the prefix would take them: `grow` decides.
        """
        missing = self.blocks.blocks_for(len(seq.tokens))
        return missing <= self.blocks.num_free or missing - self.blocks.cached_prefix(seq) <= self.blocks.num_free

    def _make_room(self, seq: Sequence, end: int, chunks: dict[Sequence, Chunk]) -> bool:
        """Blocks for tokens up to `end`; the youngest other sequence gives way, and `seq` itself when it is that."""
        while not self.blocks.grow(seq, end):
            victim = next(reversed(self.running))
            self.preempt(victim)
            chunks.pop(victim, None)
            if victim is seq:
                return False
        return True

    def _stop(self, seq: Sequence) -> None:
        """The sequence runs no more, and what it holds is freed."""
        del self.running[seq]
        if seq.row is None:
            del self._outside[seq]
        else:
            self.batch.leave(seq)
        self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        seq.pooled = None
        if seq.slots is not None:
            self.adapters.release(tuple(seq.slots))
            seq.slots = None
