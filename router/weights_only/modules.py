"""Where the router looks: the projections that read a layer's attention input, of a few layers."""

import re
from collections.abc import Iterable, Mapping, Sequence

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
ATTENTION_INPUTS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key", "value")
)


def default_layers(layers: int, most: int = 4) -> tuple[int, ...]:
    """The middles of `most` equal stretches of the model's layers (all of them where there are no more), ascending."""
    count = min(layers, most)
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


def attention_inputs(modules: Iterable[str], layers: Sequence[int]) -> Mapping[str, int]:
    """The modules that read the attention input of one of these layers, by name, with their layer.

    One hidden state per layer feeds query, key and value projections, so little needs to be computed for a prompt, and
    nearly every adapter touches at least one of them.
    """
    found = {}
    for module in sorted(modules):
        match = _LAYER.search(module)
        if match and int(match[1]) in layers and module.rpartition(".")[2] in ATTENTION_INPUTS:
            found[module] = int(match[1])
    return found
