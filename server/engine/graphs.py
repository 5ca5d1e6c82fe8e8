"""Decode steps as captured CUDA graphs: one launch per step instead of hundreds.

A graph is bound to a number of rows and to the LoRA launches that it holds (none for a batch of base requests). Its
inputs, block tables and adapter records lie in static buffers that each step rewrites, so one graph serves every batch
of up to that many rows with any mix of adapters. Rows beyond the batch are padding: they write no keys.
"""

import itertools
import logging
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loramux.kernels.attention.triton_plan import TableRows
from loramux.kernels.lora.interface import LoraBackend, LoraPlan
from loramux.server.engine.attention import AttentionPath, StepPlaces
from loramux.server.engine.inputs import StepInputs, row_segments
from loramux.server.engine.loading import LoadedModel

logger = logging.getLogger(__name__)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of rows that graphs are captured for, largest first: 1, 2, multiples of 4 to 32, 8, 16, 32.

    A batch runs on the next larger one: beyond 16 rows less than a fifth is padding.
    """
    sizes = {1, 2, max_num_seqs}
    for step, end in ((4, 32), (8, 64), (16, 256), (32, max_num_seqs)):
        sizes.update(range(step, end + 1, step))
    return sorted((size for size in sizes if size <= max_num_seqs), reverse=True)


class DecodeGraphs:
    """The decode steps of one model over static inputs, captured or (without `capture`) op by op."""

    def __init__(
        self,
        model: LoadedModel,
        backend: LoraBackend,
        attention: AttentionPath,
        *,
        max_rows: int,
        capture: bool = True,
    ) -> None:
        """Captures nothing yet; see `capture`."""
        self._model = model
        self._backend = backend
        self._attention = attention
        self._sizes = graph_sizes(max_rows)
        self._capturing = capture
        self._heads = [p.site for p in model.projections if p.is_head and p.site is not None]
        self._graphs: dict[tuple[int, Hashable, Hashable], torch.cuda.CUDAGraph] = {}
        with torch.inference_mode(False):
            self._ids = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
            self._positions = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
            self._rows = torch.arange(max_rows, device=model.device)
            self._logits = torch.zeros(max_rows, model.num_logits, dtype=model.dtype, device=model.device)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def holds(self, rows: int) -> bool:
        """Whether a decode step of so many sequences can run here."""
        return rows <= self._sizes[0]

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every graph, largest first, in one memory pool.

        A model whose code cannot be captured (it looks at numbers on the host) is served op by op, with a warning.
        """
        if not self._capturing:
            return
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream(self._model.device)
        none = np.zeros(0, dtype=np.int64)
        nothing = StepPlaces(none, none, none, TableRows.of(()), ())
        for size in self._sizes:
            self._attention.begin(nothing, decode_rows=size)
            try:
                for plan in itertools.chain([None], self._backend.capture_plans(size)):
                    self._capture_one(size, plan, None, pool)
                    if plan is not None and self._heads:
                        for rows in self._backend.capture_plans(size, "rows"):
                            self._capture_one(size, plan, rows, pool)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
                logger.warning(
                    "decode steps run without CUDA graphs: %s cannot be captured (%s)",
                    type(self._model.module).__name__, str(error).splitlines()[0],
                )  # fmt: skip
                self._graphs.clear()
                self._sizes = [0]
                return
            finally:
                self._attention.end()
        torch.cuda.synchronize(self._model.device)

    def _capture_one(self, size: int, plan: LoraPlan | None, rows: LoraPlan | None, pool: Any) -> None:
        state = self._model.state
        state.lora, state.lora_rows = plan, rows
        try:
            side = torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self._model.device))
            with torch.cuda.stream(side):  # compiles kernels and fills library work spaces, which no capture may do
                self._compute(size)
            torch.cuda.current_stream(self._model.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._compute(size)
        finally:
            state.lora = state.lora_rows = None
        self._graphs[size, _key(plan), _key(rows)] = graph

    def run(self, inputs: StepInputs, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [padded rows, vocab] of a step of single tokens that all have a next one, valid until the next call.

        ids and positions are those of the inputs, on the device. A batch whose launches were not captured runs op by
        op.
        """
        rows = len(inputs.ids)
        size = min(size for size in self._sizes if size >= rows)
        for static, given in ((self._ids, ids), (self._positions, positions)):
            static[:rows].copy_(given)
            if rows < size:
                static[rows:size].zero_()
        state = self._model.state
        self._attention.begin(inputs.places, decode_rows=size)
        try:
            state.lora = self._backend.plan(inputs.segments, size, padded=True)
            if state.lora is not None and any(state.lora.touches(head) for head in self._heads):
                state.lora_rows = self._backend.plan(row_segments(inputs.sampling), size, lane="rows", padded=True)
            graph = self._graphs.get((size, _key(state.lora), _key(state.lora_rows)))
            if graph is None:
                self._compute(size)
            else:
                graph.replay()
        finally:
            self._attention.end()
            state.lora = state.lora_rows = None
        return self._logits[:size]

    def _compute(self, size: int) -> None:
        self._logits[:size].copy_(self._model.forward(self._ids[:size], self._positions[:size], self._rows[:size]))


def _key(plan: LoraPlan | None) -> Hashable:
    """None without adapters; a plan whose launches are its own has a key that no captured graph has."""
    return None if plan is None else (plan.graph_key,)
