"""How strongly each adapter would act on a prompt, made comparable across adapters.

For a module with factor F and the prompt's inputs x_1..x_T (tokens of the frozen base, no adapter applied):

    raw   = sqrt(mean over t of |F x_t|^2)
    score = mean over the adapter's modules of  (raw - centre) / spread

"norm" takes F = S V^T, so |F x_t| = |s B A x_t| (SpectR, SEQR); "arrow" takes F = v^T, the top right singular vector.
Norms differ between adapters for reasons that have nothing to do with the prompt (rank, scale, length of training), so
each is calibrated: with a reference (the base's inputs on prompts of no particular task), centre and spread are the
mean and standard deviation of raw over the reference's prompts, in the manner of SEQR's offline norm calibration;
without one, centre = 0 and spread = |F|_F sqrt(mean |x_t|^2 / in), what inputs without a direction would give.

Root mean square over tokens, because the words that tell a task are few and large responses are theirs; plain mean over
modules, because calibrated scores have one unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.interface import Floats
from loramux.router.weights_only.factors import arrow_factor, norm_factor

Method = Literal["norm", "arrow"]


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs of every module on reference prompts: float32 [tokens, in] each, one entry per prompt, in one order."""

    prompts: tuple[Mapping[str, Floats], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise ValueError("a reference needs at least two prompts, or there is no spread")


@dataclass(frozen=True, slots=True)
class ModuleFactor:
    """One module's F float32 [rows, in], with its calibration; `length` is |F|_F."""

    rows: Floats
    length: float
    centre: float
    spread: float


@dataclass(frozen=True, slots=True, eq=False)
class WeightsScorer:
    """The adapters' factors at one moment. Immutable: `with_adapter` and `without` give another one.

    `modules` are those looked at (`default_modules`), `rank` bounds a factor's rows (None: all), `reference`
    calibrates; `factors` maps key -> module -> factor, zero factors left out. An adapter that touches none of the
    modules is no candidate. The scores rank adapters; they do not tell whether any fits: on the demo the best score is
    hardly higher for prompts of the adapters than for the base's own (AUROC 0.6), so there is no threshold here.
    """

    modules: tuple[str, ...]
    method: Method = "norm"
    rank: int | None = None
    reference: Reference | None = None
    factors: Mapping[str, Mapping[str, ModuleFactor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in ("norm", "arrow"):
            raise ValueError(f"method must be norm or arrow, got {self.method!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.modules:
            raise ValueError("modules must name at least one module")

    @property
    def candidates(self) -> tuple[str, ...]:
        """Adapters that touch at least one of the modules."""
        return tuple(self.factors)

    def with_adapter(self, key: str, weights: Mapping[str, ModuleWeights]) -> "WeightsScorer":
        """This scorer and one more adapter, or another one under the same key; without it if it touches no module."""
        found: dict[str, ModuleFactor] = {}
        for module in self.modules:
            if module in weights:
                pair = weights[module]
                rows = arrow_factor(pair) if self.method == "arrow" else norm_factor(pair, self.rank)
                factor = self._calibrated(module, rows)
                if factor is not None:
                    found[module] = factor
        if not found:
            return self.without(key)
        return replace(self, factors={**self.factors, key: found})

    def without(self, key: str) -> "WeightsScorer":
        """This scorer without an adapter; itself if there is none of that key."""
        if key not in self.factors:
            return self
        return replace(self, factors={k: f for k, f in self.factors.items() if k != key})

    def score(self, features: Mapping[str, Floats], keys: Sequence[str] | None = None) -> Floats:
        """float32 [candidates] (or [len(keys)]) of one prompt's inputs: module -> [tokens, in]. Higher is better.

        -inf for an adapter none of whose modules is in `features`. KeyError for a key that is no candidate.
        """
        chosen = self.candidates if keys is None else keys
        return np.asarray([_score(self.factors[key], features) for key in chosen], dtype=np.float32)

    def _calibrated(self, module: str, rows: Floats) -> ModuleFactor | None:
        """The module's factor, or None for one that is zero or, on the reference, never differs."""
        length = float(np.linalg.norm(rows))
        if length == 0:
            return None
        if self.reference is None:
            return ModuleFactor(rows, length, 0.0, math.nan)
        raw = [_raw(rows, prompt[module]) for prompt in self.reference.prompts if module in prompt]
        if len(raw) < 2 or np.std(raw) == 0:
            return None
        return ModuleFactor(rows, length, float(np.mean(raw)), float(np.std(raw)))


def _raw(rows: Floats, x: Floats) -> float:
    return float(np.sqrt(((x @ rows.T) ** 2).sum(axis=1).mean()))


def _score(modules: Mapping[str, ModuleFactor], features: Mapping[str, Floats]) -> float:
    scores = []
    for module, factor in modules.items():
        x = features.get(module)
        if x is None or not len(x):
            continue
        spread = factor.spread
        if math.isnan(spread):
            spread = factor.length * float(np.sqrt((x**2).sum(axis=1).mean() / x.shape[1]))
        scores.append((_raw(factor.rows, x) - factor.centre) / spread if spread > 0 else 0.0)
    return sum(scores) / len(scores) if scores else -math.inf
