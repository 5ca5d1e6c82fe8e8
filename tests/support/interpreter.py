"""Triton's interpreter under test: bfloat16 products, and what kernels read and multiply."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies those integers; widens them to float32 first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


class Work:
    """What the kernels do from now on: every address that they read, and the shapes (m, n, k) of their products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: Counter[tuple[int, int, int]] = Counter()
        self._addresses: list[np.ndarray] = []
        builder = interpreter.InterpreterBuilder
        load, dot = builder.create_masked_load, builder.create_dot

        def create_masked_load(this: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._addresses.append(np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data).astype(bool)].ravel())
            return load(this, ptrs, mask, *rest)

        def create_dot(this: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.products[a.data.shape[0], b.data.shape[1], a.data.shape[1]] += 1
            return dot(this, a, b, *rest)

        monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
        monkeypatch.setattr(builder, "create_dot", create_dot)

    def clear(self) -> None:
        """Forgets what was done."""
        self.products.clear()
        self._addresses.clear()

    def reads(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each element of a contiguous tensor was read, in its shape."""
        start, size = tensor.data_ptr(), tensor.element_size()
        places = (np.concatenate(self._addresses).astype(np.int64) - start) // size
        inside = places[(places >= 0) & (places < tensor.numel())]
        return torch.from_numpy(np.bincount(inside, minlength=tensor.numel())).view(tensor.shape)
