"""Tasks that live as long as the server end with it, whatever they wait for."""

import asyncio

import pytest

from loramux.server.api.auto import ending
from loramux.server.api.auto.ending import end

pytestmark = pytest.mark.anyio


async def test_a_lost_cancellation_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes of a gather fail because the engine ends, in the moment in which the task is cancelled."""
    monkeypatch.setattr(ending, "AGAIN_SECONDS", 0.01)
    loop = asyncio.get_running_loop()
    parts: list[asyncio.Future[None]] = [loop.create_future() for _ in range(2)]
    errors = []

    async def work() -> None:
        while True:
            try:
                await asyncio.gather(*parts)
            except ConnectionError as error:
                errors.append(error)
                await asyncio.Event().wait()

    tasks = [asyncio.create_task(work())]
    await asyncio.sleep(0)
    parts[0].set_exception(ConnectionError("the engine is draining"))
    await end(tasks)  # in this turn of the loop
    assert errors  # the first one was lost
    assert tasks[0].cancelled()


async def test_tasks_that_end_by_themselves_or_come_later() -> None:
    async def fails() -> None:
        raise ValueError

    async def starts_another() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tasks.append(asyncio.create_task(fails()))

    tasks = [asyncio.create_task(fails()), asyncio.create_task(starts_another())]
    await asyncio.sleep(0)
    await end(tasks)
    assert len(tasks) == 3
    assert all(task.done() for task in tasks)
    await end([])
