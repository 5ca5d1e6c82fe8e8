"""Progress bars for training, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from loramux.router.interface import Progress


@contextmanager
def bars() -> Iterator[Progress]:
    """A callback (stage, done, in all) that draws one bar per stage, each removed when it is full.

    On a standard error that is no terminal nothing is drawn.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as drawn:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total)
            drawn.update(tasks[stage], completed=done, total=total)
            if done >= total:
                drawn.remove_task(tasks.pop(stage))

        yield show
