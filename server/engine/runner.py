"""One step on the device: chunks in, next tokens out."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loramux.kernels.lora.interface import LoraBackend
from loramux.server.engine.attention import AttentionPath
from loramux.server.engine.constraints import Held, Masks
from loramux.server.engine.graphs import DecodeGraphs
from loramux.server.engine.inputs import Scored, StepInputs, row_segments, step_inputs
from loramux.server.engine.loading import LoadedModel
from loramux.server.engine.logprobs import Scores, logprobs
from loramux.server.engine.penalties import Penalties
from loramux.server.engine.sampler import SamplingColumns, best, sample
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.staging import Download, Staging
from loramux.server.engine.step import Chunk, Ints, Step


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was handed to the device, which may still be computing it.

    `sampling` are the chunks that end at their sequence's last token: `tokens[i]` on the device is the next token of
    the i-th of them, -1 where the logits are not finite. `pooled` holds the means of the pooling requests that the step
    completes. `scores` are those of the chosen tokens, for the chunks of `sampling` that want them, whose numbers are
    `scored_rows`; `prompt_scores` those of the prompt tokens `scored_prompts`. `held` are the rows of `sampling` whose
    tokens are constrained.
    """

    step: Step
    sampling: Step
    tokens: Tensor | None
    download: Download | None
    pooled: dict[Sequence, Download]
    scored_rows: Seq[int] = ()
    scores: Scores | None = None
    scored_prompts: tuple[Scored, ...] = ()
    prompt_scores: Scores | None = None
    held: Held | None = None

    def result(self) -> Ints:
        """The next token of each chunk of `sampling`, int64; waits for the device."""
        return np.zeros(0, dtype=np.int64) if self.download is None else self.download.tensor().numpy()


