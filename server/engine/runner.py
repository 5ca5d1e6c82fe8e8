"""One step on the device: chunks in, next tokens out."""

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.kernels.lora.interface import LoraBackend, Segment
from loramux.server.engine.attention import AttentionPath, Ints, StepPlaces
from loramux.server.engine.graphs import DecodeGraphs
from loramux.server.engine.loading import LoadedModel
from loramux.server.engine.sampler import best, sample
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import PENDING, Sequence, Span
from loramux.server.engine.staging import Download, Staging


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was handed to the device, which may still be computing it.

    `sampling` are the chunks that end at their sequence's last token: `tokens[i]` on the device is the next token of
    `sampling[i]`, -1 where the logits are not finite. `pooled` holds the means of the pooling requests that the step
    completes.
    """

    chunks: Seq[Chunk]
    sampling: Seq[Chunk]
    tokens: Tensor | None
    download: Download | None
    pooled: dict[Sequence, Download]

    def result(self) -> list[int]:
        """The next token of each chunk of `sampling`; waits for the device."""
        return [] if self.download is None else self.download.values()


class Runner:
    """Builds a step's inputs on the host, runs the model, chooses tokens. Remembers nothing of requests."""

    def __init__(
        self,
        model: LoadedModel,
        backend: LoraBackend,
        attention: AttentionPath,
        *,
        block_size: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`graphs` computes the steps that consist of decodes only; without it all steps run op by op."""
        self.model = model
        self.backend = backend
        self.attention = attention
        self.block_size = block_size
        self._graphs = graphs
        self._staging = Staging(model.device)
        for projection in model.projections:
            projection.backend = backend
        model.attach(attention.layers)
        self._heads = [p.site for p in model.projections if p.is_head and p.site is not None]

    @torch.inference_mode()
    def launch(self, chunks: Seq[Chunk], previous: Launched | None = None) -> Launched:
        """Starts the step of these chunks (decodes first); on a card it does not wait for the device.

        `previous` is the step before, needed when a chunk's last token is pending in it.
        """
        pooling = [seq.request.pooling for seq, _, _ in chunks if seq.pools]
        if pooling:
            with self.model.watching({layer for wanted in pooling if wanted for layer in wanted.layers}) as hidden:
                logits, sampling = self.forward(chunks, previous)
            pooled = self._pool(chunks, hidden)
        else:
            logits, sampling = self.forward(chunks, previous)
            pooled = {}
        if not sampling:
            return Launched(chunks, sampling, None, None, pooled)
        if all(seq.is_plain for seq, _, _ in sampling):
            tokens = best(logits)
            return Launched(chunks, sampling, tokens, Download(tokens), pooled)
        tokens = sample(
            logits,
            [seq.request.sampling for seq, _, _ in sampling],
            [end for _, _, end in sampling],
            {
                row: self._ends(seq)
                for row, (seq, _, end) in enumerate(sampling)
                if end - seq.prompt_len < seq.request.sampling.min_tokens
            },
            self._staging,
        )
        return Launched(chunks, sampling, tokens, Download(tokens), pooled)

    def _pool(self, chunks: Seq[Chunk], hidden: Mapping[int, Tensor]) -> dict[Sequence, Download]:
        """Adds the step's hidden states to its pooling requests; the answers of those that are complete."""
        done: dict[Sequence, Download] = {}
        first = 0
        for seq, start, end in chunks:
            last = first + end - start
            wanted = seq.request.pooling
            if wanted is not None:
                states = torch.stack([hidden[layer][first:last].float() for layer in wanted.layers])
                if wanted.tokens:
                    kept = states if seq.pooled is None else torch.cat([seq.pooled, states], dim=1)
                    seq.pooled = kept[:, -wanted.tokens :]
                else:
                    seq.pooled = states.sum(1) if seq.pooled is None else seq.pooled + states.sum(1)
                if end == len(seq.tokens):
                    done[seq] = Download(seq.pooled if wanted.tokens else seq.pooled / end)
            first = last
        return done

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk], previous: Launched | None = None) -> tuple[Tensor, list[Chunk]]:
        """Logits [rows, vocab] and the chunks they belong to (those that end at their sequence's last token)."""
        firsts = np.array([start for _, start, _ in chunks], dtype=np.int64)
        ends = np.array([end for _, _, end in chunks], dtype=np.int64)
        lengths = ends - firsts
        starts = np.concatenate([[0], np.cumsum(lengths)])
        if starts[-1] == len(chunks):
            ids = np.array([seq.tokens[start] for seq, start, _ in chunks], dtype=np.int64)
            positions = firsts
        else:
            ids = np.array([t for seq, start, end in chunks for t in seq.tokens[start:end]], dtype=np.int64)
            positions = np.arange(len(ids)) + np.repeat(firsts - starts[:-1], lengths)
        last = [i for i, (seq, _, end) in enumerate(chunks) if end == len(seq.tokens) and not seq.pools]
        sampling = [chunks[i] for i in last]
        rows = starts[1:][last] - 1
        wanted = rows if len(rows) else np.array([len(ids) - 1])
        device_ids, device_positions, device_rows = self._inputs(ids, positions, wanted, chunks, starts, previous)
        places = StepPlaces(lengths, ends, self._slots(chunks, positions, int(np.count_nonzero(lengths == 1))))
        segments = self._segments(chunks, starts)
        if self._graphs is not None and len(rows) == len(ids) and self._graphs.holds(len(ids)):
            logits = self._graphs.run(chunks, places, segments, device_ids, device_positions)
            return logits[: len(rows)], sampling
        state = self.model.state
        self.attention.begin(chunks, places)
        try:
            state.lora = self.backend.plan(segments, len(ids))
            if state.lora is not None and any(state.lora.touches(head) for head in self._heads):
                state.lora_rows = self.backend.plan(self._row_segments(sampling), len(wanted), lane="rows")
            logits = self.model.forward(device_ids, device_positions, device_rows)
        finally:
            self.attention.end()
            state.lora = state.lora_rows = None
        return logits[: len(rows)], sampling

    def _inputs(
        self, ids: Ints, positions: Ints, rows: Ints, chunks: Seq[Chunk], starts: Ints, previous: Launched | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids, positions and logit rows on the device; pending ids come from the step before, which lies there."""
        pending = np.flatnonzero(ids == PENDING)
        if not len(pending):
            device_ids, device_positions, device_rows = self._staging.upload(ids, positions, rows)
            return device_ids, device_positions, device_rows
        if previous is None or previous.tokens is None:
            raise ValueError("a token is pending, but no earlier step chose it")
        rows_before = {seq: row for row, (seq, _, _) in enumerate(previous.sampling)}
        owners = np.searchsorted(starts, pending, side="right") - 1
        sources = np.array([rows_before[chunks[owner][0]] for owner in owners.tolist()], dtype=np.int64)
        device_ids, device_positions, device_rows, target, source = self._staging.upload(
            ids, positions, rows, pending, sources
        )
        # A row without finite logits has -1: any token will do, since its sequence ends when the host sees it.
        device_ids.index_copy_(0, target, previous.tokens.index_select(0, source).clamp_(min=0))
        return device_ids, device_positions, device_rows

    def _slots(self, chunks: Seq[Chunk], positions: Ints, decodes: int) -> Ints:
        """Where each token's key and value go: block * block_size + offset."""
        size = self.block_size
        parts = [np.array([seq.blocks[start // size] for seq, start, _ in chunks[:decodes]], dtype=np.int64)]
        for c in chunks[decodes:]:
            held = np.asarray(c.seq.blocks[c.start // size : math.ceil(c.end / size)], dtype=np.int64)
            parts.append(held.repeat(_tokens_per_block(c, size)))
        return np.concatenate(parts) * size + positions % size

    def _ends(self, seq: Sequence) -> tuple[int, ...]:
        """The tokens that end the sequence, which may not come before `min_tokens` are there."""
        return (*self.model.eos_token_ids, *seq.request.sampling.stop_token_ids)

    def _segments(self, chunks: Seq[Chunk], starts: Ints) -> list[Segment]:
        """The step's tokens by adapter set; neighbours with the same set are one segment."""
        pieces: list[tuple[int, int, Chunk, Span]] = []
        for chunk, first in zip(chunks, starts.tolist(), strict=False):
            seq, start, end = chunk
            offset = first - start
            if len(seq.spans) == 1 and not seq.spans[0].adapters:
                continue
            for low, high, span in seq.spans_between(start, end):
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


def _tokens_per_block(chunk: Chunk, block_size: int) -> list[int]:
    """How many of the chunk's tokens lie in each block from its first to its last."""
    edges = [chunk.start, *range((chunk.start // block_size + 1) * block_size, chunk.end, block_size), chunk.end]
    return [high - low for low, high in itertools.pairwise(edges)]


def _segment(start: int, end: int, chunk: Chunk, span: Span) -> Segment:
    slots = chunk.seq.slots
    if slots is None:
        raise ValueError(f"request {chunk.seq.request_id} was scheduled without its adapters")
    return Segment(start, end, tuple((slots[a.digest], a.weight) for a in span.adapters))
