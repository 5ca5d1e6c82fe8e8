"""The scores rung: the ledger of scores, the scorer trained on them, and training another while the server runs."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from loramux.router import artifacts
from loramux.router.interface import BASE, Floats, Scorer
from loramux.router.policy import RouterPolicy
from loramux.router.scores.dataset import ScoredQuery, build_table
from loramux.server.api.auto.embedders import TEXTS_AT_ONCE, Embedder
from loramux.server.api.auto.ledger import LedgerError, ScoreLedger
from loramux.server.api.auto.training import TrainingError, TrainingProcess
from loramux.server.engine.protocol import EngineError

logger = logging.getLogger(__name__)
T = TypeVar("T")

LEDGER = "scores.sqlite3"
SCORERS = "scorers"
BASE_WORD = "base"  # stands for the base in what clients send, unless an adapter has that name
QUERY_CHARS = 8192  # of longer queries the end is looked at


def as_routed(row: ScoredQuery, base_words: Collection[str]) -> ScoredQuery:
    """The row as the router knows it: the end of the query, and the base under its key instead of one of its names."""
    scores = {BASE if name in base_words else name: score for name, score in row.scores.items()}
    return ScoredQuery(row.query[-QUERY_CHARS:], scores, row.group)


@dataclass(frozen=True, slots=True)
class Restricted:
    """A scorer's columns of some candidates; see `without`."""

    scorer: Scorer
    columns: tuple[int, ...]
    candidates: tuple[str, ...]

    @classmethod
    def without(cls, scorer: Scorer, gone: Collection[str]) -> "Restricted":
        """The scorer without the candidates that are gone."""
        kept = [(place, name) for place, name in enumerate(scorer.candidates) if name not in gone]
        return cls(scorer, tuple(place for place, _ in kept), tuple(name for _, name in kept))

    def score(self, embeddings: Floats) -> Floats:
        """See `Scorer.score`."""
        return np.asarray(self.scorer.score(embeddings)[:, self.columns], dtype=np.float32)


class ScoresRung:
    """What is known of adapters by scores. Public methods run on the event loop; `writer` is the thread that they use.

    Raises `LedgerError` when the file of scores cannot be used.
    """

    def __init__(self, folder: Path, policy: RouterPolicy, writer: ThreadPoolExecutor, max_bytes: int) -> None:
        self._scorers = folder / SCORERS
        self._ledger = ScoreLedger(folder / LEDGER, max_bytes)
        self._policy = policy
        self._writer = writer
        self._process = TrainingProcess()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="router-train")
        self._training: asyncio.Task[None] | None = None
        self._outcome: Literal["never", "done", "failed"] = "never"
        self._error: str | None = None
        self._artifact: artifacts.Artifact | None = None

    async def load(self, embedder: Embedder) -> None:
        """Uses the latest saved scorer, if there is one and it fits the encoder; says in the report why it does not."""
        try:
            await self._in_writer(partial(self._use, embedder))
        except artifacts.ArtifactError as error:
            logger.warning("the saved scorer is not used: %s", error)
            self._error = str(error)

    def _use(self, embedder: Embedder) -> None:
        if not artifacts.versions(self._scorers):
            return
        artifact = artifacts.load(self._scorers)
        if (artifact.encoder, artifact.dim) != (embedder.name, embedder.dim):
            raise artifacts.ArtifactError(
                f"scorer {artifact.version} was trained on embeddings of another encoder ({artifact.encoder}) than the "
                f"server's ({embedder.name}); train again (POST /v1/router/train) or start with that --router-encoder"
            )
        known = Restricted.without(artifact.scorer, self._ledger.forgotten())
        self._policy.use_scorer(known, embedder.name)
        self._artifact = artifact

    async def add(self, rows: Sequence[ScoredQuery]) -> None:
        """Keeps scores; durable on return. Raises `LedgerError` when the disk refuses."""
        await self._in_writer(partial(self._ledger.add, rows))

    def forget(self, name: str) -> None:
        """An adapter was deleted: its scores go, and no scorer trained so far knows whoever takes its name.

        To be called in the writer's thread: it blocks.
        """
        try:
            self._ledger.forget(name)
        except LedgerError as error:
            logger.error("the scores of %s stay, after its end: %s", name, error)

    def train(self, embedder: Embedder, candidates: Sequence[str], seed: int) -> bool:
        """Starts to train on the scores of these adapters and the base; False while a training runs."""
        if self._training is not None and not self._training.done():
            return False
        self._training = asyncio.create_task(self._train(embedder, candidates, seed), name="router-training")
        return True

    async def _train(self, embedder: Embedder, candidates: Sequence[str], seed: int) -> None:
        try:
            gone = await self._in_writer(self._ledger.forgotten)
            rows = await self._in_writer(partial(self._ledger.rows, [BASE, *candidates]))
            if not rows:
                raise TrainingError(
                    "there are no scores of the base or an adapter that is registered; send some to /v1/feedback or "
                    "/v1/router/scores"
                )
            texts = [row.query for row in rows]
            parts = [await embedder.embed(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
            table = build_table(rows, np.concatenate(parts))
            run = partial(self._process.run, table, self._scorers, embedder.name, seed)
            version = await asyncio.get_running_loop().run_in_executor(self._threads, run)
            await self._in_writer(partial(self._ledger.trained, gone))
            await self._in_writer(partial(self._use, embedder))
        except (ValueError, TrainingError, EngineError, LedgerError) as error:
            logger.warning("no scorer was trained: %s", error)
            self._outcome, self._error = "failed", str(error)
        except Exception as error:
            logger.exception("training a scorer failed")
            self._outcome, self._error = "failed", type(error).__name__
        else:
            logger.info("scorer %d is trained on %d queries and in use", version, len(rows))
            self._outcome, self._error = "done", None

    async def report(self) -> Mapping[str, Any]:
        """The rung in plain values."""
        queries, scores = await self._in_writer(self._ledger.counts)
        running = self._training is not None and not self._training.done()
        scorer = None
        if self._artifact is not None:
            known = [name for name in self._artifact.scorer.candidates if name != BASE]
            scorer = {
                "version": self._artifact.version,
                "adapters": len(known),
                "knows_base": BASE in self._artifact.scorer.candidates,
                **self._artifact.notes,
            }
        training = {"status": "running" if running else self._outcome, "error": None if running else self._error}
        return {"queries": queries, "scores": scores, "scorer": scorer, "training": training}

    async def stop(self) -> None:
        """Ends a training that runs; the writer must be idle afterwards."""
        self._process.kill()
        if self._training is not None:
            self._training.cancel()
            await asyncio.gather(self._training, return_exceptions=True)
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        """Closes the file, once the writer has ended."""
        self._ledger.close()

    async def _in_writer(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call)
