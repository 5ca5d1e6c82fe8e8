"""Ending tasks that run for as long as the server."""

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN_SECONDS = 1.0


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancels the tasks, those that are added meanwhile too, and returns when all have ended, however they did.

    A cancellation is lost where it meets the end of what the task waits for: `asyncio.gather` raises the error of a
    part instead, `asyncio.wait_for` returns. A task that goes on is therefore cancelled again.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)  # nobody else asks how they ended
