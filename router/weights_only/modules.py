"""Which modules' inputs are looked at."""

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
ATTENTION_INPUTS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key", "value")
)


def default_modules(modules: Iterable[str], layers: int = 4) -> tuple[str, ...]:
    """The query, key and value projections of up to `layers` layers spread over the middle half of the model.

    One hidden state per layer feeds all three, so few need to be kept; most adapters touch at least one of them. The
    first layers see words rather than tasks and the last prepare the next token: on the demo the middle half routes
    best. Where no such projection is named (other architectures), all modules of those layers. Sorted by layer, name.
    """
    named = list(modules)
    by_layer: dict[int, list[str]] = {}
    for module in named:
        found = _LAYER.search(module)
        if found:
            by_layer.setdefault(int(found[1]), []).append(module)
    order = sorted(by_layer)
    middle = order[len(order) // 4 : max(len(order) - len(order) // 4, 1)]
    step = max(len(middle) / max(layers, 1), 1)
    chosen = [m for i in range(min(layers, len(middle))) for m in sorted(by_layer[middle[int(i * step)]])]
    attention = [m for m in chosen if m.rpartition(".")[2] in ATTENTION_INPUTS]
    return tuple(attention or chosen or sorted(named))
