"""What the commands print: tables and progress for people, plain lines and JSON for programs."""

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 4000  # a table that another program reads is never folded
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Output(Console):
    """A console whose reader may go away: that is a BrokenPipeError, as it is for any other output."""

    def on_broken_pipe(self) -> None:
        """Raises again what rich has caught."""
        raise BrokenPipeError


def output(*, stderr: bool = False) -> Console:
    """The console of one stream: as wide as the terminal, or as COLUMNS says, or without a bound in a pipe."""
    console = Output(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def plain(text: str) -> str:
    """Text from elsewhere without what would steer a terminal: control characters are shown as escapes."""
    return text.translate(_CONTROLS)


def cell(text: str) -> Text:
    """Text from elsewhere for a table: no markup, one line."""
    return Text(plain(text).replace("\n", " "))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns named in `right` are aligned there."""
    made = Table(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left")
    return made


def transfer(console: Console) -> Progress:
    """A bar for bytes on their way; nothing where nobody looks."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_json(value: Any) -> None:
    """One JSON document, as programs read it: no colours, whatever the stream."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
