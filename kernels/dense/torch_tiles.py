"""Products on the CPU whose rows have the same bits in any batch: a few fixed numbers of rows that agree.

A matrix library sums a row's products in an order that depends on the number of rows: another kernel for one row than
for two, other cuts of the inner dimension from some number of rows on, other work for each thread. Below that, the
order is the same for every row of a call. So a product is only ever run with one of a few numbers of rows, the last
call padded with zeros, and those few are found by trial, once per shape: a row, repeated, must come out alike at
every position and for every number of rows. The trial's first row, weights and bias cancel exactly (products are +a and
-a, at random places), so the result is nothing but the rounding errors of the order of summation, and another order
shows in any dtype. One row by itself always agrees with itself, so there is a set for every shape and machine.

Of several sets the one with the least work for 1, 64 and 512 rows is taken, by a formula and not by the clock, so that
another start gives the same bits again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are tried."""
COUNTS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 64, 255)
"""Numbers of matrices in one batched call that are tried."""
_TYPICAL = (1, 64, 512)
_CALL_ROWS = {4: 16, 2: 64}
"""What a call costs besides its rows, in rows, by bytes of an element (measured: AVX-512 float32, AMX bfloat16)."""
_ALIGNMENT = 64
_SMALL = 1 << 16
"""Elements of weights below which a trial has further rows, up to `_MORE_ROWS`."""
_MORE_ROWS = 32


def cover(rows: int, sizes: Sequence[int]) -> list[int]:
    """Sizes (ascending) whose sum is at least `rows`, the largest first; only the last call has padding."""
    tiles: list[int] = []
    while rows > 0:
        size = max((s for s in sizes if s <= rows), default=sizes[0])
        tiles.append(size)
        rows -= size
    return tiles


