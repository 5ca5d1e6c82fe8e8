"""One step on the device: chunks in, next tokens out."""

import itertools
import math
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.kernels.lora.interface import LoraBackend, Segment
from loramux.server.engine.attention import AttentionStep, DecodeGroup, DecodeRows, PrefillPiece
from loramux.server.engine.loading import LoadedModel
from loramux.server.engine.sampler import sample
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence, Span

READ_STEP = 16
Ints = npt.NDArray[np.int64]


class WorkspaceRows:
    """Which decoding sequence has which row of the decode workspace, and how many of its tokens are in it.

    A step sees the workspace as [rows, width] with rows * width <= max_tokens; a new width moves every row, so all
    are filled again. Widths are multiples of `WIDTH_STEP`, which makes that rare.
    """

    WIDTH_STEP = 64

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.width = 0
        self._rows: dict[Sequence, int] = {}
        self._filled: dict[Sequence, int] = {}

    def place(self, decodes: Seq[Chunk]) -> list[tuple[int, int]] | None:
        """For each decode its row and the tokens already in it; None when the padding would cost too much.

        Rows of sequences that are not decoding now are free; a new sequence takes the lowest free row.
        """
        present = {c.seq for c in decodes}
        for gone in [seq for seq in self._rows if seq not in present]:
            del self._rows[gone], self._filled[gone]
        if not decodes:
            return None
        if any(row >= 2 * len(decodes) for row in self._rows.values()):
            self._forget()
        longest = -(-max(c.end for c in decodes) // self.WIDTH_STEP) * self.WIDTH_STEP
        if not longest <= self.width <= 2 * longest:
            self.width = longest
            self._filled = dict.fromkeys(self._filled, 0)
        height = max(len(decodes), max(self._rows.values(), default=-1) + 1)
        if height * self.width > min(self.max_tokens, 4 * sum(c.end for c in decodes) + 2 * self.WIDTH_STEP * height):
            self._forget()
            return None
        taken = set(self._rows.values())
        free = (row for row in range(2 * len(decodes)) if row not in taken)
        placed = []
        for chunk in decodes:
            if chunk.seq not in self._rows:
                self._rows[chunk.seq] = next(free)
                self._filled[chunk.seq] = 0
            held = self._filled[chunk.seq] if self._filled[chunk.seq] == chunk.start else 0
            placed.append((self._rows[chunk.seq], held))
            self._filled[chunk.seq] = chunk.end
        return placed

    def _forget(self) -> None:
        self._rows.clear()
        self._filled.clear()


class Runner:
    """Builds a step's inputs on the host, runs the model, chooses tokens.

    Of requests it remembers only where their keys lie in the decode workspace.
    """

    def __init__(self, model: LoadedModel, backend: LoraBackend, *, block_size: int) -> None:
        """The model's cache is allocated already, with or without a decode workspace."""
        self.model = model
        self.backend = backend
        self.block_size = block_size
        self._workspace = WorkspaceRows(model.workspace_tokens) if model.workspace_tokens else None
        for projection in model.projections:
            projection.backend = backend
        self._heads = [p.site for p in model.projections if p.is_head and p.site is not None]

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk]) -> dict[str, int]:
        """Computes the chunks (decodes first) and returns the next token of each sequence whose last token was among
        them; -1 where the logits are not finite."""
        logits, sampling = self.forward(chunks)
        if not sampling:
            return {}
        tokens = sample(
            logits,
            [c.seq.request.sampling for c in sampling],
            [len(c.seq.tokens) for c in sampling],
            [self._banned(c) for c in sampling],
        )
        return {c.seq.request_id: t for c, t in zip(sampling, tokens, strict=True)}

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> tuple[Tensor, list[Chunk]]:
        """Logits [rows, vocab] and the chunks they belong to (those that end at their sequence's last token)."""
        device = self.model.device
        ids = [t for c in chunks for t in c.seq.tokens[c.start : c.end]]
        positions = np.concatenate([np.arange(c.start, c.end) for c in chunks])
        starts = np.cumsum([0] + [c.end - c.start for c in chunks])
        sampling = [c for c in chunks if c.samples]
        rows = [int(starts[i + 1]) - 1 for i, c in enumerate(chunks) if c.samples]
        state = self.model.state
        state.attention = self._attention(chunks, positions, starts)
        state.lora = self.backend.plan(self._segments(chunks, starts), len(ids))
        state.lora_rows = None
        if state.lora is not None and any(state.lora.touches(head) for head in self._heads):
            state.lora_rows = self.backend.plan(self._row_segments(sampling), max(len(rows), 1), lane="rows")
        try:
            logits = self.model.forward(
                torch.tensor(ids, device=device),
                torch.from_numpy(positions).to(device),
                torch.tensor(rows or [len(ids) - 1], device=device),
            )
        finally:
            state.attention = state.lora = state.lora_rows = None
        return logits[: len(rows)], sampling

    def _banned(self, chunk: Chunk) -> tuple[int, ...]:
        """Tokens that may not come next: the ends of generation, until `min_tokens` are there."""
        sampling = chunk.seq.request.sampling
        if chunk.seq.num_output >= sampling.min_tokens:
            return ()
        return (*self.model.eos_token_ids, *sampling.stop_token_ids)

    def _segments(self, chunks: Seq[Chunk], starts: Ints) -> list[Segment]:
        """The step's tokens by adapter set; neighbours with the same set are one segment."""
        pieces: list[tuple[int, int, Chunk, Span]] = []
        for i, chunk in enumerate(chunks):
            offset = int(starts[i]) - chunk.start
            for low, high, span in chunk.seq.spans_between(chunk.start, chunk.end):
                if not span.adapters:
                    continue
                if pieces and pieces[-1][3].key == span.key and pieces[-1][1] == offset + low:
                    pieces[-1] = (pieces[-1][0], offset + high, chunk, span)
                else:
                    pieces.append((offset + low, offset + high, chunk, span))
        return [_segment(low, high, chunk, span) for low, high, chunk, span in pieces]

    def _row_segments(self, sampling: Seq[Chunk]) -> list[Segment]:
        """The logit rows by adapter set, for adapters on the output projection."""
        segments = []
        for i, chunk in enumerate(sampling):
            (_, _, span) = chunk.seq.spans_between(chunk.end - 1, chunk.end)[0]
            if span.adapters:
                segments.append(_segment(i, i + 1, chunk, span))
        return segments

    def _attention(self, chunks: Seq[Chunk], positions: Ints, starts: Ints) -> AttentionStep:
        device = self.model.device
        held = np.concatenate([
            np.asarray(c.seq.blocks[c.start // self.block_size : math.ceil(c.end / self.block_size)]).repeat(
                _tokens_per_block(c, self.block_size)
            )
            for c in chunks
        ])  # fmt: skip
        slots = held * self.block_size + positions % self.block_size
        decodes = [c for c in chunks if c.end - c.start == 1]
        n = len(decodes)
        if any(c.end - c.start == 1 for c in chunks[n:]):
            raise ValueError("single-token chunks come first")
        placed = None if self._workspace is None else self._workspace.place(decodes)
        prefills = []
        for i in range(n, len(chunks)):
            c = chunks[i]
            blocks = None
            if c.start:
                blocks = torch.tensor(c.seq.blocks[: math.ceil(c.end / self.block_size)], device=device)
            prefills.append(PrefillPiece(int(starts[i]), int(starts[i + 1]), c.end, blocks))
        return AttentionStep(
            slot_mapping=torch.from_numpy(slots).to(device),
            num_decodes=n,
            groups=[] if placed is not None else self._groups(decodes),
            rows=None
            if placed is None or self._workspace is None
            else self._rows(decodes, placed, self._workspace.width),
            prefills=prefills,
        )

    def _rows(self, decodes: Seq[Chunk], placed: Seq[tuple[int, int]], width: int) -> DecodeRows:
        device = self.model.device
        lens = np.ones(max(row for row, _ in placed) + 1, dtype=np.int64)
        refill = []
        for chunk, (row, held) in zip(decodes, placed, strict=True):
            lens[row] = chunk.end
            if held == 0:
                blocks = chunk.seq.blocks[: math.ceil(chunk.start / self.block_size)]
                refill.append((row, torch.tensor(blocks, dtype=torch.long, device=device), chunk.start))
        return DecodeRows(
            rows=torch.tensor([row for row, _ in placed], device=device),
            columns=torch.tensor([c.start for c in decodes], device=device),
            lens=torch.from_numpy(lens).to(device),
            refill=refill,
            width=width,
            read=-(-int(lens.max()) // READ_STEP) * READ_STEP,
        )

    def _groups(self, decodes: Seq[Chunk]) -> list[DecodeGroup]:
        """Decodes by powers of two of their context, those up to 128 together: padding is within 2x or 128 tokens."""
        device = self.model.device
        classes: dict[int, list[int]] = {}
        for i, chunk in enumerate(decodes):
            classes.setdefault(max(64, chunk.end - 1).bit_length(), []).append(i)
        groups = []
        for members in classes.values():
            width = max(math.ceil(decodes[i].end / self.block_size) for i in members)
            blocks = np.zeros((len(members), width), dtype=np.int64)
            for row, i in enumerate(members):
                own = decodes[i].seq.blocks[: math.ceil(decodes[i].end / self.block_size)]
                blocks[row] = own[0]  # padding reads a block of the sequence's own, which is finite
                blocks[row, : len(own)] = own
            everyone = len(members) == len(decodes)
            groups.append(DecodeGroup(
                tokens=None if everyone else torch.tensor(members, device=device),
                blocks=torch.from_numpy(blocks).to(device),
                lens=torch.tensor([decodes[i].end for i in members], device=device),
            ))  # fmt: skip
        return groups


def _tokens_per_block(chunk: Chunk, block_size: int) -> list[int]:
    """How many of the chunk's tokens lie in each block from its first to its last."""
    edges = [chunk.start, *range((chunk.start // block_size + 1) * block_size, chunk.end, block_size), chunk.end]
    return [high - low for low, high in itertools.pairwise(edges)]


def _segment(start: int, end: int, chunk: Chunk, span: Span) -> Segment:
    slots = chunk.seq.slots
    if slots is None:
        raise ValueError(f"request {chunk.seq.request_id} was scheduled without its adapters")
    return Segment(start, end, tuple((slots[a.digest], a.weight) for a in span.adapters))
