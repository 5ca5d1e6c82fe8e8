"""The scores rung: the ledger of scores, the scorer trained on them, and how it gets better while the server runs.

- Training (`POST /v1/router/train`, or `loramux route train` beside the server) makes a new version in the store's
  folder; the server uses the latest within `WATCH_SECONDS`, whoever made it.
- Scores that arrive in between are taken in at once by a scorer that can grow (ridge regression, nearest neighbours,
  ensembles of these): a candidate that it knows gets one more row, a new one becomes a candidate with its `MIN_NEW`-th.
  Of repeated opinions of one query the last counts until the next training or start, which take their mean.
- A scorer grows within `router.scores.budget`; what goes beyond it is kept for the next training.
- What cannot grow (RouterDC's head) waits for a training, and so does everything before the first: cross-validation has
  to name a scorer once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from loramux.router import artifacts
from loramux.router.interface import BASE, Floats, GrowingScorer, Scorer
from loramux.router.policy import RouterPolicy
from loramux.router.scores.budget import NoRoomError
from loramux.router.scores.dataset import ScoredQuery, ScoreTable, build_table, newest
from loramux.router.scores.ensemble import can_grow, growing
from loramux.server.api.auto.embedders import TEXTS_AT_ONCE, Embedder
from loramux.server.api.auto.ending import end
from loramux.server.api.auto.ledger import LedgerError, ScoreLedger
from loramux.server.api.auto.recent import RecentDeletions
from loramux.server.api.auto.training import TrainingError, TrainingProcess
from loramux.server.api.errors import APIError
from loramux.server.engine.protocol import EngineError

logger = logging.getLogger(__name__)
T = TypeVar("T")

WATCH_SECONDS = 2.0
MIN_NEW = (
    10  # scored queries of an adapter that the scorer does not know: with fewer a single opinion would be all of it
)
GROW_AT_ONCE = 16  # rows that a call waits for; more are taken in behind it
LEDGER = "scores.sqlite3"
SCORERS = "scorers"
BASE_WORD = "base"  # stands for the base in what clients send, unless an adapter has that name
QUERY_CHARS = 8192  # of longer queries the end is looked at


class AdapterGoneError(LookupError):
    """Scores of an adapter that was deleted meanwhile."""


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


def _removed(scorer: Scorer | None, gone: Collection[str]) -> Scorer | None:
    """The scorer without some candidates; None when none is left."""
    if scorer is None or not set(gone) & set(scorer.candidates):
        return scorer
    if not set(scorer.candidates) - set(gone):
        return None
    return growing(scorer).without(list(gone)) if can_grow(scorer) else Restricted.without(scorer, gone)


def _grown(scorer: GrowingScorer, table: ScoreTable) -> tuple[GrowingScorer, int]:
    """The scorer with the table's first rows, and how many: all, half of them, a quarter ..., as there is room.

    Candidates that it does not know need `MIN_NEW` rows among these.
    """
    known = set(scorer.candidates)
    count = len(table.scores)
    while count:
        part = table.rows(np.arange(count))
        scored = (~np.isnan(part.scores)).sum(0)
        part = part.columns([c for c, n in zip(part.candidates, scored, strict=True) if n >= MIN_NEW or c in known])
        part = part.rows(np.flatnonzero((~np.isnan(part.scores)).any(1)))
        with contextlib.suppress(NoRoomError):
            return scorer.update(part.embeddings, part.scores, part.candidates), count
        count //= 2
    return scorer, 0


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
        self._rows = 0  # that the latest training is of
        self._left_out = 0
        self._embedder: Embedder | None = None
        self._changing = asyncio.Lock()  # one change of the scorer at a time
        self._behind: set[asyncio.Task[bool]] = set()
        self._seen = 0  # the latest version that was looked at
        self._artifact: artifacts.Artifact | None = None
        self._scorer: Scorer | None = None  # the artefact's, grown and without whoever was deleted; the writer's
        self._grown = 0
        self._full = False  # whether the log says that there is no room to grow
        self._deletions = RecentDeletions()  # the writer's

    async def load(self, embedder: Embedder) -> None:
        """Uses the latest saved scorer, if there is one and it fits the encoder; says in the report why it does not."""
        self._embedder = embedder
        await self._look()

    async def watch(self) -> None:
        """Looks for newer versions until cancelled; a training of this server's says itself when its version is due."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if not self._is_training:
                await self._look()

    async def _look(self) -> None:
        """Uses the latest version if it is another one, with the scores that came since the latest training."""
        async with self._changing:
            try:
                latest = max(await self._in_writer(partial(artifacts.versions, self._scorers)), default=0)
                if latest == self._seen or self._embedder is None:
                    return
                self._seen = latest
                await self._in_writer(partial(self._use, latest, self._embedder))
                logger.info("scorer %d is in use", latest)
                await self._grow(await self._in_writer(self._fresh), self._embedder)
            except (artifacts.ArtifactError, OSError) as error:
                logger.warning("the saved scorer is not used: %s", error)
                self._error = str(error)

    def _use(self, version: int, embedder: Embedder) -> None:
        artifact = artifacts.load(self._scorers, version)
        artifact.check_encoder(embedder.name, embedder.dim)
        self._artifact, self._grown, self._full = artifact, 0, False
        self._scorer = _removed(artifact.scorer, self._ledger.retired(version))
        self._policy.use_scorer(self._scorer, embedder.name)

    def _fresh(self) -> list[ScoredQuery]:
        """The scores since the latest training, of candidates that the scorer may take in."""
        return self._ledger.rows(self._ledger.fresh_candidates(), fresh=True)

    async def add(self, rows: Sequence[ScoredQuery], since: float | None = None) -> bool:
        """Keeps scores, durable on return, and says whether they count already. Raises `LedgerError`.

        With `since` (`time.monotonic`) they are of the adapters that there were at that moment: raises
        `AdapterGoneError`, and keeps none, where one was deleted from then on.
        """
        await self._in_writer(partial(self._record, rows, since))
        task = asyncio.create_task(self._learn(rows))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return await asyncio.shield(task) if len(rows) <= GROW_AT_ONCE else False

    def _record(self, rows: Sequence[ScoredQuery], since: float | None) -> None:
        if since is not None and self._deleted(rows, since):
            raise AdapterGoneError
        self._ledger.add(rows)

    def _deleted(self, rows: Sequence[ScoredQuery], since: float) -> set[str]:
        """Whose scores these are that was deleted since; in the writer's thread."""
        return {name for row in rows for name in row.scores if self._deletions.since(name, since)}

    async def _learn(self, rows: Sequence[ScoredQuery]) -> bool:
        async with self._changing:
            return self._embedder is not None and await self._grow(rows, self._embedder)

    async def _grow(self, rows: Sequence[ScoredQuery], embedder: Embedder) -> bool:
        """Takes scores into the scorer; whether all of them count. A failure costs the growth, not the scorer."""
        if self._scorer is None or not can_grow(self._scorer) or not rows:
            return False
        begun = time.monotonic()
        rows, complete = await self._in_writer(partial(self._countable, rows))
        if not rows:
            return False
        fitting = newest(rows, embedder.dim)
        rows, complete = fitting, complete and len(fitting) == len(rows)
        try:
            embeddings = await _embedded(embedder, [row.query for row in rows])
            complete &= await self._in_writer(partial(self._take_in, rows, embeddings, embedder.name, begun))
        except (EngineError, ValueError, APIError) as error:
            logger.warning("scores do not count before the next training or start: %s", error)
            return False
        return complete

    def _countable(self, rows: Sequence[ScoredQuery]) -> tuple[list[ScoredQuery], bool]:
        """The rows of known candidates, and all fresh rows of those that have become enough; whether that is all."""
        assert self._scorer is not None
        known = set(self._scorer.candidates)
        found = []
        new: set[str] = set()
        for row in rows:
            new |= row.scores.keys() - known
            scores = {name: score for name, score in row.scores.items() if name in known}
            if scores:
                found.append(ScoredQuery(row.query, scores, row.group))
        enough = [name for name, count in self._ledger.fresh_counts(new).items() if count >= MIN_NEW]
        if enough:
            found += self._ledger.rows(enough, fresh=True)
        return found, len(enough) == len(new)

    def _take_in(self, rows: Sequence[ScoredQuery], embeddings: Floats, encoder: str, begun: float) -> bool:
        """The scorer grows, but for whoever was deleted since `begun`, and as there is room; whether that is all.

        In the writer's thread, so that nobody is deleted meanwhile.
        """
        gone = self._deleted(rows, begun)
        left = sorted({name for row in rows for name in row.scores} - gone)
        if self._scorer is None or not left:
            return False
        table = build_table(rows, embeddings, left)
        self._scorer, count = _grown(growing(self._scorer), table)
        self._grown += count
        self._policy.use_scorer(self._scorer, encoder)
        if count < len(table.scores) and not self._full:
            logger.warning("the scorer has grown to its bound; scores beyond it count from the next training on")
            self._full = True
        return not gone and count == len(table.scores)

    def forget(self, name: str) -> None:
        """An adapter was deleted: its scores go, and no scorer trained so far knows whoever takes its name.

        To be called in the writer's thread: it blocks. The policy has to be told as well.
        """
        self._deletions.add(name)
        self._scorer = _removed(self._scorer, [name])
        latest = max(artifacts.versions(self._scorers), default=0)
        try:
            self._ledger.forget(name, latest + self._is_training)
        except LedgerError as error:
            logger.error("the scores of %s stay, after its end: %s", name, error)

    @property
    def _is_training(self) -> bool:
        return self._training is not None and not self._training.done()

    def train(self, candidates: Sequence[str], seed: int) -> bool | None:
        """Starts to train on the scores of these adapters and the base; False while a training runs, None too early."""
        if self._embedder is None:
            return None
        if self._is_training:
            return False
        self._training = asyncio.create_task(self._train(self._embedder, candidates, seed), name="router-training")
        return True

    async def _train(self, embedder: Embedder, candidates: Sequence[str], seed: int) -> None:
        self._rows = self._left_out = 0
        try:
            rows = await self._in_writer(partial(self._begin, candidates))
            if not rows:
                raise TrainingError(
                    "there are no scores of the base or an adapter that is registered; send some to /v1/feedback or "
                    "/v1/router/scores"
                )
            used = newest(rows, embedder.dim)
            self._rows, self._left_out = len(used), len(rows) - len(used)
            table = build_table(used, await _embedded(embedder, [row.query for row in used]))
            run = partial(self._process.run, table, self._scorers, embedder.name, seed)
            version = await asyncio.get_running_loop().run_in_executor(self._threads, run)
            await self._in_writer(self._ledger.end_training)
            await self._look()
        except (ValueError, TrainingError, EngineError, LedgerError) as error:
            logger.warning("no scorer was trained: %s", error)
            self._outcome, self._error = "failed", str(error)
        except Exception as error:
            logger.exception("training a scorer failed")
            self._outcome, self._error = "failed", type(error).__name__
        else:
            logger.info(
                "scorer %d is trained on %d queries, %d older ones left out", version, self._rows, self._left_out
            )
            self._outcome, self._error = "done", None

    def _begin(self, candidates: Sequence[str]) -> list[ScoredQuery]:
        """What a training is of; what comes later stays fresh."""
        self._ledger.begin_training()
        return self._ledger.rows([BASE, *candidates])

    async def report(self) -> Mapping[str, Any]:
        """The rung in plain values."""
        queries, scores = await self._in_writer(self._ledger.counts)
        running, scorer = self._is_training, None
        if self._artifact is not None:
            known = () if self._scorer is None else self._scorer.candidates
            scorer = {
                "version": self._artifact.version,
                "adapters": sum(name != BASE for name in known),
                "knows_base": BASE in known,
                "can_grow": self._scorer is not None and can_grow(self._scorer),
                "rows_since_training": self._grown,
                **self._artifact.notes,
            }
        training = {
            "status": "running" if running else self._outcome,
            "error": None if running else self._error,
            "rows": self._rows,
            "rows_left_out": self._left_out,
        }
        return {"queries": queries, "scores": scores, "scorer": scorer, "training": training}

    async def stop(self) -> None:
        """Ends a training that runs; the writer must be idle afterwards."""
        self._process.kill()
        await end([*self._behind, *([self._training] if self._training is not None else [])])
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        """Closes the file, once the writer has ended."""
        self._ledger.close()

    async def _in_writer(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call)


async def _embedded(embedder: Embedder, texts: Sequence[str]) -> Floats:
    """float32 [len(texts), dim], some at a time, so that others are served in between."""
    parts = [await embedder.embed(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
    return np.concatenate([np.zeros((0, embedder.dim), np.float32), *parts])
