"""Several encoders side by side: what one does not see (script, layout), another may.

row = [w_1 e_1(x), .., w_n e_n(x)] / sqrt(sum of w_i^2)
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from loramux.router.interface import Encoder, Floats

NGRAM_WEIGHT = 3**0.5
"""Of n-gram rows beside a sentence encoder's 1: cross-validated on RouterDC's training queries."""


class ConcatEncoder:
    """An `Encoder` of the parts' rows; of parts of norm 1 it makes rows of norm 1, and w_i^2 weighs part i's cosine.

    Raises ValueError for no parts, or weights that are not one positive number per part.
    """

    def __init__(self, parts: Sequence[Encoder], weights: Sequence[float]) -> None:
        if not parts or len(parts) != len(weights) or not all(weight > 0 for weight in weights):
            raise ValueError("a concatenation needs parts, and one weight above 0 for each")
        self._parts = tuple(parts)
        self._weights = np.asarray(weights, np.float64) / np.linalg.norm(weights)
        self.dim = sum(part.dim for part in parts)
        identity = json.dumps([[part.name for part in parts], [float(w) for w in weights]])
        self.name = f"concat-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"

    def encode(self, texts: Sequence[str]) -> Floats:
        """float32 [len(texts), dim]."""
        rows = [weight * part.encode(texts) for part, weight in zip(self._parts, self._weights, strict=True)]
        return np.concatenate(rows, axis=1).astype(np.float32)
