"""Sizes for tests and benchmarks of the dense kernels, and their random tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProductCase:
    """A product of `rows` rows with weights [outs, inner]."""

    rows: int
    outs: int
    inner: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.rows}x{self.outs}x{self.inner}{'+b' if self.bias else ''}"


SMALL_PRODUCTS = (
    ProductCase(1, 1, 1, False),
    ProductCase(1, 72, 100, True),
    ProductCase(7, 130, 64, True),
    ProductCase(33, 64, 1024, False),
    ProductCase(70, 129, 1030, True),
)
LARGE_PRODUCTS = (
    ProductCase(1, 4096, 4096, False),
    ProductCase(5, 1152, 896, True),
    ProductCase(64, 896, 4864, False),
    ProductCase(65, 6144, 4096, False),
    ProductCase(300, 2049, 2049, True),
    ProductCase(1024, 28672, 4096, False),
)


def make_product(
    case: ProductCase, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [rows, inner], weight [outs, inner], bias [outs] or None); the same numbers at every call."""
    generator = torch.Generator().manual_seed(case.outs * 31 + case.inner)
    x = torch.randn(case.rows, case.inner, generator=generator)
    weight = torch.randn(case.outs, case.inner, generator=generator) / case.inner**0.5
    bias = torch.randn(case.outs, generator=generator) if case.bias else None
    return x.to(device, dtype), weight.to(device, dtype), None if bias is None else bias.to(device, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())
