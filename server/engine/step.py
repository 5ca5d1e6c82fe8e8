"""What one step computes: the decodes, as columns of the decode batch, and the chunks of everything else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from loramux.kernels.lora.interface import Segment
from loramux.server.engine.sampler import SamplingColumns
from loramux.server.engine.sequence import Sequence as Seq
from loramux.server.engine.sequence import Span

Ints = npt.NDArray[np.int64]
Tables = npt.NDArray[np.int32]


class Chunk(NamedTuple):
    """Tokens [start, end) of one sequence, to be computed in this step."""

    seq: Seq
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the last token of a sequence that generates, so that a next one is chosen."""
        return self.seq.generates and self.end == len(self.seq.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Rows of the decode batch in a step's order, and what follows from them alone.

    It is kept, as the same object, while the steps have the same rows, so that what is built from it may be kept too.
    `segments` are the decodes by adapter set. `is_plain`: all rows take their best token, whatever it is. Tokens that
    end a sequence are impossible for row i before position `free_at[i]`. `is_adjusted`: some row's logits are changed
    by penalties or biases; `is_scored`: some row's log-probabilities are wanted; `is_constrained`: some row's sequence
    has a matcher.
    """

    rows: Ints
    seqs: tuple[Seq, ...]
    request_ids: tuple[str, ...]
    segments: tuple[Segment, ...]
    sampling: SamplingColumns
    free_at: Ints
    is_plain: bool
    is_adjusted: bool
    is_scored: bool
    is_constrained: bool


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """One token each of the sequences of a layout, as arrays over its rows.

    `ends` are the tokens that a sequence has, the one to be computed included; `ids` is that token, `PENDING` where
    the device has it as number `sources` of the step before. `slots` is where its key and value go: block *
    block_size + offset, from the block tables `tables[rows]`. `serials` tell a row's sequence from later ones.
    """

    layout: Layout
    serials: Ints
    ids: Ints
    ends: Ints
    sources: Ints
    slots: Ints
    tables: Tables

    def __len__(self) -> int:
        """How many there are."""
        return len(self.layout.seqs)


class Step(Sequence[Chunk]):
    """The chunks of a step: decodes first, then the rest, single tokens first. Decodes become chunks when looked at."""

    def __init__(self, decodes: Decodes | None, chunks: list[Chunk]) -> None:
        """`decodes` None stands for none; `chunks` may be all there is."""
        self.decodes = decodes if decodes is not None and len(decodes) else None
        self.chunks = chunks

    @staticmethod
    def of(chunks: Sequence[Chunk]) -> "Step":
        """The step of these chunks."""
        return chunks if isinstance(chunks, Step) else Step(None, list(chunks))

    @property
    def num_decodes(self) -> int:
        """How many of the chunks are rows of the decode batch."""
        return 0 if self.decodes is None else len(self.decodes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return self.num_decodes + sum(chunk.end - chunk.start for chunk in self.chunks)

    def __len__(self) -> int:
        return self.num_decodes + len(self.chunks)

    def __iter__(self) -> Iterator[Chunk]:
        if self.decodes is not None:
            for seq, end in zip(self.decodes.layout.seqs, self.decodes.ends.tolist(), strict=True):
                yield Chunk(seq, end - 1, end)
        yield from self.chunks

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        return list(self)[index]


def segment(start: int, end: int, seq: Seq, span: Span) -> Segment:
    """Tokens [start, end) of a step, which belong to a sequence that holds its adapters."""
    slots = seq.slots
    if slots is None:
        raise ValueError(f"request {seq.request_id} was scheduled without its adapters")
    return Segment(start, end, tuple((slots[a.digest], a.weight) for a in span.adapters))