def trial(outs: int, columns: int, dtype: torch.dtype, *, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [n, columns], w [outs, columns], b [outs] or None), always the same; x[0] w^T + b = 0 but for rounding.

    A small product has few sums to go wrong in, so it gets more rows, of random numbers.
    """
    generator = torch.Generator().manual_seed(outs * 1_000_003 + columns)
    more = min(_MORE_ROWS, _SMALL // (outs * columns))
    half = (columns - bias) // 2
    places = torch.randperm(columns, generator=generator)
    x = torch.randn(1 + more, columns, generator=generator).to(dtype)
    w = torch.randn(outs, columns, generator=generator).to(dtype)
    x[0, places[half:]] = 0
    x[0, places[half : 2 * half]] = x[0, places[:half]]
    w[:, places[half : 2 * half]] = -w[:, places[:half]]
    if not bias:
        return x, w, None
    added = torch.randn(outs, generator=generator).to(dtype)
    x[0, places[-1]], w[:, places[-1]] = 1, -added
    return x, w, added


def agreeing_sizes(product: Callable[[Tensor], Tensor], rows: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """The cheapest set of sizes for which `product` ([m, in] -> [m, out]) gives each of `rows` [n, in] the same bits.

    A size at which the bits depend on the position is in no set; `sizes` begins with 1.
    """
    sets: dict[bytes, list[int]] = {}
    for size in sizes:
        found = [product(row.expand(size, -1).contiguous()).contiguous().view(torch.uint8) for row in rows]
        if all(bool((bits == bits[:1]).all()) for bits in found):
            sets.setdefault(b"".join(bits[0].numpy().tobytes() for bits in found), []).append(size)
    candidates = list(sets.values())
    works = [_work(members, rows.element_size()) for members in candidates]
    return tuple(candidates[works.index(min(works))])


def _work(sizes: Sequence[int], itemsize: int) -> float:
    """Work of the typical numbers of rows, each as a multiple of one call without tiles."""
    call = _CALL_ROWS.get(itemsize, 16)
    return sum(sum(call + size for size in cover(rows, sizes)) / (call + rows) for rows in _TYPICAL)


class TiledProduct:
    """out = x W^T + b for weights of one shape and dtype, in calls of fixed numbers of rows."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        transposed: bool = False,
        max_size: int = SIZES[-1],
    ) -> None:
        """Tries the sizes up to `max_size`, on weights of this shape that are made for the purpose.

        `transposed` weights are views of [in, out] in memory.
        """
        rows, weight, added = trial(out_features, in_features, dtype, bias=bias)
        if transposed:
            weight = weight.t().contiguous().t()
        sizes = [size for size in SIZES if size <= max_size]
        self.sizes = agreeing_sizes(lambda x: F.linear(x, weight, added), rows, sizes)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in], weight [out, in], bias [out] -> [tokens, out]."""
        if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
            x = x.clone(memory_format=torch.contiguous_format)
        rows = len(x)
        tiles = cover(rows, self.sizes)
        if len(tiles) == 1:
            return F.linear(_padded(x, tiles[0]), weight, bias)[:rows]
        out = x.new_empty(rows, len(weight))
        start = 0
        for size in tiles:
            end = min(start + size, rows)
            out[start:end] = F.linear(_padded(x[start:end], size), weight, bias)[: end - start]
            start = end
        return out


class TiledProducts:
    """The tiled product of every shape that is asked for, tried at its first use. One thread at a time."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[int, int, torch.dtype, bool, bool, int], TiledProduct] = {}

    def of(self, weight: Tensor, bias: Tensor | None, max_size: int = SIZES[-1]) -> TiledProduct:
        """The product for weights of this shape, dtype and layout, with or without a bias."""
        out_features, in_features = weight.shape
        has_bias, transposed = bias is not None, not weight.is_contiguous()
        key = (out_features, in_features, weight.dtype, has_bias, transposed, max_size)
        if key not in self._by_kind:
            self._by_kind[key] = TiledProduct(
                out_features, in_features, weight.dtype, bias=has_bias, transposed=transposed, max_size=max_size
            )
        return self._by_kind[key]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in], weight [out, in], bias [out] -> [tokens, out]."""
        return self.of(weight, bias)(x, weight, bias)


class BatchedTiles:
    """out[b] = x[b] y[b] in float32 for matrices y of one shape, in calls of fixed numbers of rows.

    Whether the bits also stay the same for any number of matrices in a call is tried as well; where they do not, every
    matrix is a call of its own.
    """

    def __init__(self, inner: int, columns: int, *, transposed: bool) -> None:
        """y is [inner, columns], or with `transposed` a view of [columns, inner]."""
        rows, weight, _ = trial(columns, inner, torch.float32)
        y = (weight if transposed else weight.t().contiguous().t()).t().unsqueeze(0)
        self.sizes = agreeing_sizes(lambda x: torch.bmm(x.unsqueeze(0), y)[0], rows, SIZES)
        row = rows[:1]
        expected = torch.bmm(row.expand(1, self.sizes[0], inner).contiguous(), y)[0, 0]
        many = y.expand(COUNTS[-1], *y.shape[1:]).clone(memory_format=torch.preserve_format)
        x = row.expand(COUNTS[-1], self.sizes[-1], inner).contiguous()
        self.batched = all(
            torch.equal(found, expected.expand_as(found))
            for count in COUNTS
            for size in {self.sizes[0], self.sizes[-1]}
            for found in [torch.bmm(x[:count, :size].contiguous(), many[:count])]
        )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [matrices, rows, inner], y [matrices, inner, columns] -> [matrices, rows, columns]."""
        rows = x.shape[1]
        tiles = cover(rows, self.sizes)
        if len(tiles) == 1:
            return self._product(_padded(x, tiles[0]), y)[:, :rows]
        ends = [min(end, rows) for end in _running(tiles)]
        starts = [0, *ends[:-1]]
        return torch.cat(
            [
                self._product(_padded(x[:, a:b], size), y)[:, : b - a]
                for a, b, size in zip(starts, ends, tiles, strict=True)
            ],
            dim=1,
        )

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.contiguous()
        if self.batched:
            return torch.bmm(x, y)
        return torch.cat([torch.bmm(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


def _running(numbers: Sequence[int]) -> list[int]:
    return [sum(numbers[: i + 1]) for i in range(len(numbers))]


def _padded(x: Tensor, rows: int) -> Tensor:
    """x [..., n, columns] with rows of zeros up to `rows`."""
    missing = rows - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
