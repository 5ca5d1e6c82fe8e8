"""Decisions by many candidates, in a thread, and those that come in meanwhile together."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from loramux.router.interface import Floats
from loramux.router.policy import Decision, Plan, decide_together

MAX_TOGETHER = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    plan: Plan
    row: Floats
    decision: asyncio.Future[Decision]


class Deciding:
    """Where plans are decided: at once if that is light, else on `threads`.

    Decisions by embeddings are made one lot at a time; those that are asked for meanwhile are the next lot, up to
    `MAX_TOGETHER`. Alone, each would read all candidates' numbers from memory again.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._waiting: list[_Waiting] = []
        self._at_work: asyncio.Task[None] | None = None

    async def decide(self, plan: Plan, row: Floats | None, states: Mapping[int, Floats] | None) -> Decision:
        """`plan.decide(row, states)`."""
        if plan.is_light:
            return plan.decide(row, states)
        loop = asyncio.get_running_loop()
        if row is None or not plan.encoder:
            return await loop.run_in_executor(self._threads, plan.decide, row, states)
        mine = _Waiting(plan, row, loop.create_future())
        self._waiting.append(mine)
        if self._at_work is None:
            self._at_work = loop.create_task(self._work())
        return await mine.decision

    async def _work(self) -> None:
        """Decides until nobody waits."""
        lot: list[_Waiting] = []
        try:
            while self._waiting:
                lot, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
                await self._decide([one for one in lot if not one.decision.done()])
        finally:
            for one in (*lot, *self._waiting):  # those that are left when the threads end
                one.decision.cancel()
            self._waiting.clear()
            self._at_work = None

    async def _decide(self, lot: list[_Waiting]) -> None:
        """Gives each of the lot its decision, or what kept it from having one."""
        plans, rows = [one.plan for one in lot], [one.row for one in lot]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, decide_together, plans, rows)
        except Exception as error:
            for one in lot:
                if not one.decision.done():
                    one.decision.set_exception(error)
            return
        for one, decision in zip(lot, found, strict=True):
            if not one.decision.done():  # done: its caller has gone
                one.decision.set_result(decision)
