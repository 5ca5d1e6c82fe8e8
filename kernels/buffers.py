"""Device memory of fixed address that the host fills anew for every step."""

import numpy as np
import numpy.typing as npt
import torch


class StaticBuffer:
    """An int32 device tensor [rows, width] of fixed address and two pinned host buffers that take turns in filling it.

    A captured graph may refer to `tensor`. The host never writes to a buffer whose copy has not ended.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self.tensor = torch.zeros(rows, width, dtype=torch.int32, device=device)
            self._hosts = [torch.zeros(rows, width, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._events = [torch.cuda.Event() for _ in range(2)] if cuda else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def write(self, values: np.ndarray) -> None:
        """Copies [n, width] values to the front of the tensor, on the current stream, without waiting for the device.

        Raises ValueError for more rows than there are.
        """
        self.begin(len(values))[:] = values
        self.end(len(values))

    def begin(self, rows: int) -> npt.NDArray[np.int32]:
        """The [rows, width] host numbers to fill before `end`; what they hold now is not told.

        Raises ValueError for more rows than there are.
        """
        if rows > len(self.tensor):
            raise ValueError(f"{rows} rows of step metadata exceed {len(self.tensor)}")
        self._turn ^= 1
        if self._events:
            self._events[self._turn].synchronize()  # the copy of two writes ago, long done
        return self._arrays[self._turn][:rows]

    def end(self, rows: int) -> None:
        """Copies what `begin` gave to the front of the tensor, on the current stream, without waiting for it."""
        self.tensor[:rows].copy_(self._hosts[self._turn][:rows], non_blocking=True)
        if self._events:
            self._events[self._turn].record()