class Runner:
    """Builds a step's inputs on the host, runs the model, chooses tokens.

    Remembers nothing of requests but the counts in `penalties`, which a sequence that ends has to give back.
    """

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
        self.penalties = Penalties(model.device)
        self._masks = Masks(model.device)
        self._score_staging = Staging(model.device)
        for projection in model.projections:
            projection.backend = backend
        model.attach(attention.layers)
        self._heads = [p.site for p in model.projections if p.is_head and p.site is not None]

    @torch.inference_mode()
    def launch(self, chunks: Seq[Chunk], previous: Launched | None = None) -> Launched:
        """Starts a step, or that of these chunks (single tokens first); on a card it does not wait for the device.

        `previous` is the step before, needed when a chunk's last token is pending in it. A step with constrained
        sequences waits, when the model is launched, for the tokens of the step before.
        """
        step = Step.of(chunks)
        inputs = step_inputs(step, self.block_size)
        pooling = [seq.request.pooling for seq, _, _ in step.chunks if seq.pools]
        if pooling:
            with self.model.watching({layer for wanted in pooling if wanted for layer in wanted.layers}) as hidden:
                logits = self.compute(inputs, previous)
            pooled = self._pool(step, hidden)
        else:
            logits = self.compute(inputs, previous)
            pooled = {}
        sampling = inputs.sampling
        held = self._held(sampling)
        if held is not None and previous is not None:
            self.take(previous)
        tokens = None if not len(sampling) else self._choose(logits[: len(sampling)], sampling, held)
        download = None if tokens is None else Download(tokens)
        return self._scored(Launched(step, sampling, tokens, download, pooled, held=held), inputs, logits)

    def take(self, launched: Launched) -> None:
        """The matchers of a step's constrained sequences take its tokens, if they have not yet; waits for them."""
        if launched.held is not None:
            self._masks.take(launched.held, launched.result())

    def _held(self, sampling: Step) -> Held | None:
        """The constrained rows of a step, if it has any."""
        layout = None if sampling.decodes is None else sampling.decodes.layout
        rows = [] if layout is None or not layout.is_constrained else list(enumerate(layout.seqs))
        rows += enumerate((seq for seq, _, _ in sampling.chunks), sampling.num_decodes)
        held = [(row, seq) for row, seq in rows if seq.matcher is not None]
        return Held(tuple(row for row, _ in held), tuple(seq for _, seq in held)) if held else None

    def _scored(self, launched: Launched, inputs: StepInputs, logits: Tensor) -> Launched:
        """The step with the log-probabilities that its requests want, if they do."""
        sampling, decodes = launched.sampling, launched.sampling.decodes
        found: dict[str, Any] = {}
        wanted = (decodes is not None and decodes.layout.is_scored) or any(
            seq.request.sampling.logprobs is not None for seq, _, _ in sampling.chunks
        )
        if wanted and launched.tokens is not None:
            seqs = [*(() if decodes is None else decodes.layout.seqs), *(seq for seq, _, _ in sampling.chunks)]
            rows = [i for i, seq in enumerate(seqs) if seq.request.sampling.logprobs is not None]
            tops = [seqs[i].request.sampling.logprobs or 0 for i in rows]
            (index,) = self._score_staging.upload(np.array(rows, dtype=np.int64))
            table = logprobs(logits.index_select(0, index), launched.tokens.index_select(0, index), max(tops))
            found.update(scored_rows=rows, scores=Scores(tops, table))
        if inputs.scored:
            ids = np.concatenate([np.array(p.seq.tokens[p.start : p.end], dtype=np.int64) for p in inputs.scored])
            tops = [p.seq.request.sampling.prompt_logprobs or 0 for p in inputs.scored for _ in range(len(p))]
            table = logprobs(logits[len(sampling) :], self._score_staging.upload(ids)[0], max(tops))
            found.update(scored_prompts=inputs.scored, prompt_scores=Scores(tops, table))
        return replace(launched, **found) if found else launched

    def _choose(self, logits: Tensor, sampling: Step, held: Held | None) -> Tensor:
        """The next token of each chunk, int64 on the device."""
        layout = None if sampling.decodes is None else sampling.decodes.layout
        if (layout is None or layout.is_plain) and all(seq.is_plain for seq, _, _ in sampling.chunks):
            return best(logits if held is None else self._constrained(logits, held, {}))
        settings = SamplingColumns.of([seq.request.sampling for seq, _, _ in sampling.chunks])
        positions = np.array([end for _, _, end in sampling.chunks], dtype=np.int64)
        free_at = np.array([seq.free_at for seq, _, _ in sampling.chunks], dtype=np.int64)
        others = seqs = tuple(seq for seq, _, _ in sampling.chunks)
        if layout is not None and sampling.decodes is not None:
            settings, seqs = layout.sampling.join(settings), layout.seqs + seqs
            positions = np.concatenate([sampling.decodes.ends, positions])
            free_at = np.concatenate([layout.free_at, free_at])
        banned = {row: self._ends(seqs[row]) for row in np.flatnonzero(positions < free_at).tolist()}
        adjusted = None
        if (layout is not None and layout.is_adjusted) or any(s.request.sampling.is_adjusted for s in others):
            adjusted = self.penalties.of(layout, others, logits.shape[1])
            logits = self.penalties.apply(logits, adjusted)
        if held is not None:
            logits = self._constrained(logits, held, banned)
            banned = {row: ends for row, ends in banned.items() if row not in held.rows}
        tokens = sample(logits, settings, positions, banned, self._staging)
        if adjusted is not None:
            self.penalties.count(adjusted, tokens)
        return tokens

    def _constrained(self, logits: Tensor, held: Held, banned: Mapping[int, tuple[int, ...]]) -> Tensor:
        """The logits with -inf for what the rows' constraints do not allow, and for their ends while they may not end.

        A sequence that ignores ends of sequences goes on for as long as its constraint allows more.
        """
        ends = {
            row: banned.get(row) or self.model.eos_token_ids for row, seq in zip(held.rows, held.seqs, strict=True)
            if row in banned or seq.request.sampling.ignore_eos
        }  # fmt: skip
        return self._masks.apply(logits, held, ends)

    def _pool(self, step: Step, hidden: Mapping[int, Tensor]) -> dict[Sequence, Download]:
        """Adds the step's hidden states to its pooling requests; the answers of those that are complete."""
        done: dict[Sequence, Download] = {}
        first = step.num_decodes
        for seq, start, end in step.chunks:
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
    def forward(self, chunks: Seq[Chunk], previous: Launched | None = None) -> tuple[Tensor, Step]:
        """Logits [rows, vocab] and the chunks they belong to (those that end at their sequence's last token)."""
        inputs = step_inputs(Step.of(chunks), self.block_size)
        return self.compute(inputs, previous)[: len(inputs.sampling)], inputs.sampling

    def compute(self, inputs: StepInputs, previous: Launched | None) -> Tensor:
        """Logits [len(inputs.rows), vocab]; the first rows are those of `inputs.sampling`."""
        rows, tokens = len(inputs.rows), len(inputs.ids)
        if self._graphs is not None and len(inputs.sampling) == tokens and self._graphs.holds(tokens):
            ids, positions = self._upload(inputs, previous)
            return self._graphs.run(inputs, ids, positions)[:rows]
        wanted = inputs.rows if rows else np.array([tokens - 1])
        ids, positions, device_rows = self._upload(inputs, previous, wanted)
        state = self.model.state
        self.attention.begin(inputs.places)
        try:
            state.lora = self.backend.plan(inputs.segments, tokens)
            if state.lora is not None and any(state.lora.touches(head) for head in self._heads):
                segments = row_segments(inputs.sampling, inputs.scored)
                state.lora_rows = self.backend.plan(segments, len(wanted), lane="rows")
            logits = self.model.forward(ids, positions, device_rows)
        finally:
            self.attention.end()
            state.lora = state.lora_rows = None
        return logits[:rows]

    def _upload(self, inputs: StepInputs, previous: Launched | None, *more: Ints) -> list[Tensor]:
        """ids, positions and more on the device; pending ids come from the step before, which lies there."""
        if not len(inputs.targets):
            return self._staging.upload(inputs.ids, inputs.positions, *more)
        if previous is None or previous.tokens is None:
            raise ValueError("a token is pending, but no earlier step chose it")
        *found, targets, sources = self._staging.upload(
            inputs.ids, inputs.positions, *more, inputs.targets, inputs.sources
        )
        # A row without finite logits has -1: any token will do, since its sequence ends when the host sees it.
        found[0].index_copy_(0, targets, previous.tokens.index_select(0, sources).clamp_(min=0))
        return found

    def _ends(self, seq: Sequence) -> tuple[int, ...]:
        """The tokens that end the sequence, which may not come before `min_tokens` are there."""
        return (*self.model.eos_token_ids, *seq.request.sampling.stop_token_ids)
