"""The launch of `fold.py`: which projections are folded, with which tiles, and over which records."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.kernels.dense.launch import GROUP

from .arena import ALIGNMENT_BYTES, Arena
from .fold import fold_kernel
from .interface import Site
from .launch import MOST_REGISTERS, SEARCH_RECORDS, FoldConfig, largest_power_of_two
from .table import Choices


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The output of one variant's shrink: the expand's records, h, its split stride and its number of splits."""

    records: Tensor
    h: Tensor
    split_stride: int
    partials: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What the epilogue reads: the step's shrunk inputs (one or two variants), its entries, gates, strides of h."""

    shrunk: Sequence[Shrunk]
    entries: Tensor
    gates: Tensor | None
    row_stride: int
    slice_stride: int
    first_module: int
    scaled: bool


class Folding:
    """The folded projections of a backend's sites.

    `fold` True folds whatever can be, False nothing, None what the launch table says won on this card. What cannot be
    is decided before a launch, by weights alone: those of another dtype or device than the adapters', which the
    epilogue's sum could not be rounded for, and those that are not contiguous, which the kernel does not address. Any
    step can be folded, whatever its ranks, sets, gates, scale vectors and variants.
    """

    def __init__(
        self, sites: Sequence[Site], arena: Arena, choices: Choices, *, fold: bool | None, dependent: bool
    ) -> None:
        """`dependent` launches the kernel while the shrink runs."""
        self._fold = fold
        self._arena = arena
        self._choices = choices
        self._dependent = dependent
        self._modules = sum(len(site.slices) for site in sites)
        self._tiles: dict[tuple[int, int], Tensor] = {}
        for site in sites if fold is not False else ():
            for config in choices.folds(site.in_features, site.out_features, won_only=fold is None):
                if (site.index, config.block_n) not in self._tiles:
                    self._tiles[site.index, config.block_n] = output_tiles(site, config.block_n, arena.memory.device)

    def chosen(self, site: Site, weight: Tensor, tokens: int) -> bool:
        """Whether a step of so many tokens is folded at the site."""
        memory = self._arena.memory
        return (
            self._fold is not False
            and weight.dtype == memory.dtype
            and weight.device == memory.device
            and weight.is_contiguous()
            and (self._fold is True or self._choices.fold_won(site.in_features, site.out_features, tokens))
        )

    def __call__(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
        """x W^T + b + the terms. x [tokens, in] with unit stride, weight [outs, in] -> [tokens, outs]."""
        rows, align = len(x), ALIGNMENT_BYTES // x.element_size()
        config = self._choices.fold(site.in_features, site.out_features, rows)
        tiles = self._tiles[site.index, config.block_n]
        out = x.new_empty(rows, site.out_features)
        first, second = terms.shrunk[0], terms.shrunk[-1]
        fold_kernel[(-(-rows // config.block_m) * len(tiles),)](
            out,
            x,
            weight,
            weight if bias is None else bias,
            self._arena.memory,
            self._arena.offsets,
            self._arena.ranks,
            self._arena.scales,
            first.records,
            second.records,
            terms.entries,
            tiles,
            first.h,
            second.h,
            self._arena.scales if terms.gates is None else terms.gates,
            rows,
            len(tiles),
            site.in_features,
            x.stride(0),
            out.stride(0),
            0 if terms.gates is None else terms.gates.stride(0),
            terms.first_module,
            self._modules,
            first.split_stride,
            second.split_stride,
            terms.row_stride,
            terms.slice_stride,
            FIRST_PARTIALS=first.partials,
            SECOND_PARTIALS=second.partials if len(terms.shrunk) > 1 else 0,
            HAS_BIAS=bias is not None,
            EVEN_K=site.in_features % config.block_k == 0,
            ALIGN=align,
            OUT_ALIGN=largest_power_of_two(align, *(part.out_features for part in site.slices)),
            SCALED=terms.scaled,
            GATES=terms.gates is not None,
            DEPENDENT=self._dependent,
            GROUP=GROUP,
            SEARCH=SEARCH_RECORDS,
            **fold_options(config, dependent=self._dependent),
        )
        return out


def fold_options(config: FoldConfig, *, dependent: bool) -> dict[str, int | bool]:
    """The constants and compiler options that follow from a tile."""
    options: dict[str, int | bool] = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": config.block_r,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MOST_REGISTERS,
    }  # fmt: skip
    if dependent:
        options["launch_pdl"] = True
    return options


def output_tiles(site: Site, block_n: int, device: torch.device) -> Tensor:
    """int32 [tiles, 4]: slice, first output within it, outputs of the slice, column of the slice in the site's."""
    rows = [
        (number, first, part.out_features, site.column(number))
        for number, part in enumerate(site.slices)
        for first in range(0, part.out_features, block_n)
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)
