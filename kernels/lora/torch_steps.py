"""What a plan does at one site, in order: scale the input, shrink, scale the output, expand.

A `GroupStep` computes a group of entries from the rows of a bank in one batched product each, a `LongStep` one entry
from its adapter's own tensors. `TorchLoraBackend` decides which (see `torch_backend`, which has the equation too).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import Site
from .torch_bank import Bank, Run, SiteTensors
from .torch_plan import Group

_IN_PLACE_TOKENS = 16
"""From here on a group's products go straight into out, chunk by chunk; below, one product and one sum are cheaper."""
_SUM = 0
"""`torch.embedding_bag`'s mode that adds up."""


class Steady(NamedTuple):
    """The whole of a site in a steady decode step: h = x A [tokens, in, R], out += h B [tokens * chunks, r, width]."""

    A: Tensor
    B: Tensor
    rank: int
    width: int


class Bags:
    """Which rows of a bank's B each token and chunk of a group sums up; made once per plan for all sites."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def of(self, group: Group, chunks: int, rank: int) -> tuple[Tensor, Tensor]:
        """(rows of B as [rows * chunks * r, g], int64 [m * chunks * r]; where each bag of r begins, [m * chunks])."""
        key = (id(group), chunks, rank)
        if key not in self._made:
            size = chunks * rank
            numbers = group.rows.index
            if numbers is None:
                numbers = torch.arange(group.rows.start, group.rows.stop, device=self._device)
            rows = (numbers.unsqueeze(1) * size + torch.arange(size, device=self._device)).view(-1)
            self._made[key] = rows, torch.arange(0, len(rows), rank, device=self._device)
        return self._made[key]


class GroupStep:
    """One group at one site: views of the bank that are made once per plan, and the products over them."""

    def __init__(self, bank: Bank, group: Group, bags: Bags | None = None) -> None:
        """`bags` makes the expand of a group of one token per entry a weighted sum of B's rows."""
        # The tensors, not the bank: a later plan may move the bank's rows to new tensors while this one is in use.
        self._A, self._B, self._scale, self._group = bank.A, tuple(bank.B), bank.scale, group
        self._runs = tuple(zip(bank.runs, bank.spread, range(len(bank.runs)), strict=True))
        only = bank.runs[0]
        self.direct = (
            group.aligned and group.length == 1 and len(bank.runs) == 1 and only.out_features == bank.site.out_features
        )
        self._bags = None
        if bags is not None and group.length == 1:
            self._bags = [bags.of(group, run.num_chunks, run.rank) for run in bank.runs]
        # Copies of a gather group are made at each use: they would otherwise double the memory of every site.
        kept = group.rows.index is None
        self._kept_A = self._shrink_weights() if kept else None
        self._kept_B = self._expand_weights() if kept and self._bags is None else None

    def steady(self, num_tokens: int) -> Steady | None:
        """The two products that are all there is to do, if one token each of this group's rows is the whole step."""
        run, spread, _ = self._runs[0]
        if self._kept_A is None or self._kept_A[1] is not None or self._kept_B is None or spread is not None:
            return None
        whole = self.direct and self._group.source.index is None and self._group.count == num_tokens
        return Steady(self._kept_A[0], self._kept_B[0], run.rank, run.width) if whole else None

    def _shrink_weights(self) -> tuple[Tensor, Tensor | None]:
        """A as [m, in, R] (for bags [m, R, in]), and what h is multiplied by."""
        group = self._group
        A, scale = group.rows.take(self._A), group.weights
        if self._scale is not None:
            own = group.rows.take(self._scale).unsqueeze(1)
            scale = own if scale is None else own * scale
        return A if self._bags is not None else A.transpose(1, 2), scale

    def _expand_weights(self) -> list[Tensor]:
        """B of each run, [m * chunks, r, g]."""
        group = self._group
        return [
            group.rows.take(stacked).view(group.count * run.num_chunks, run.rank, run.width)
            for (run, _, _), stacked in zip(self._runs, self._B, strict=True)
        ]

    def shrink(self, x: Tensor) -> Tensor:
        """h [m, length, R], scaled."""
        group = self._group
        A, scale = self._kept_A or self._shrink_weights()
        inputs = group.source.take(x).to(A.dtype)
        if self._bags is None:
            h = torch.bmm(inputs.view(group.count, group.length, -1), A)
        else:
            h = torch.bmm(A, inputs.view(group.count, -1, 1)).view(group.count, 1, -1)
        return h if scale is None else h.mul_(scale)

    def expand(self, h: Tensor, out: Tensor, gates: Tensor | None) -> None:
        """Adds the group's term to out."""
        group = self._group
        B = [] if self._bags is not None else self._kept_B or self._expand_weights()
        if gates is not None:
            h.mul_(group.gates(gates))
        in_place = self._bags is None and out.dtype == h.dtype
        if self.direct and in_place and out.is_contiguous():
            run, spread, _ = self._runs[0]
            target = group.sums[0][0].take(out).view(-1, 1, run.width)
            target.baddbmm_(self._by_chunk(h, run, spread), B[0])
            return
        for run, spread, number in self._runs:
            columns = out[:, run.column : run.column + run.out_features]
            if not group.aligned:
                y = self._run(h, run, spread, B, number).transpose(1, 2)
                self._add_run(y.reshape(group.count * group.length, run.out_features), columns)
                continue
            target = group.sums[0][0].take(columns)
            target = target.view(group.count, group.length, run.num_chunks, run.width)
            if in_place and group.length >= _IN_PLACE_TOKENS:
                self._add_by_chunk(h, run, B[number], target)
            else:
                target.add_(self._run(h, run, spread, B, number).transpose(1, 2))

    def _by_chunk(self, h: Tensor, run: Run, spread: Tensor | None) -> Tensor:
        """The run's columns of h, one matrix per row and chunk: [m * chunks, length, r]."""
        group, slices = self._group, len(run.slices)
        h = h[:, :, run.offset : run.offset + slices * run.rank]
        h = h.reshape(group.count, group.length, slices, run.rank).transpose(1, 2) if slices > 1 else h.unsqueeze(1)
        if spread is not None:
            h = h.index_select(1, spread)
        return h.reshape(-1, group.length, run.rank)

    def _run(self, h: Tensor, run: Run, spread: Tensor | None, B: Sequence[Tensor], number: int) -> Tensor:
        """The run's product as [m, chunks, length, width]."""
        h = self._by_chunk(h, run, spread)
        if self._bags is None:
            y = torch.bmm(h, B[number])
        else:
            rows, starts = self._bags[number]
            y = torch.embedding_bag(
                self._B[number].view(-1, run.width), rows, starts, False, _SUM, False, h.reshape(-1)
            )[0]
        return y.view(self._group.count, run.num_chunks, self._group.length, run.width)

    def _add_by_chunk(self, h: Tensor, run: Run, B: Tensor, target: Tensor) -> None:
        """Accumulates into target [m, length, chunks, width], one batched product per chunk."""
        B = B.view(self._group.count, run.num_chunks, run.rank, run.width)
        chunk = 0
        for number, count in enumerate(run.chunks):
            offset = run.offset + number * run.rank
            own = h[:, :, offset : offset + run.rank]
            for _ in range(count):
                target[:, :, chunk].baddbmm_(own, B[:, chunk])
                chunk += 1

    def _add_run(self, y: Tensor, out: Tensor) -> None:
        for tokens, positions in self._group.sums:
            term = y if positions is None else positions.take(y)
            if tokens.index is None:
                out[tokens.start : tokens.stop].add_(term)
            else:
                out.index_add_(0, tokens.index, term.to(out.dtype))


