"""The items of one request, a bounded number at a time: a long list leaves room for others."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from loramux.server.api.admission import Admission
from loramux.server.api.auto.ending import end

LANES = 8
T = TypeVar("T")
R = TypeVar("R")


async def in_lanes(items: Sequence[T], work: Callable[[T], Awaitable[R]], lanes: int) -> list[R]:
    """What `work` makes of every item, in their order; `lanes` are under way at once, taken in order.

    The first error ends the others, and so does a cancellation; all have ended when this returns or raises.
    """
    left = iter(enumerate(items))
    found: dict[int, R] = {}

    async def lane() -> None:
        for index, item in left:  # shared: each lane takes the next item that nobody has
            found[index] = await work(item)

    tasks = [asyncio.create_task(lane()) for _ in range(min(lanes, len(items)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(tasks)
    return [found[index] for index in range(len(items))]


async def in_charged_lanes(
    admission: Admission, items: Sequence[T], tokens: Sequence[int], work: Callable[[T], Awaitable[R]]
) -> list[R]:
    """`in_lanes`, up to `LANES` or as many as the caller may have; each item takes its tokens from the caller's.

    Raises what `Admission.reserve` raises, before anything is begun.
    """
    lanes = min(LANES, admission.caller.limits.requests or LANES, len(items))
    admission.reserve([sum(tokens), *[0] * (lanes - 1)], [0] * lanes)
    used = 0

    async def charged(item: tuple[T, int]) -> R:
        nonlocal used
        used += item[1]
        admission.used(0, used)
        return await work(item[0])

    return await in_lanes(list(zip(items, tokens, strict=True)), charged, lanes)
