"""Scores of adapters on queries, kept beside the store: what feedback and uploads add, and the scorer is trained on.

A query's scores of one adapter are kept as their sum and number, so that the file grows with queries and not with
opinions. Everything is durable when a call returns. Beyond the bound the oldest queries go.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
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
CREATE TABLE IF NOT EXISTS forgotten (candidate TEXT PRIMARY KEY) WITHOUT ROWID;
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
                self._database.executemany(
                    "INSERT INTO scores VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE"
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

    def rows(self, candidates: Sequence[str]) -> list[ScoredQuery]:
        """Every query with its mean scores of these candidates, oldest first; none without any."""
        wanted = set(candidates)
        found: dict[int, tuple[str, str, dict[str, float]]] = {}
        for query, text, group, candidate, total, count in self._database.execute(
            'SELECT q.id, q.text, q."group", s.candidate, s.total, s.count'
            " FROM queries q JOIN scores s ON s.query = q.id ORDER BY q.id, s.candidate"
        ):
            if candidate in wanted:
                found.setdefault(query, (text, group, {}))[2][candidate] = min(max(total / count, 0.0), 1.0)
        return [ScoredQuery(text, scores, group) for text, group, scores in found.values()]

    def counts(self) -> tuple[int, int]:
        """(queries, scores) that are kept."""
        return self._number("SELECT count(*) FROM queries"), self._number("SELECT count(*) FROM scores")

    def forget(self, candidate: str) -> None:
        """Drops all scores of an adapter, and remembers that scorers trained so far do not know it."""
        with self._transaction():
            self._database.execute("DELETE FROM scores WHERE candidate = ?", (candidate,))
            self._database.execute("DELETE FROM queries WHERE id NOT IN (SELECT query FROM scores)")
            self._database.execute("INSERT INTO forgotten VALUES (?) ON CONFLICT DO NOTHING", (candidate,))
        self._bytes = self._number("SELECT coalesce(sum(length(text)), 0) FROM queries")

    def forgotten(self) -> list[str]:
        """Adapters that were deleted after the scorer was trained."""
        return [row[0] for row in self._database.execute("SELECT candidate FROM forgotten")]

    def trained(self, without: Iterable[str]) -> None:
        """A new scorer was trained on what was left without these: it does not need to forget them."""
        with self._transaction():
            self._database.executemany("DELETE FROM forgotten WHERE candidate = ?", [(name,) for name in without])

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