class LongStep:
    """The ranges of one long entry at one site; s w multiplies the expand's float32 accumulator."""

    def __init__(self, site: Site, tensors: SiteTensors, ranges: Sequence[tuple[int, int, float, int]]) -> None:
        self._ranges = ranges
        self._A = tensors.A.T
        self._parts: list[tuple[slice, slice, Tensor, float]] = []
        rank = 0
        for number, B in sorted(tensors.B.items()):
            column = site.column(number)
            outputs = slice(column, column + site.slices[number].out_features)
            self._parts.append((slice(rank, rank + len(B)), outputs, B, tensors.scales[number]))
            rank += len(B)

    def shrink(self, x: Tensor) -> Tensor:
        """h of the ranges, end to end."""
        parts = [x[start:end] @ self._A for start, end, _, _ in self._ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def expand(self, h: Tensor, out: Tensor, gates: Tensor | None) -> None:
        """Adds the entry's term to out."""
        row = 0
        for start, end, weight, level in self._ranges:
            own, target = h[row : row + end - start], out[start:end]
            row += end - start
            if gates is not None:
                own = (own * gates[start:end, level : level + 1]).to(h.dtype)
            for ranks, outputs, B, scale in self._parts:
                target[:, outputs].addmm_(own[:, ranks], B, alpha=scale * weight)


@dataclass(frozen=True, slots=True)
class Scaling:
    """x[start:end, columns] *= 1 + sum_i w_i vector_i, with `terms` (place in the set, w_i, vector_i)."""

    start: int
    end: int
    columns: slice
    terms: tuple[tuple[int, float, Tensor], ...]

    def apply(self, x: Tensor, gates: Tensor | None) -> None:
        """Scales in place; the factor is computed in float32 or better."""
        target = x[self.start : self.end, self.columns]
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = torch.ones((), dtype=wide, device=x.device)
        for place, weight, vector in self.terms:
            term = vector.to(wide) * weight
            factor = factor + (term if gates is None else gates[self.start : self.end, place : place + 1] * term)
        target.copy_(target.to(wide) * factor)
