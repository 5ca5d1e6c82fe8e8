"""Static buffers: the address stays, the host buffers take turns, too much is refused."""

import numpy as np
import pytest
import torch

from loramux.kernels.buffers import StaticBuffer


def test_writes_keep_the_address_and_what_lies_behind_them() -> None:
    buffer = StaticBuffer(4, 2, torch.device("cpu"))
    address = buffer.tensor.data_ptr()
    buffer.write(np.arange(8).reshape(4, 2))
    buffer.write(np.full((1, 2), 9))
    assert buffer.tensor.data_ptr() == address
    assert buffer.tensor.tolist() == [[9, 9], [2, 3], [4, 5], [6, 7]]


def test_two_host_buffers_take_turns() -> None:
    buffer = StaticBuffer(1, 1, torch.device("cpu"))
    for number in (1, 2, 3):
        buffer.write(np.array([[number]]))
    assert sorted(int(host[0, 0]) for host in buffer._hosts) == [2, 3]


def test_more_rows_than_there_are_are_refused() -> None:
    buffer = StaticBuffer(2, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 rows of step metadata exceed 2"):
        buffer.write(np.zeros((3, 1)))
    assert not buffer.tensor.any()
