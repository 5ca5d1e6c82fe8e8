"""Where plans are decided: at once if that is light, else in a thread."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor

from loramux.router.interface import Floats
from loramux.router.policy import Decision, Plan, decide_together
from loramux.server.api.auto.together import Together

MAX_TOGETHER = 64


class Deciding:
    """Decisions by embeddings that are asked for while others are made are made together, up to `MAX_TOGETHER`.

    Alone, each would read all candidates' numbers from memory again.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._heavy: Together[tuple[Plan, Floats], Decision] = Together(threads, _decided, MAX_TOGETHER)

    async def decide(self, plan: Plan, row: Floats | None, states: Mapping[int, Floats] | None) -> Decision:
        """`plan.decide(row, states)`."""
        if plan.is_light:
            return plan.decide(row, states)
        if row is None or not plan.encoder:
            return await asyncio.get_running_loop().run_in_executor(self._threads, plan.decide, row, states)
        return await self._heavy.ask((plan, row))


def _decided(asked: list[tuple[Plan, Floats]]) -> list[Decision]:
    return decide_together([plan for plan, _ in asked], [row for _, row in asked])
