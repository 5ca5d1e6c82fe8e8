"""Who holds up the steps: the processor time that each matcher takes, measured when all of them together were slow."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from loramux.server.engine.grammars import Matcher

SLOW_WORK_SECONDS = 0.02
SLOW_MATCHER_SECONDS = 0.01
REST_STEPS = 32

Clock = Callable[[], float]


class Pace:
    """Runs a step's work for its matchers: together, on all cores, or one after the other with the time of each.

    Its limits do not bound what llguidance does in a step (a grammar that is ambiguous throughout, such as
    `s: s s | "a" | "b"`, takes 50 ms for the hundredth token, and longer for each further one). So when a step's work
    took more than 20 ms, that of the next is done one by one, and `slow_seconds` of a matcher grows by what it took
    where that was more than 10 ms. The search goes on for as long as it finds somebody, and then rests for 32 steps.
    """

    def __init__(self, wall: Clock = time.perf_counter, own: Clock = time.thread_time) -> None:
        """`wall` tells the time, `own` the processor time of this thread, both in seconds."""
        self._wall, self._own = wall, own
        self._searches = self._was_slow = False
        self._rest = 0

    def next_step(self) -> None:
        """A step begins."""
        if self._searches:
            self._searches = self._was_slow
            self._rest = REST_STEPS
        elif self._rest:
            self._rest -= 1
        else:
            self._searches = self._was_slow
        self._was_slow = False

    def run(self, matchers: Seq[Matcher], together: Callable[[], object], alone: Callable[[int], object]) -> None:
        """`together()`, or `alone(i)` for each of the matchers."""
        if not self._searches:
            began = self._wall()
            together()
            self._was_slow |= self._wall() - began > SLOW_WORK_SECONDS
            return
        for i, matcher in enumerate(matchers):
            began = self._own()
            alone(i)
            seconds = self._own() - began
            if seconds > SLOW_MATCHER_SECONDS:
                matcher.slow_seconds += seconds
                self._was_slow = True
