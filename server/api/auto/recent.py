"""What recent requests asked and who answered, so that feedback can name a request instead of repeating its text.

And which adapters were deleted lately, so that no opinion of one counts for another that takes its name.
"""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from loramux.router.interface import BASE

MAX_REQUESTS = 4096
MAX_CHARS = 16 << 20
MAX_DELETIONS = 4096


@dataclass(frozen=True, slots=True)
class Served:
    """One request: its text as it was routed, the adapters that served it (none: the base), and since when
    (`time.monotonic`)."""

    text: str
    adapters: tuple[str, ...]
    at: float = field(default_factory=time.monotonic, compare=False)


class RecentRequests:
    """The newest requests by id, bounded in number and in characters. An id that is used again is the newer one's."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_chars: int = MAX_CHARS) -> None:
        self._max_requests = max_requests
        self._max_chars = max_chars
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._chars = 0

    def add(self, id: str, served: Served) -> None:
        """Remembers a request, and forgets the oldest ones beyond the bounds."""
        old = self._served.pop(id, None)
        self._chars += len(served.text) - (len(old.text) if old is not None else 0)
        self._served[id] = served
        while len(self._served) > self._max_requests or self._chars > self._max_chars:
            _, gone = self._served.popitem(last=False)
            self._chars -= len(gone.text)

    def get(self, id: str) -> Served | None:
        """A request that is still remembered."""
        return self._served.get(id)


class RecentDeletions:
    """When adapters were deleted: the newest, bounded in number. Times are `time.monotonic`'s."""

    def __init__(self, max_names: int = MAX_DELETIONS) -> None:
        self._max_names = max_names
        self._at: OrderedDict[str, float] = OrderedDict()
        self._unknown_until = -math.inf

    def add(self, key: str) -> None:
        """The adapter is deleted now."""
        self._at.pop(key, None)
        self._at[key] = time.monotonic()
        while len(self._at) > self._max_names:
            _, self._unknown_until = self._at.popitem(last=False)

    def since(self, key: str, at: float) -> bool:
        """Whether the adapter was deleted at `at` or later; also True where that is no longer known. The base never."""
        return key != BASE and self._at.get(key, self._unknown_until) >= at
