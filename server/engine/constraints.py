"""Constraints in the engine: matchers made beside the steps, and the masks that hold a batch's tokens to them.

A sequence waits in the queue until a thread of its own has compiled its constraint, as it waits for adapters. From then
on, in each step, after the model was launched: the matchers take the tokens of the step before, the masks of all
constrained rows are filled at once on the host's cores, and go to the device in one copy. A step without constrained
rows does nothing of this, and waits for nothing.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.server.engine.grammars import WORD_BITS, ConstraintError, Matcher, compile_constraint, make_tokenizer
from loramux.server.engine.pace import Pace
from loramux.server.engine.protocol import Constraint
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.staging import Staging
from loramux.server.engine.step import Ints

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLTokenizer

logger = logging.getLogger(__name__)

Words = npt.NDArray[np.int32]
Live = list[tuple[Matcher, int]]

MAX_KEPT = 64
MAX_KEPT_SECONDS = 8.0
"""Of processor time that the kept grammars took to compile, which is what is known of their size: 30 MB a second."""


class Constraints:
    """Makes matchers in a thread of its own. All methods are called from the engine's one thread."""

    def __init__(self, model_path: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...], limit: int) -> None:
        """Loads nothing yet. At most `limit` matchers are made or waiting for their sequences at a time."""
        self._maker = _Maker(model_path, vocab_size, eos_token_ids)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._limit = limit
        self._made: dict[Sequence, Future[Matcher]] = {}

    def prepare(self) -> None:
        """Starts loading the tokenizer, which is otherwise loaded for the first constraint."""
        self._thread.submit(self._maker.load)

    def ready(self, seq: Sequence) -> bool:
        """Whether the sequence has its matcher, or needs none. Begins to make it, as soon as there is room.

        Raises ConstraintError when its constraint cannot be followed.
        """
        constraint = seq.request.sampling.constraint
        if constraint is None or seq.matcher is not None:
            return True
        made = self._made.get(seq)
        if made is None:
            if len(self._made) < self._limit:
                self._made[seq] = self._thread.submit(self._maker.make, constraint)
            return False
        if not made.done():
            return False
        del self._made[seq]
        seq.matcher = made.result()
        return True

    def release(self, seq: Sequence) -> None:
        """The sequence has ended: what is made for it is not wanted any more."""
        made = self._made.pop(seq, None)
        if made is not None:
            made.cancel()

    def close(self) -> None:
        """Waits for the constraint that is being compiled, and drops the others."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Maker:
    """What the thread has: the tokenizer, and the constraints that were compiled lately."""

    def __init__(self, model_path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, tuple[Matcher, float]] = OrderedDict()

    def load(self) -> "LLTokenizer":
        """The model's tokenizer. Raises ConstraintError for a model without one that can be constrained."""
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(_definition(self._model_path), self._vocab_size, self._eos_token_ids)
        return self._tokenizer

    def make(self, constraint: Constraint) -> Matcher:
        """A matcher of one's own. Raises ConstraintError, whatever it is that fails."""
        try:
            return self._compiled(constraint).copy()
        except ConstraintError:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            logger.exception("a constraint could not be compiled")
            raise ConstraintError(f"it cannot be compiled: {type(error).__name__}") from error

    def _compiled(self, constraint: Constraint) -> Matcher:
        """The matcher at its beginning, kept while it is used and others are few and small."""
        found = self._kept.get(constraint)
        if found is None:
            tokenizer, began = self.load(), time.thread_time()
            found = compile_constraint(tokenizer, constraint), time.thread_time() - began
            self._kept[constraint] = found
            while len(self._kept) > MAX_KEPT or sum(s for _, s in self._kept.values()) > MAX_KEPT_SECONDS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(constraint)
        return found[0]


