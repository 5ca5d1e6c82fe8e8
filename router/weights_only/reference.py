"""What the base's states look like on prompts of no adapter's: the ground that adapters' responses are measured on.

Raw hidden states have a large mean and a few directions of huge variance that every prompt shares, and adapters, which
were trained on such states, respond to these most of all. So states are centred and whitened first, layer by layer,

    w(x) = (S / l + I)^(-1/2) (x - mu),     l = shrinkage * trace(S) / dim

mu and S being mean and covariance of the reference prompts' tokens (as `gallery.metric` does for embeddings). The
prompts' whitened states are kept, so that an adapter that comes later is calibrated without asking the engine again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loramux.router.gallery.metric import Metric, whitening
from loramux.router.interface import Floats

SHRINKAGE = 0.03
MIN_PROMPTS = 2  # with fewer there is no spread


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """`metrics` by layer; `tokens` by layer, float32 [all prompts' tokens, dim], whitened; `starts` of each prompt.

    `own`: the prompts are the base's own, so that what looks like them can be left to it.
    """

    metrics: Mapping[int, Metric]
    tokens: Mapping[int, Floats]
    starts: tuple[int, ...]
    own: bool

    @classmethod
    def fit(cls, prompts: Sequence[Mapping[int, Floats]], *, own: bool) -> "Reference":
        """Of the states of every prompt, layer -> [tokens, dim]. Raises ValueError for fewer than `MIN_PROMPTS`."""
        if len(prompts) < MIN_PROMPTS:
            raise ValueError(f"a reference needs at least {MIN_PROMPTS} prompts, or there is no spread")
        metrics, tokens = {}, {}
        for layer in sorted(prompts[0]):
            rows = np.concatenate([prompt[layer] for prompt in prompts])
            metrics[layer] = whitening(rows, SHRINKAGE)
            tokens[layer] = metrics[layer].whiten(rows)
        lengths = [len(next(iter(prompt.values()))) for prompt in prompts]
        return cls(metrics, tokens, tuple(int(n) for n in np.cumsum([0, *lengths[:-1]])), own)

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose states are looked at, ascending."""
        return tuple(self.metrics)

    def whiten(self, states: Mapping[int, Floats]) -> Mapping[int, Floats]:
        """w(x) of one prompt's states, layer by layer."""
        return {layer: metric.whiten(states[layer]) for layer, metric in self.metrics.items() if layer in states}

    def describe(self) -> str:
        """On what the scores are calibrated, and why there is no threshold where there is none."""
        if self.own:
            return f"calibrated on {len(self.starts)} examples of the base"
        return (
            f"calibrated on {len(self.starts)} everyday prompts; without examples of the base weights alone cannot "
            "tell that none fits"
        )
