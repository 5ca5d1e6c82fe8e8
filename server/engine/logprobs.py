"""Log-probabilities of tokens under the model's own distribution, log_softmax(logits), on the device.

Penalties, biases, temperature and filters do not change them.
"""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.server.engine.staging import Download

SLICE_ROWS = 64
MAX_LOGPROBS = 20

Floats = npt.NDArray[np.float64]


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """float64 [rows, 1 + 2 * top]: the log-probability of each row's token, then token and log-probability of the
    likeliest ones in turn.

    logits [rows, vocab], any float dtype; tokens int64 [rows], of which -1 is taken for 0. Computed in float32,
    `SLICE_ROWS` rows at a time, so that the memory it takes is bounded.
    """
    found = torch.empty(len(tokens), 1 + 2 * top, dtype=torch.float64, device=logits.device)
    for start in range(0, len(tokens), SLICE_ROWS):
        part = slice(start, start + SLICE_ROWS)
        rows = logits[part].float()
        whole = torch.logsumexp(rows, dim=-1, keepdim=True)
        found[part, :1] = (rows.gather(1, tokens[part].clamp(min=0).unsqueeze(1)) - whole).double()
        if top:
            values, ids = rows.topk(top, dim=-1)
            found[part, 1::2], found[part, 2::2] = ids.double(), (values - whole).double()
    return found


class Scores:
    """What `logprobs` found for some rows, on its way to the host; row i of it has 1 + 2 * tops[i] numbers."""

    def __init__(self, tops: Seq[int], found: Tensor) -> None:
        self._tops = tops
        self._download = Download(found)

    def rows(self) -> list[Floats]:
        """The rows' numbers; waits for the device."""
        table: Floats = self._download.tensor().numpy()
        return [row[: 1 + 2 * top] for row, top in zip(table, self._tops, strict=True)]