def _definition(model_path: Path) -> str:
    """The text of the model's tokenizer, as the API has it. Raises ConstraintError where there is none."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=False, local_files_only=True
        ).backend_tokenizer
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise ConstraintError("the model has no tokenizer that can be constrained") from error
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    text: str = copy.to_str()
    return text


@dataclass(slots=True)
class Held:
    """The rows of a step whose next tokens are constrained; `is_taken` once their matchers have those tokens."""

    rows: tuple[int, ...]
    seqs: tuple[Sequence, ...]
    is_taken: bool = False


class Masks:
    """Holds the constrained rows of a step to what their matchers allow. Engine thread only."""

    def __init__(self, device: torch.device) -> None:
        """Allocates nothing yet."""
        self._staging = Staging(device)
        self._executor: LLExecutor | None = None
        self._pace = Pace()
        self._buffer: Words = np.zeros(0, dtype=np.int32)

    def take(self, held: Held, tokens: Ints) -> None:
        """The matchers take the tokens int64 [rows] of their step, once; sequences that cannot go on are `broken`."""
        if held.is_taken:
            return
        held.is_taken = True
        live = [(matcher, i) for matcher, i in _live(held) if tokens[held.rows[i]] >= 0]
        if not live:
            return
        pairs = [(matcher.inner, int(tokens[held.rows[i]])) for matcher, i in live]
        self._pace.run(
            [matcher for matcher, _ in live],
            lambda: self._threads().consume_token_par(pairs),
            lambda i: pairs[i][0].consume_token(pairs[i][1]),
        )
        _check(held, live)

    def apply(self, logits: Tensor, held: Held, ends: Mapping[int, tuple[int, ...]]) -> Tensor:
        """The logits [rows, vocab] with -inf for each token that a row's matcher does not allow; those given stay.

        Tokens in `ends[i]` are impossible for row i, too, as long as others are allowed.
        """
        self._pace.next_step()
        live = _live(held)
        if not live:
            return logits
        rows, vocab = len(held.rows), logits.shape[1]
        flat, masks = self._filled(live, rows)
        _check(held, live)
        for i, row in enumerate(held.rows):
            if row in ends:
                _forbid(masks[i], ends[row])
        index, words = self._staging.upload(np.array(held.rows, dtype=np.int64), flat.view(np.int64))
        bytes_ = words.view(torch.uint8)[: masks.nbytes].view(rows, -1, 1)
        bits = bytes_ & (1 << torch.arange(8, dtype=torch.uint8, device=logits.device))
        forbidden = (bits == 0).view(rows, -1)[:, :vocab]
        if rows == len(logits):
            return logits.masked_fill(forbidden, float("-inf"))
        return logits.index_copy(0, index, logits.index_select(0, index).masked_fill(forbidden, float("-inf")))

    def _filled(self, live: Live, rows: int) -> tuple[Words, Words]:
        """A bit for each token of each row, all ones for rows that are not live: as one row, and as [rows, words]."""
        words = live[0][0].words
        size = rows * words
        size += size % 2  # whole 64-bit words are uploaded
        if self._buffer.size < size:
            self._buffer = np.empty(size, dtype=np.int32)
        flat = self._buffer[:size]
        flat.fill(-1)
        masks = flat[: rows * words].reshape(rows, words)
        matchers = [(matcher.inner, i) for matcher, i in live]
        self._pace.run(
            [matcher for matcher, _ in live],
            lambda: self._threads().unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks[0].nbytes, rows),
            lambda i: matchers[i][0].unsafe_compute_mask_ptr(masks[matchers[i][1]].ctypes.data, masks[0].nbytes),
        )
        return flat, masks

    def _threads(self) -> "LLExecutor":
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        return self._executor


def _live(held: Held) -> Live:
    """The matchers that still say something, each with its number among the rows."""
    return [
        (seq.matcher, i) for i, seq in enumerate(held.seqs)
        if seq.matcher is not None and seq.broken is None and not seq.has_ended
    ]  # fmt: skip


def _check(held: Held, live: Live) -> None:
    """Notes which matchers have failed."""
    for matcher, i in live:
        if (error := matcher.error) is not None:
            held.seqs[i].broken = f"the answer's constraint could not be followed any further: {error}"


def _forbid(mask: Words, token_ids: Seq[int]) -> None:
    """Clears the tokens' bits, unless no bit would be left: an answer that is complete ends."""
    before, unsigned = mask.copy(), mask.view(np.uint32)
    for token in token_ids:
        word, bit = divmod(token, WORD_BITS)
        if word < len(mask):
            unsigned[word] &= ~np.uint32(1 << bit)
    if not mask.any():
        mask[:] = before
