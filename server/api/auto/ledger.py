"""Scores of adapters on queries, kept beside the store: what feedback and uploads add, and the scorer is trained on.

A query's scores of one adapter are kept as their sum and number, so that the file grows with queries and not with
opinions; of those that came after the latest training the sums are kept once more, because a scorer that can grow takes
them in at once, and again after a restart. Everything is durable when a call returns. Beyond the bound the oldest
queries go.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from loramux.router.scores.dataset import ScoredQuery

_SCHEMA = """
CREATE TABLE IF NOT EXISTS queries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL, "group" TEXT NOT NULL, UNIQUE (text, "group")
);
CREATE TABLE IF NOT EXISTS scores (
    query INTEGER NOT NULL REFERENCES queries (id) ON DELETE CASCADE,
    candidate TEXT NOT NULL, total REAL NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (query, candidate)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS scores_by_candidate ON scores (candidate);
CREATE TABLE IF NOT EXISTS fresh (
    query INTEGER NOT NULL REFERENCES queries (id) ON DELETE CASCADE,
    candidate TEXT NOT NULL, total REAL NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (query, candidate)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS fresh_by_candidate ON fresh (candidate);
CREATE TABLE IF NOT EXISTS retired (candidate TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
"""
_KEPT_SHARE = 0.9  # of the bound, after the oldest queries went


class LedgerError(RuntimeError):
    """The file cannot be used; the message names it and the remedy."""


class ScoreLedger:
    """One file, one user: the caller serialises calls, which block. `max_bytes` bounds the text of the queries."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            self._bytes = self._number("SELECT coalesce(sum(length(text)), 0) FROM queries")
        except sqlite3.Error as error:
            raise LedgerError(f"{path.name}: {error}; move the file away to start without scores") from error

    def add(self, rows: Iterable[ScoredQuery]) -> None:
        """Adds the scores of each query. All rows or none. Raises `LedgerError` when the disk refuses."""
        execute = self._database.execute
        with self._transaction():
            for row in rows:
                key = (row.query, row.group)
                new = execute('INSERT INTO queries (text, "group") VALUES (?, ?) ON CONFLICT DO NOTHING', key)
                self._bytes += len(row.query) * new.rowcount
                (query,) = execute('SELECT id FROM queries WHERE text = ? AND "group" = ?', key).fetchone()
                for table in ("scores", "fresh"):
                    self._database.executemany(
                        f"INSERT INTO {table} VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE"
                        " SET total = total + excluded.total, count = count + 1",
                        [(query, candidate, float(score)) for candidate, score in row.scores.items()],
                    )
            self._shrink()

    def _shrink(self) -> None:
        """Deletes the oldest queries until their text fits; inside a transaction."""
        if self._bytes <= self._max_bytes:
            return
        room = int(self._max_bytes * _KEPT_SHARE)
        kept, last_gone = 0, 0
        with closing(self._database.execute("SELECT id, length(text) FROM queries ORDER BY id DESC")) as newest_first:
            for query, size in newest_first:
                if kept + size > room:
                    last_gone = query
                    break
                kept += size
        self._database.execute("DELETE FROM queries WHERE id <= ?", (last_gone,))
        self._bytes = kept

    def rows(self, candidates: Iterable[str], *, fresh: bool = False) -> list[ScoredQuery]:
        """Every query with its mean scores of these candidates, oldest first; none without any.

        With `fresh` only the scores that came after the latest training.
        """
        found: dict[int, tuple[str, str, dict[str, float]]] = {}
        for query, text, group, candidate, total, count in self._database.execute(
            'SELECT q.id, q.text, q."group", s.candidate, s.total, s.count'
            f" FROM {'fresh' if fresh else 'scores'} s JOIN queries q ON q.id = s.query"
            " WHERE s.candidate IN (SELECT value FROM json_each(?)) ORDER BY q.id, s.candidate",
            (json.dumps(list(candidates)),),
        ):
            found.setdefault(query, (text, group, {}))[2][candidate] = min(max(total / count, 0.0), 1.0)
        return [ScoredQuery(text, scores, group) for text, group, scores in found.values()]

    def fresh_candidates(self) -> list[str]:
        """Whoever was scored after the latest training."""
        return [str(row[0]) for row in self._database.execute("SELECT DISTINCT candidate FROM fresh")]

    def fresh_counts(self, candidates: Iterable[str]) -> dict[str, int]:
        """On how many queries each was scored after the latest training; those that were not are left out."""
        found = self._database.execute(
            "SELECT candidate, count(*) FROM fresh WHERE candidate IN (SELECT value FROM json_each(?))"
            " GROUP BY candidate",
            (json.dumps(list(candidates)),),
        )
        return {str(candidate): int(count) for candidate, count in found}

    def counts(self) -> tuple[int, int]:
        """(queries, scores) that are kept."""
        return self._number("SELECT count(*) FROM queries"), self._number("SELECT count(*) FROM scores")

    def forget(self, candidate: str, version: int) -> None:
        """Drops all scores of an adapter, and remembers that scorers up to this version know another of that name."""
        with self._transaction():
            for table in ("scores", "fresh"):
                self._database.execute(f"DELETE FROM {table} WHERE candidate = ?", (candidate,))
            self._database.execute("DELETE FROM queries WHERE id NOT IN (SELECT query FROM scores)")
            self._database.execute(
                "INSERT INTO retired VALUES (?, ?) ON CONFLICT DO UPDATE SET version = max(version, excluded.version)",
                (candidate, version),
            )
        self._bytes = self._number("SELECT coalesce(sum(length(text)), 0) FROM queries")

    def retired(self, version: int) -> list[str]:
        """Adapters that were deleted since the scorer of this version was trained."""
        found = self._database.execute("SELECT candidate FROM retired WHERE version >= ?", (version,))
        return [str(row[0]) for row in found]

    def begin_training(self) -> None:
        """What is kept at this moment goes into a training: it is no longer fresh once `end_training` says so."""
        with self._transaction():
            self._database.execute("DROP TABLE IF EXISTS temp.trained")
            self._database.execute("CREATE TEMP TABLE trained AS SELECT query, candidate, total, count FROM fresh")

    def end_training(self) -> None:
        """A scorer was trained on what was there at `begin_training`; what came since stays fresh."""
        with self._transaction():
            self._database.execute(
                "UPDATE fresh SET total = fresh.total - t.total, count = fresh.count - t.count FROM temp.trained t"
                " WHERE t.query = fresh.query AND t.candidate = fresh.candidate"
            )
            self._database.execute("DELETE FROM fresh WHERE count <= 0")
            self._database.execute("DROP TABLE temp.trained")

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing."""
        before = self._bytes
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.Error as error:
            self._bytes = before
            raise LedgerError(f"router cannot keep scores: {error}") from error
        except BaseException:
            self._bytes = before
            raise

    def _number(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])
