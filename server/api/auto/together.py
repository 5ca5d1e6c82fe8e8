"""Calls that come in while others are worked on in a thread are worked on together next."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Together(Generic[T, R]):
    """`work(lot)` on `threads` gives the result of each of a lot of items; one lot at a time, `most` large by `size`.

    An item larger than `most` is a lot of its own. An error is that of its whole lot. An item whose caller has gone is
    left out.
    """

    def __init__(
        self,
        threads: Executor,
        work: Callable[[list[T]], Sequence[R]],
        most: int,
        size: Callable[[T], int] = lambda _: 1,
    ) -> None:
        self._threads, self._work, self._most, self._size = threads, work, most, size
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, item: T) -> R:
        """The result of one item."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, mine))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return await mine

    async def _run(self) -> None:
        """Works until nobody waits."""
        lot: list[tuple[T, asyncio.Future[R]]] = []
        try:
            while lot := self._next():
                await self._work_on(lot)
        finally:
            for _, future in (*lot, *self._waiting):  # those that are left when the threads end
                future.cancel()
            self._waiting.clear()
            self._running = None

    def _next(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next lot of those whose caller still waits."""
        lot: list[tuple[T, asyncio.Future[R]]] = []
        size = taken = 0
        for item, future in self._waiting:
            size += self._size(item)
            if lot and size > self._most:
                break
            taken += 1
            if future.done():
                size -= self._size(item)
            else:
                lot.append((item, future))
        del self._waiting[:taken]
        return lot

    async def _work_on(self, lot: list[tuple[T, asyncio.Future[R]]]) -> None:
        items = [item for item, _ in lot]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._work, items)
        except Exception as error:
            for _, future in lot:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(lot, found, strict=True):
            if not future.done():
                future.set_result(result)
