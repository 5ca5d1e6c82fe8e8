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
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """out[t] += sum_i w_i s_i B_i (A_i x[t]) per slice, in place, for the adapters i of the segment that holds t.

    `x` is [tokens, in], `out` [tokens, sum of outs], `weights` {slot: {module: weights}}. Every product and sum is
    carried out in `compute_dtype`; the result is rounded once, to out's dtype.
    """
    for segment in segments:
        rows = slice(segment.start, segment.end)
        inputs = x[rows].to(compute_dtype)
        column = 0
        for part in site.slices:
            columns = slice(column, column + part.out_features)
            column += part.out_features
            total = out[rows, columns].to(compute_dtype)
            for slot, weight in segment.adapters:
                module = weights[slot].get(part.module)
                if module is not None:
                    shrunk = inputs @ module.A.to(compute_dtype).T
                    total = total + (weight * module.scale * shrunk) @ module.B.to(compute_dtype).T
            out[rows, columns] = total.to(out.dtype)
