"""What recent requests asked and who answered, so that feedback can name a request instead of repeating its text."""

from collections import OrderedDict
from dataclasses import dataclass

MAX_REQUESTS = 4096
MAX_CHARS = 16 << 20


@dataclass(frozen=True, slots=True)
class Served:
    """One request: its text as it was routed, and the adapters that served it (none: the base)."""

    text: str
    adapters: tuple[str, ...]


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
