"""Who is slow is found by a clock that the test turns."""

from typing import Any

from loramux.server.engine.grammars import MAX_SLOW_SECONDS, Matcher
from loramux.server.engine.pace import REST_STEPS, Pace


class Fine:
    """llguidance's part of a matcher that has no errors."""

    def is_error(self) -> bool:
        return False


class Bench:
    """Matchers that take so many seconds each; together so many on this machine."""

    def __init__(self, together: float, *alone: float) -> None:
        self.now = 0.0
        self.together, self.alone = together, alone
        inner: Any = Fine()
        self.matchers = [Matcher(inner, 1) for _ in alone]
        self.pace = Pace(lambda: self.now, lambda: self.now)

    def step(self) -> str:
        """How the work of a step was done."""
        done = []

        def all_at_once() -> None:
            done.append("together")
            self.now += self.together

        def one(i: int) -> None:
            done.append(str(i))
            self.now += self.alone[i]

        self.pace.next_step()
        self.pace.run(self.matchers, all_at_once, one)
        return " ".join(done)


def test_quick_work_is_done_together() -> None:
    bench = Bench(0.019, 0.001, 0.019)
    assert {bench.step() for _ in range(100)} == {"together"}
    assert all(matcher.slow_seconds == 0 for matcher in bench.matchers)


def test_the_slow_one_is_found_and_fails_in_the_end() -> None:
    bench = Bench(0.05, 0.001, 0.05)
    good, bad = bench.matchers
    assert [bench.step() for _ in range(3)] == ["together", "0 1", "0 1"]
    while bad.error is None:
        assert bad.slow_seconds <= MAX_SLOW_SECONDS
        assert bench.step() == "0 1"
    assert bad.error == "it takes too long"
    assert good.error is None
    assert good.slow_seconds == 0


def test_a_crowd_that_is_slow_together_is_soon_left_alone() -> None:
    """Many who take a little each are nobody's fault: one step in `REST_STEPS` is spent on looking."""
    bench = Bench(0.1, *[0.009] * 20)
    done = [bench.step() for _ in range(3 * REST_STEPS)]
    assert done.count("together") >= 3 * REST_STEPS - 3
    assert done[1] == " ".join(map(str, range(20)))
    assert all(matcher.slow_seconds == 0 for matcher in bench.matchers)


def test_one_slow_step_is_forgiven() -> None:
    bench = Bench(0.05, 0.001, 0.001)
    assert [bench.step() for _ in range(2)] == ["together", "0 1"]
    bench.together = 0.001
    assert {bench.step() for _ in range(3 * REST_STEPS)} == {"together"}
