"""What the router's parts agree on: an encoder turns texts into rows, a scorer turns rows into a score per candidate.

A candidate key is an opaque string (the server uses adapter names or digests); `BASE` stands for the base model alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

BASE = ""

Progress = Callable[[str, int, int], None]
"""Called during training as (stage, steps done, steps in all)."""


class Encoder(Protocol):
    """Texts to embeddings.

    `name` is the encoder's identity: two encoders that could give different rows for the same text have different
    names (it holds weights' digest, options and version), because caches and artefacts are keyed by it.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Floats:
        """float32 [len(texts), dim], rows of Euclidean norm 1 unless the encoder says otherwise."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """One query's scores: `values` [len(candidates)] float32, higher is better, in the candidates' order."""

    candidates: tuple[str, ...]
    values: Floats

    def best(self) -> str:
        """The candidate of the highest score, the first of equals."""
        return self.candidates[int(np.argmax(self.values))]


class Scorer(Protocol):
    """Embeddings to a score per candidate."""

    @property
    def candidates(self) -> tuple[str, ...]: ...

    def score(self, embeddings: Floats) -> Floats:
        """float32 [n, len(candidates)] of float32 [n, dim]; higher is better, -inf where nothing is known."""
        ...


@runtime_checkable
class PartialScorer(Scorer, Protocol):
    """Some candidates of another scorer, with that scorer's values."""

    @property
    def scorer(self) -> Scorer: ...


@runtime_checkable
class GrowingScorer(Scorer, Protocol):
    """A scorer that takes in more scored queries without being trained again; the one in use stays as it is."""

    def update(self, embeddings: Floats, scores: npt.NDArray[np.float64], candidates: Sequence[str]) -> Self:
        """With more rows: embeddings [n, dim] and scores [n, c] of `candidates`, NaN where unknown."""
        ...

    def without(self, candidates: Sequence[str]) -> Self:
        """Without these candidates; unknown ones are ignored. Raises ValueError when none would be left."""
        ...
