"""Which tokens of which sequences the next step computes.

Each step has a budget of tokens. Decoding sequences come first, one token each; then prompts that are partly computed;
then waiting requests, in order of arrival, in chunks that fill the budget. A request whose adapter is on its way to the
device waits alone. When blocks run out the youngest running sequence gives its blocks back and is recomputed later.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from loramux.server.engine.blocks import BlockManager
from loramux.server.engine.sequence import Sequence

LOOK_AHEAD = 8


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


class Chunk(NamedTuple):
    """Tokens [start, end) of one sequence, to be computed in this step."""

    seq: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that a next one is chosen."""
        return self.end == len(self.seq.tokens)


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence that left the queue because it can never run."""

    seq: Sequence
    message: str


class Scheduler:
    """Owns the queues. All methods are called from the engine's one thread."""

    def __init__(
        self,
        blocks: BlockManager,
        adapters: AdapterGate,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        check_set: Callable[[Seq[int]], None],
        order: Callable[[int], tuple[int, ...]],
        load_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        """`check_set` raises ValueError for a set of slots that the kernels cannot compute; `order` sorts slots as the
        kernels like to meet them."""
        self.blocks = blocks
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.waiting_for_adapter = 0
        self.preemptions = 0
        self._check_set = check_set
        self._order = order
        self._load_errors = load_errors

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[Chunk], list[Failure]]:
        """The next step's chunks (decodes first, each part in the kernels' order), and sequences that failed."""
        budget = self.max_batched_tokens
        block_size, preemptions = self.blocks.block_size, self.preemptions
        chunks: dict[Sequence, Chunk] = {}
        prefilling: list[Sequence] = []
        for seq in tuple(self.running):
            known, start = len(seq.tokens), seq.num_computed
            if known - start > 1:
                prefilling.append(seq)
            elif known - start < 1 or known >= seq.limit or budget == 0 or seq.slots is None:
                continue  # nothing to compute, or it was preempted for an earlier sequence of this very step
            elif known <= len(seq.blocks) * block_size or self._make_room(seq, known, chunks):
                chunks[seq] = Chunk(seq, start, known)
                budget -= 1
        for seq in prefilling:
            if budget == 0:
                break
            if seq.slots is None:
                continue
            start = seq.num_computed
            end = start + min(len(seq.tokens) - start, budget)
            if end <= len(seq.blocks) * block_size or self._make_room(seq, end, chunks):
                chunks[seq] = Chunk(seq, start, end)
                budget -= end - start
        if self.preemptions > preemptions:  # chunks were taken back
            budget = self.max_batched_tokens - sum(c.end - c.start for c in chunks.values())
        failures = self._admit(budget, chunks)
        return self._ordered(chunks.values()), failures

    def finish(self, seq: Sequence) -> None:
        """Takes the sequence out, wherever it is, and frees what it holds."""
        if seq in self.running:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
            self.adapters.abandon(seq.digests)

    def _admit(self, budget: int, chunks: dict[Sequence, Chunk]) -> list[Failure]:
        failures: list[Failure] = []
        blocked: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            try:
                slots = self.adapters.acquire(seq.digests)
            except self._load_errors as error:
                self.waiting.popleft()
                failures.append(Failure(seq, str(error)))
                continue
            if slots is None:
                blocked.append(self.waiting.popleft())
                continue
            seq.slots = dict(zip(seq.digests, slots, strict=True))
            try:
                for span in seq.spans:
                    self._check_set([seq.slots[a.digest] for a in span.adapters])
            except ValueError as error:
                self._give_back(seq)
                self.waiting.popleft()
                failures.append(Failure(seq, str(error)))
                continue
            if not self._fits(seq):
                self._give_back(seq)
                break
            cached = self.blocks.match_prefix(seq) if seq.request.pooling is None else 0
            end = cached + min(seq.remaining, budget)
            if not self.blocks.grow(seq, end):
                self._give_back(seq)
                break
            if seq.scheduled_at is None:
                seq.scheduled_at = time.monotonic()
                seq.cached_tokens = cached
                self.blocks.count_query(seq)
            self.waiting.popleft()
            self.running.append(seq)
            chunks[seq] = Chunk(seq, cached, end)
            budget -= end - cached
        ahead = islice(self.waiting, LOOK_AHEAD)
        self.adapters.prefetch([digest for seq in ahead for digest in seq.digests])
        self.waiting_for_adapter = len(blocked)
        self.waiting.extendleft(reversed(blocked))
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

    def _fits(self, seq: Sequence) -> bool:
        """Whether the whole of the sequence's present tokens could fit now: admitting less only leads to preemption.

        Cached blocks that nobody holds are counted as free here although the prefix would take them: `grow` decides.
        """
        missing = self.blocks.blocks_for(len(seq.tokens))
        return missing <= self.blocks.num_free or missing - self.blocks.cached_prefix(seq) <= self.blocks.num_free

    def _make_room(self, seq: Sequence, end: int, chunks: dict[Sequence, Chunk]) -> bool:
        """Blocks for tokens up to `end`; the youngest other sequence gives way, and `seq` itself when it is that."""
        while not self.blocks.grow(seq, end):
            victim = self.running[-1]
            self._preempt(victim)
            chunks.pop(victim, None)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _give_back(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        seq.pooled = None
        if seq.slots is not None:
            self.adapters.release(tuple(seq.slots))
            seq.slots = None
