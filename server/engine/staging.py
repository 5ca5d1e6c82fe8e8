"""Small host arrays on their way to the device, without waiting for it."""

from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.int64] | npt.NDArray[np.float64]
_BUFFERS = 3


class Staging:
    """Uploads a step's arrays of 64-bit numbers in one copy.

    On a card the arrays are packed into one of a few pinned buffers, each reused only when its last copy has ended,
    and the tensors are views of fresh device memory on the current stream. On a CPU they are the arrays themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def upload(self, *arrays: Words) -> list[Tensor]:
        """The arrays (one-dimensional int64 or float64) as device tensors; the host arrays may be reused at once."""
        if self._device.type != "cuda":
            return [torch.from_numpy(array) for array in arrays]
        total = sum(array.size for array in arrays)
        host, copied = self._take(total)
        packed = host.numpy()
        place = 0
        for array in arrays:
            packed[place : place + array.size] = array.view(np.int64)
            place += array.size
        device = torch.empty(total, dtype=torch.int64, device=self._device)
        device.copy_(host[:total], non_blocking=True)
        copied.record()
        self._free.append((host, copied))
        tensors = torch.split(device, [array.size for array in arrays])
        return [t.view(torch.float64) if a.dtype == np.float64 else t for t, a in zip(tensors, arrays, strict=True)]

    def _take(self, words: int) -> tuple[Tensor, "torch.cuda.Event"]:
        """A pinned buffer of at least so many words that no copy reads any more."""
        if len(self._free) >= _BUFFERS:
            host, copied = self._free.popleft()
            copied.synchronize()  # the copy of three uploads ago
            if host.numel() >= words:
                return host, copied
        size = 1 << max(10, (words - 1).bit_length())
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return torch.empty(size, dtype=torch.int64, pin_memory=True), event


class Download:
    """Numbers on their way back to the host; `tensor` waits for them, and for nothing launched later."""

    def __init__(self, source: Tensor) -> None:
        """Starts the copy of a device tensor on the current stream."""
        if source.device.type != "cuda":
            self._host, self._copied = source, None
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def tensor(self) -> Tensor:
        """The tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
