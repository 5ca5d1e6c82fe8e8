"""A bounded number of examples, for what is fitted across adapters; the same ones whatever order they came in."""

import hashlib
from collections.abc import Mapping

from loramux.router.interface import Floats

MAX_ADAPTER_EXAMPLES = 512
MAX_BASE_EXAMPLES = 1024


def sampled(groups: Mapping[str, Floats], most: int = MAX_ADAPTER_EXAMPLES) -> dict[str, Floats]:
    """Whole adapters in the order of their keys' hashes, as many as hold `most` examples together (the last cut short).

    An adapter that is dropped here never returns by another's coming, so adding one by one keeps what adding all at
    once would.
    """
    kept: dict[str, Floats] = {}
    room = most
    for key in sorted(groups, key=_place):
        if not room:
            break
        rows = groups[key]
        kept[key] = rows if len(rows) <= room else rows[:room]
        room -= len(kept[key])
    return kept


def _place(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
