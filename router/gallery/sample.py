"""A bounded number of examples, for what is fitted across adapters; the same ones whatever order they came in.

Every example has a place: first come up to `LEAST` of every adapter, adapters in the order of their keys' hashes, then
one more of every adapter that has one, and so on. Fits see the first `MAX_FITTED`. Within an adapter examples come in
the order of `spread`, so that few are as varied as all. Another adapter's coming only moves places back: what is
dropped never returns by it, adding one by one keeps what adding all at once would, and no adapter loses examples to one
that has more.

The first `MAX_KEPT` are kept, 4 * dim bytes each (42 MB of 1280 dimensions), to refill what removals take out of the
first `MAX_FITTED`.

Why `LEAST` is 16: held-out examples stand for how prompts score, and 16 less the eighth held out still make the three
centroids that all of an adapter's examples make. Examples scored by one centroid of three score lower than prompts do,
and the threshold lets too much through.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats

LEAST = 16
MAX_FITTED = 512
MAX_KEPT = 8192
MAX_BASE_EXAMPLES = 1024
_ALWAYS_REFIT = 256  # up to so many examples to fit on every change refits (some 50 ms)
_REFIT_SHARE = 0.25  # beyond, only once so large a share of them is new
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio


def spread(n: int) -> npt.NDArray[np.int64]:
    """0 .. n - 1 in an order of which every beginning is even over them: int64 [n].

    By the fractional part of i / golden ratio: gaps have at most three lengths (three-distance theorem), and examples
    written in turns, every fourth alike, are not picked alike.
    """
    return np.argsort(np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """Examples of one adapter: float32 [k, dim], the first k by `spread(of)` of the `of` it has, as it ordered them."""

    rows: Floats
    of: int

    @property
    def whole(self) -> bool:
        """Whether these are all of the adapter's examples."""
        return len(self.rows) == self.of

    def first(self, k: int) -> "Share":
        """The first k of them; itself where there are no more."""
        if k >= len(self.rows):
            return self
        order = spread(self.of)
        return Share(self.rows[np.isin(np.sort(order[: len(self.rows)]), order[:k])], self.of)


def sampled(shares: Mapping[str, Share], most: int) -> dict[str, Share]:
    """The first `most` examples, by adapter in the order of keys' hashes."""
    keys = sorted(shares, key=_place)
    given = _given([len(shares[key].rows) for key in keys], most)
    return {key: shares[key].first(k) for key, k in zip(keys, given, strict=True) if k}


def _given(sizes: Sequence[int], most: int) -> list[int]:
    """How many of each adapter's examples are among the first `most`, adapters in their order."""
    n = np.asarray(sizes, dtype=np.int64)
    if n.sum() <= most:
        return list(sizes)
    full = bisect_right(range(LEAST, most + 1), most, key=lambda level: int(np.minimum(n, level).sum()))
    level, following = (LEAST + full - 1, LEAST + full) if full else (0, LEAST)
    given = np.minimum(n, level)
    wanted = np.minimum(n, following) - given
    room = most - given.sum() - (np.cumsum(wanted) - wanted)
    return [int(k) for k in given + np.clip(room, 0, wanted)]


def _place(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit was made on: `size` examples; `shares`, how many of every adapter whose examples are still those."""

    size: int
    shares: Mapping[str, int]


class Sample:
    """The examples that are fitted on, what they are refilled from, and how much of them is new. For one thread."""

    def __init__(self, kept: Mapping[str, Share], fitted: Fitted) -> None:
        self._kept, self._fitted = dict(kept), fitted
        self._first = sampled(self._kept, MAX_FITTED)

    @property
    def kept(self) -> Mapping[str, Share]:
        """Every example that is kept, by adapter in the order of keys' hashes."""
        return self._kept

    @property
    def fitted(self) -> Fitted:
        """What the last fit was made on."""
        return self._fitted

    def groups(self) -> list[Floats]:
        """The examples to fit on, float32 [n, dim] of each adapter that has any."""
        return [share.rows for share in self._first.values()]

    def change(self, new: Mapping[str, Floats], gone: Iterable[str]) -> None:
        """Forgets the adapters `gone`, then takes in or replaces the `new` by all their examples [n >= 1, dim]."""
        old = {*gone, *new}
        if not new and not old & self._kept.keys():
            return
        kept = {key: share for key, share in self._kept.items() if key not in old}
        self._kept = sampled({**kept, **{key: Share(rows, len(rows)) for key, rows in new.items()}}, MAX_KEPT)
        self._first = sampled(self._kept, MAX_FITTED)
        still = {key: k for key, k in self._fitted.shares.items() if key not in old}
        self._fitted = Fitted(self._fitted.size, still)

    def is_stale(self) -> bool:
        """Whether the examples to fit on are not those of the last fit, and are few or have changed much."""
        now = self._sizes()
        size = sum(now.values())
        same = sum(min(k, self._fitted.shares.get(key, 0)) for key, k in now.items())
        larger = max(size, self._fitted.size)
        return larger > same and (size <= _ALWAYS_REFIT or larger - same >= _REFIT_SHARE * larger)

    def use(self) -> None:
        """Says that a fit was made on the examples as they are now."""
        now = self._sizes()
        self._fitted = Fitted(sum(now.values()), now)

    def _sizes(self) -> dict[str, int]:
        return {key: len(share.rows) for key, share in self._first.items()}
