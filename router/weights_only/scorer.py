"""How strongly each adapter would act on a prompt, made comparable across adapters.

For a module with factor F and the prompt's whitened inputs w_1..w_T (states of the frozen base, no adapter applied;
see `reference`):

    raw   = sqrt(mean over t of |F w_t|^2)
    score = mean over the adapter's modules of  (raw - centre) / spread

"balanced" takes F = S^(1/2) V^T of s B A = U S V^T; "norm" F = S V^T (SpectR, SEQR); "arrow" the top right singular
vector. Norms differ between adapters for reasons that have nothing to do with the prompt (rank, scale, length of
training), so each is calibrated: centre and spread are the mean and standard deviation of raw over the reference's
prompts, in the manner of SEQR's offline norm calibration.

Root mean square over tokens, because the words that tell a task are few and large responses are theirs; plain mean over
modules, because calibrated scores have one unit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.interface import Floats
from loramux.router.weights_only.factors import Method, factor
from loramux.router.weights_only.modules import attention_inputs
from loramux.router.weights_only.reference import Reference

RANK = 4
ACCEPTED = 0.2  # of the base's own examples, at most so many may go to an adapter that is known by its weights alone


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFactors:
    """What is kept of one adapter: per module (layer, F [rows, in], centre, spread); `reference_scores` [prompts]."""

    modules: tuple[tuple[int, Floats, float, float], ...]
    reference_scores: Floats

    @property
    def bytes(self) -> int:
        """Memory of the factors in a scorer, which holds them a second time, stacked."""
        return 2 * sum(rows.nbytes for _, rows, _, _ in self.modules)

    @classmethod
    def of(
        cls, weights: Mapping[str, ModuleWeights], reference: Reference, method: Method = "balanced", rank: int = RANK
    ) -> "AdapterFactors | None":
        """Of an adapter's matrices; None for one that does nothing where the router looks.

        Left out are modules of another width than the states, of a zero product, and those whose response never differs
        on the reference.
        """
        modules = []
        scores = np.zeros(len(reference.starts))
        for module, layer in attention_inputs(weights, reference.layers).items():
            if weights[module].A.shape[1] != reference.tokens[layer].shape[1]:
                continue
            rows = factor(weights[module], method, rank)
            raw = _raw(reference.tokens[layer], rows, reference.starts)
            spread = float(raw.std())
            if spread > 0:
                modules.append((layer, rows, float(raw.mean()), spread))
                scores += (raw - raw.mean()) / spread
        return cls(tuple(modules), np.asarray(scores / len(modules), np.float32)) if modules else None


@dataclass(frozen=True, slots=True)
class _Stack:
    """One layer: F of all modules of all adapters one below the other; per module where it starts, and its numbers."""

    rows: Floats
    starts: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    centres: Floats
    spreads: Floats


@dataclass(frozen=True, slots=True, eq=False)
class WeightsScorer:
    """The adapters' factors at one moment. Immutable: `with_adapters` and `without` give another one.

    The scores rank adapters; that none fits they tell badly, see `threshold`.
    """

    reference: Reference
    adapters: Mapping[str, AdapterFactors] = field(default_factory=dict)
    places: Mapping[str, int] = field(init=False)
    bytes: int = field(init=False)
    _stacks: Mapping[int, _Stack] = field(init=False)
    _modules: npt.NDArray[np.int64] = field(init=False)
    _reference_scores: Floats = field(init=False)

    def __post_init__(self) -> None:
        stacks = {layer: _stacked(layer, list(self.adapters.values())) for layer in self.reference.layers}
        counts = [len(a.modules) for a in self.adapters.values()]
        kept = [a.reference_scores for a in self.adapters.values()]
        values: dict[str, object] = {
            "places": {key: place for place, key in enumerate(self.adapters)},
            "bytes": sum(a.bytes for a in self.adapters.values()),
            "_stacks": {layer: stack for layer, stack in stacks.items() if stack is not None},
            "_modules": np.asarray(counts, np.int64),
            "_reference_scores": np.stack(kept) if kept else np.zeros((0, len(self.reference.starts)), np.float32),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Adapters that do something where the router looks."""
        return tuple(self.adapters)

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose states a query needs."""
        return self.reference.layers

    def with_adapters(self, new: Mapping[str, AdapterFactors]) -> "WeightsScorer":
        """This scorer and more adapters, or others under the same keys. Copies all factors once."""
        return WeightsScorer(self.reference, {**self.adapters, **new})

    def without(self, keys: Iterable[str]) -> "WeightsScorer":
        """This scorer without these adapters; itself if there are none of these keys."""
        gone = set(keys) & self.adapters.keys()
        if not gone:
            return self
        return WeightsScorer(self.reference, {k: f for k, f in self.adapters.items() if k not in gone})

    def score_at(self, states: Mapping[int, Floats], places: npt.NDArray[np.int64]) -> Floats:
        """float32 [len(places)] of one prompt's states: layer -> [tokens, in], as the base computed them.

        Higher is better; -inf for an adapter none of whose layers is in `states`. One product per layer, over the
        factors of all adapters.
        """
        total, count = np.zeros(len(self.adapters)), np.zeros(len(self.adapters))
        for layer, w in self.reference.whiten(states).items():
            stack = self._stacks.get(layer)
            if stack is None or not len(w):
                continue
            raw = np.sqrt(np.add.reduceat(((w @ stack.rows.T) ** 2).mean(axis=0), stack.starts))
            scores = (raw - stack.centres) / stack.spreads
            total += np.bincount(stack.owners, scores, len(total))
            count += np.bincount(stack.owners, minlength=len(count))
        found = np.where(count > 0, total / np.maximum(count, 1), -math.inf)
        return np.asarray(found[places], dtype=np.float32)

    def threshold(self, places: npt.NDArray[np.int64]) -> float | None:
        """The score above which at most the share `ACCEPTED` of the base's own examples have their best of these.

        None where the reference is of no base's. The share is of the examples that calibrate the scores, so other
        prompts of the base reach it a little more often.
        """
        if not self.reference.own or not len(places):
            return None
        best = np.sort(self._reference_scores[places].max(axis=0))
        allowed = int(ACCEPTED * len(best))
        return float(np.nextafter(best[len(best) - 1 - allowed], np.float32(math.inf)))

    def describe(self) -> str:
        """Where the threshold is from."""
        return f"reached by {ACCEPTED:.0%} of the {len(self.reference.starts)} examples of the base"


def _stacked(layer: int, adapters: list[AdapterFactors]) -> _Stack | None:
    found = [(place, m) for place, adapter in enumerate(adapters) for m in adapter.modules if m[0] == layer]
    if not found:
        return None
    lengths = [len(rows) for _, (_, rows, _, _) in found]
    return _Stack(
        np.concatenate([rows for _, (_, rows, _, _) in found]),
        np.cumsum([0, *lengths[:-1]]),
        np.asarray([place for place, _ in found], np.int64),
        np.asarray([centre for _, (_, _, centre, _) in found], np.float32),
        np.asarray([spread for _, (_, _, _, spread) in found], np.float32),
    )


def _raw(tokens: Floats, rows: Floats, starts: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """raw of every prompt: float64 [prompts], of the prompts' tokens one after another."""
    squares = ((tokens @ rows.T) ** 2).sum(axis=1, dtype=np.float64)
    lengths = np.diff([*starts, len(squares)])
    return np.asarray(np.sqrt(np.add.reduceat(squares, starts) / lengths))
