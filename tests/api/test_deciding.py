"""Decisions that come in while others are made are made together."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loramux.router.interface import BASE, Floats
from loramux.router.policy import Plan, Pool, RouterPolicy
from loramux.server.api.auto.deciding import MAX_TOGETHER, Deciding

pytestmark = pytest.mark.anyio

DIM = 4
ROWS = np.eye(DIM, dtype=np.float32)


class Slow:
    """A scorer of unknown cost that waits to be let go and notes how many queries come at a time."""

    candidates = ("a", "b", "c", "d", BASE)

    def __init__(self) -> None:
        self.lots: list[int] = []
        self.go = threading.Event()
        self.error: Exception | None = None

    def score(self, embeddings: Floats) -> Floats:
        self.lots.append(len(embeddings))
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return np.concatenate([embeddings, np.full((len(embeddings), 1), 0.5, np.float32)], axis=1)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def planned(scorer: Slow) -> Plan:
    policy = RouterPolicy()
    policy.use_scorer(scorer, "rows")
    return policy.plan(Pool("abcd"))


async def begun(scorer: Slow, lots: int = 1) -> None:
    while len(scorer.lots) < lots:
        await asyncio.sleep(0.001)


async def test_those_that_wait_are_one_lot_and_each_gets_its_own(threads: ThreadPoolExecutor) -> None:
    scorer, deciding = Slow(), Deciding(threads)
    plan = planned(scorer)
    first = asyncio.create_task(deciding.decide(plan, ROWS[0], None))
    await begun(scorer)
    others = [asyncio.create_task(deciding.decide(plan, ROWS[i % DIM], None)) for i in range(MAX_TOGETHER + 3)]
    await asyncio.sleep(0)
    others[1].cancel()
    scorer.go.set()
    assert (await first).chosen == (("a", 1.0),)
    found = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(found.pop(1), asyncio.CancelledError)
    assert [d.chosen[0][0] for d in found if not isinstance(d, BaseException)] == [
        "abcd"[i % DIM] for i in range(MAX_TOGETHER + 3) if i != 1
    ]
    assert scorer.lots == [1, MAX_TOGETHER, 2]
    assert (await deciding.decide(plan, ROWS[3], None)).chosen == (("d", 1.0),)


async def test_an_error_reaches_all_of_its_lot_and_nobody_else(threads: ThreadPoolExecutor) -> None:
    scorer, deciding = Slow(), Deciding(threads)
    plan = planned(scorer)
    scorer.error = RuntimeError("broken")
    scorer.go.set()
    failed = await asyncio.gather(*(deciding.decide(plan, ROWS[0], None) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in failed] == ["broken"] * 3
    scorer.error = None
    assert (await deciding.decide(plan, ROWS[1], None)).chosen == (("b", 1.0),)


async def test_those_whom_the_threads_leave_behind_are_told(threads: ThreadPoolExecutor) -> None:
    scorer, deciding = Slow(), Deciding(threads)
    plan = planned(scorer)
    busy = [threads.submit(scorer.go.wait, 20) for _ in range(2)]
    asked = [asyncio.create_task(deciding.decide(plan, ROWS[0], None)) for _ in range(2)]
    await asyncio.sleep(0.01)  # they are a lot that no thread has begun
    asked.append(asyncio.create_task(deciding.decide(plan, ROWS[0], None)))
    await asyncio.sleep(0)
    threads.shutdown(wait=False, cancel_futures=True)
    await asyncio.wait(asked, timeout=20)
    assert all(task.cancelled() for task in asked)
    scorer.go.set()
    assert all(future.result(20) for future in busy)


async def test_nobody_waits_for_threads_that_have_ended(threads: ThreadPoolExecutor) -> None:
    scorer, deciding = Slow(), Deciding(threads)
    plan = planned(scorer)
    threads.shutdown()
    waiting = [asyncio.create_task(deciding.decide(plan, ROWS[0], None)) for _ in range(2)]
    done, _ = await asyncio.wait(waiting, timeout=20)
    assert len(done) == 2
    assert all(isinstance(task.exception(), RuntimeError) for task in done)
