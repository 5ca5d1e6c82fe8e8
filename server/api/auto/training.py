"""Training the scorer: cross-validation names it, it is fitted on everything, and saved as the next version.

In the server this runs in a process of its own, so that neither torch nor the interpreter's lock holds up a request.
"""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loramux.router import artifacts
from loramux.router.interface import Progress
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.select import Selection, select

KEPT_VERSIONS = 5
_NICE = 10


class TrainingError(RuntimeError):
    """No scorer could be trained; the message says why."""


def train(table: ScoreTable, folder: Path, encoder: str, *, seed: int, progress: Progress | None = None) -> int:
    """Saves the scorer of a table as the folder's next version and returns its number.

    Deterministic by `seed`. Raises ValueError for a table that allows no scorer.
    """
    selection = select(table, seed=seed, progress=progress)
    scorer = selection.fit(table, progress=progress)
    notes = {"rows": len(table.scores), "seed": seed, **describe(selection)}
    made = artifacts.Artifact(scorer, encoder, table.embeddings.shape[1], notes)
    return artifacts.save(folder, made, keep=KEPT_VERSIONS)


def describe(selection: Selection) -> dict[str, Any]:
    """What was compared and what was chosen, in plain values."""
    compared = [
        {"name": e.name, "failed": e.failed}
        if e.failed
        else {"name": e.name, "setting": e.setting, "estimate": e.value}
        for e in selection.estimates
    ]
    chosen = selection.chosen
    return {"chosen": chosen.name, "setting": chosen.setting, "criterion": selection.criterion, "compared": compared}


class TrainingProcess:
    """One training at a time, in a process that ends with it."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._killed = False

    def run(self, table: ScoreTable, folder: Path, encoder: str, seed: int) -> int:
        """`train` in another process; blocks until it has ended. Raises `TrainingError`."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(theirs, table, folder, encoder, seed), daemon=True)
        if self._killed:
            raise TrainingError("the server is shutting down")
        self._process.start()
        theirs.close()
        try:
            version, error = ours.recv()
        except EOFError:
            version, error = 0, "the training process ended without a result; was it killed for its memory?"
        finally:
            ours.close()
            self._process.join()
        if error:
            raise TrainingError(error)
        return int(version)

    def kill(self) -> None:
        """Ends a training that runs; none can be started afterwards."""
        self._killed = True
        if self._process is not None and self._process.is_alive():
            self._process.kill()


def _child(answer: Connection, table: ScoreTable, folder: Path, encoder: str, seed: int) -> None:
    os.nice(_NICE)
    try:
        answer.send((train(table, folder, encoder, seed=seed), ""))
    except Exception as error:
        answer.send((0, f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"))
