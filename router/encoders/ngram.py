"""Hashed character n-grams: an encoder without a model, for machines that have nothing else.

    v[h(g) mod dim] += s(g)   over all n-grams g of the text, n in [shortest, longest]
    row = sign(v) sqrt(|v|) / | sign(v) sqrt(|v|) |

h is 64 bits wide and fixed, s is +1 or -1 by one of its bits, so that collisions cancel on average (Weinberger et al.
2009, "Feature hashing for large scale multitask learning"). Texts alike in words, script or layout have alike rows; it
knows nothing of meaning.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats

_VERSION = 1  # part of the name: raise it when a row of any text would change
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_BOUNDARY = 2  # a code point put around the text, so that its first and last characters have n-grams of their own


class NgramEncoder:
    """An `Encoder` over characters (case-folded, NFKC), n from `shortest` to `longest`, `dim` buckets.

    The empty text has the zero row. Raises ValueError for sizes that make no sense.
    """

    def __init__(self, dim: int = 2048, shortest: int = 1, longest: int = 4) -> None:
        if dim < 2:
            raise ValueError("dim must be at least 2")
        if not 1 <= shortest <= longest <= 16:
            raise ValueError("n-gram lengths must satisfy 1 <= shortest <= longest <= 16")
        self.dim = dim
        self.shortest = shortest
        self.longest = longest
        self.name = f"ngram-v{_VERSION}-{shortest}-{longest}-{dim}"

    def encode(self, texts: Sequence[str]) -> Floats:
        """float32 [len(texts), dim], rows of norm 1 (0 for the empty text)."""
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = self._row(text)
        return rows

    def _row(self, text: str) -> npt.NDArray[np.float64]:
        folded = unicodedata.normalize("NFKC", text).casefold()
        if not folded:
            return np.zeros(self.dim)
        points = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        codes = np.concatenate(([np.uint64(_BOUNDARY)], points, [np.uint64(_BOUNDARY)]))
        counts = np.zeros(self.dim)
        rolling = np.zeros(len(codes), np.uint64)
        for n in range(1, min(self.longest, len(codes)) + 1):
            last = len(codes) - n + 1
            rolling = rolling[:last] * _BASE + codes[n - 1 :] + np.uint64(1)
            if n >= self.shortest:
                hashed = _mix(rolling ^ np.uint64(n))
                signs = np.where(hashed >> np.uint64(63), -1.0, 1.0)
                counts += np.bincount((hashed % np.uint64(self.dim)).astype(np.int64), signs, minlength=self.dim)
        damped = np.sign(counts) * np.sqrt(np.abs(counts))
        norm = np.linalg.norm(damped)
        return damped / norm if norm else damped


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
