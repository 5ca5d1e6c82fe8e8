"""A step's inputs on the host: the columns of its decodes, followed by those of its other chunks."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from loramux.kernels.attention.triton_plan import TableRows
from loramux.kernels.lora.interface import Segment
from loramux.server.engine.attention import StepPlaces
from loramux.server.engine.sequence import PENDING, Sequence
from loramux.server.engine.step import Chunk, Decodes, Ints, Step, segment


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt tokens [start, end) of a sequence, whose log-probabilities are wanted."""

    seq: Sequence
    start: int
    end: int

    def __len__(self) -> int:
        """How many they are."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the device and the plans of a step are given. All arrays int64.

    `ids` and `positions` [tokens]. `rows` are the tokens whose logits are wanted: one for each chunk of `sampling` in
    order, then those before the prompt tokens of `scored`. Token `targets[i]` is pending: it is number `sources[i]` of
    those that the step before chose. `segments` are the tokens by adapter set.
    """

    ids: Ints
    positions: Ints
    rows: Ints
    sampling: Step
    targets: Ints
    sources: Ints
    places: StepPlaces
    segments: tuple[Segment, ...]
    scored: tuple[Scored, ...] = ()


def step_inputs(step: Step, block_size: int) -> StepInputs:
    """The inputs of a step."""
    if step.decodes is None:
        return _of_chunks(step.chunks, 0, block_size)
    decodes = _of_decodes(step.decodes)
    if not step.chunks:
        return decodes
    chunks = _of_chunks(step.chunks, len(step.decodes), block_size)
    return StepInputs(
        np.concatenate([decodes.ids, chunks.ids]),
        np.concatenate([decodes.positions, chunks.positions]),
        np.concatenate([decodes.rows, chunks.rows]),
        Step(step.decodes, chunks.sampling.chunks),
        np.concatenate([decodes.targets, chunks.targets]),
        np.concatenate([decodes.sources, chunks.sources]),
        decodes.places.followed_by(chunks.places),
        (*decodes.segments, *chunks.segments),
        chunks.scored,
    )


def row_segments(sampling: Step, scored: Seq[Scored] = ()) -> list[Segment]:
    """The rows of logits by adapter set, for adapters on the output projection."""
    decodes = () if sampling.decodes is None else sampling.decodes.layout.segments
    segments = [Segment(row, row + 1, s.adapters) for s in decodes for row in range(s.start, s.end)]
    for row, chunk in enumerate(sampling.chunks, sampling.num_decodes):
        (_, _, span) = chunk.seq.spans_between(chunk.end - 1, chunk.end)[0]
        if span.adapters:
            segments.append(segment(row, row + 1, chunk.seq, span))
    first = len(sampling)
    for part in scored:
        for low, high, span in part.seq.spans_between(part.start - 1, part.end - 1):
            if span.adapters:
                place = first + low - (part.start - 1)
                segments.append(segment(place, place + high - low, part.seq, span))
        first += len(part)
    return segments


def _of_decodes(decodes: Decodes) -> StepInputs:
    """Each decode is one token, whose logits are wanted."""
    layout = decodes.layout
    targets = np.flatnonzero(decodes.ids == PENDING)
    count = len(decodes)
    return StepInputs(
        decodes.ids,
        decodes.ends - 1,
        np.arange(count),
        Step(decodes, []),
        targets,
        decodes.sources[targets],
        StepPlaces(
            np.ones(count, dtype=np.int64), decodes.ends, decodes.slots, TableRows(decodes.tables, layout.rows),
            layout.seqs,
        ),
        layout.segments,
    )  # fmt: skip


def _of_chunks(chunks: Seq[Chunk], first: int, block_size: int) -> StepInputs:
    """Chunks whose tokens lie in the step from `first` on."""
    starts = np.array([start for _, start, _ in chunks], dtype=np.int64)
    ends = np.array([end for _, _, end in chunks], dtype=np.int64)
    lengths = ends - starts
    behind = np.cumsum(lengths)
    ids = np.array([token for seq, start, end in chunks for token in seq.tokens[start:end]], dtype=np.int64)
    positions = np.arange(len(ids)) + np.repeat(starts - behind + lengths, lengths)
    blocks = [np.asarray(seq.blocks)[np.arange(start, end) // block_size] for seq, start, end in chunks]
    last = [i for i, chunk in enumerate(chunks) if chunk.samples]
    scored = _scored(chunks)
    before = [first + behind[i] - chunks[i].end + np.arange(part.start - 1, part.end - 1) for i, part in scored]
    targets = np.flatnonzero(ids == PENDING)
    owners = np.searchsorted(behind, targets, side="right").tolist()
    return StepInputs(
        ids,
        positions,
        np.concatenate([first + behind[last] - 1, *before]),
        Step(None, [chunks[i] for i in last]),
        first + targets,
        np.array([chunks[i].seq.source for i in owners], dtype=np.int64),
        StepPlaces(
            lengths, ends, np.concatenate(blocks) * np.int64(block_size) + positions % block_size,
            TableRows.of([seq.blocks for seq, _, _ in chunks]), tuple(seq for seq, _, _ in chunks),
        ),
        tuple(_segments(chunks, (first + behind - lengths).tolist())),
        tuple([part for _, part in scored]),
    )  # fmt: skip


def _scored(chunks: Seq[Chunk]) -> list[tuple[int, Scored]]:
    """What is wanted of prompts: by the chunk's number, the tokens that the chunk's logits say something of."""
    found = []
    for i, (seq, start, end) in enumerate(chunks):
        if seq.scores_prompt:
            part = Scored(seq, max(start, seq.num_scored) + 1, min(end, seq.prompt_len - 1) + 1)
            if len(range(part.start, part.end)):
                found.append((i, part))
    return found


def _segments(chunks: Seq[Chunk], places: Seq[int]) -> list[Segment]:
    """The chunks' tokens by adapter set, the first of each at its place; neighbours with the same set are one."""
    segments: list[Segment] = []
    for (seq, start, end), place in zip(chunks, places, strict=True):
        for low, high, span in seq.spans_between(start, end):
            if not span.adapters:
                continue
            found = segment(place + low - start, place + high - start, seq, span)
            if segments and segments[-1].end == found.start and segments[-1].adapters == found.adapters:
                found = Segment(segments.pop().start, found.end, found.adapters)
            segments.append(found)
    return segments
