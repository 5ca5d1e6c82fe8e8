"""The plain reference of the segmented LoRA term: loops over segments, slices and adapters, nothing clever."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .interface import ModuleWeights, Segment, Site


def add_reference(
    site: Site,
    x: Tensor,
    out: Tensor,
    segments: Sequence[Segment],
    weights: Mapping[int, Mapping[str, ModuleWeights]],
    *,
    gates: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """out[t] += sum_i w_i [(g_i - 1) o out[t] + g_i o s_i B_i (A_i x[t])] per slice, in place, for the set of token t.

    `x` is [tokens, in], `out` [tokens, sum of outs], `weights` {slot: {module: weights}}; gates[t, i] multiplies w_i.
    Every product and sum is carried out in `compute_dtype`; the result is rounded once, to out's dtype.
    """
    for segment in segments:
        rows = slice(segment.start, segment.end)
        inputs = x[rows].to(compute_dtype)
        column = 0
        for part in site.slices:
            columns = slice(column, column + part.out_features)
            column += part.out_features
            base = out[rows, columns].to(compute_dtype)
            total = base.clone()
            for place, (slot, weight) in enumerate(segment.adapters):
                module = weights[slot].get(part.module)
                if module is not None:
                    shrunk = inputs @ module.A.to(compute_dtype).T
                    term = (module.scale * shrunk) @ module.B.to(compute_dtype).T
                    if module.out_scale is not None:
                        scale = module.out_scale.to(compute_dtype)
                        term = (scale - 1) * base + scale * term
                    total += _weights(weight, gates, segment, place, compute_dtype) * term
            out[rows, columns] = total.to(out.dtype)


def scale_input_reference(
    site: Site,
    x: Tensor,
    segments: Sequence[Segment],
    weights: Mapping[int, Mapping[str, ModuleWeights]],
    *,
    gates: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x'[t] = x[t] + sum_i w_i (l_i - 1) o x[t] for a site of one slice, in `compute_dtype`."""
    scaled = x.to(compute_dtype, copy=True)
    for segment in segments:
        rows = slice(segment.start, segment.end)
        factor = torch.ones(segment.end - segment.start, 1, dtype=compute_dtype)
        for place, (slot, weight) in enumerate(segment.adapters):
            module = weights[slot].get(site.slices[0].module)
            if module is not None and module.in_scale is not None:
                term = module.in_scale.to(compute_dtype) - 1
                factor = factor + _weights(weight, gates, segment, place, compute_dtype) * term
        scaled[rows] = x[rows].to(compute_dtype) * factor
    return scaled


def _weights(weight: float, gates: Tensor | None, segment: Segment, place: int, dtype: torch.dtype) -> Tensor:
    """The weight of the set's adapter number `place` at each token of the segment, [tokens, 1]."""
    column = torch.full((segment.end - segment.start, 1), weight, dtype=dtype)
    if gates is not None:
        column *= gates[segment.start : segment.end, place : place + 1].to(dtype)
    return column
