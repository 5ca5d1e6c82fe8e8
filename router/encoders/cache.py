"""Embeddings kept by content: the key is the digest of the encoder's name and the text, so nothing can be stale.

Rows lie in memory, least recently used dropped first, and, when a file is given, in SQLite beside it, where they
outlive the process and are shared between processes. The file is bounded, too: the rows that were not asked for during
the longest time go first (to the hour: a look-up should not be a write).
"""

import hashlib
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from loramux.router.interface import Encoder, Floats

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, row BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rows_by_use ON rows (used);
CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID; -- an earlier version's
INSERT OR IGNORE INTO rows SELECT key, row, 0 FROM embeddings;
DROP TABLE embeddings;
"""
_KEPT_SHARE = 0.9  # of the bound, after the oldest rows went
_GRAIN_SECONDS = 3600
_AT_ONCE = 500  # keys per SQL statement


class CacheError(RuntimeError):
    """The cache's file cannot be used; the message names it and the remedy."""


class EmbeddingCache:
    """Rows by key. `max_bytes` bounds the rows kept in memory; `path` is the SQLite file, None for memory alone, and
    `max_file_bytes` bounds the rows in it (None: any number; other processes may add to them in between).

    May be used from several threads. Raises CacheError when the file is no database or cannot be written.
    """

    def __init__(self, path: Path | None = None, max_bytes: int = 64 << 20, max_file_bytes: int | None = None) -> None:
        if max_bytes < 0 or (max_file_bytes or 0) < 0:
            raise ValueError("max_bytes and max_file_bytes must be at least 0")
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._file_bytes = 0
        self._bytes = 0
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._path = path
        self._database: sqlite3.Connection | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._database = sqlite3.connect(path, check_same_thread=False, timeout=30)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.executescript(_SCHEMA)
                self._count()
            except sqlite3.Error as error:
                self.close()
                raise self._unusable(error) from error

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The rows that are known, by key."""
        with self._lock:
            found = {}
            missing = []
            for key in keys:
                if key in self._rows:
                    self._rows.move_to_end(key)
                    found[key] = self._rows[key]
                else:
                    missing.append(key)
            if self._database is not None:
                for key, row in self._select(self._database, missing):
                    found[key] = row
                    self._remember(key, row)
            return found

    def put(self, rows: dict[bytes, bytes]) -> None:
        """Keeps the rows."""
        with self._lock:
            for key, row in rows.items():
                self._remember(key, row)
            if self._database is None:
                return
            try:
                with self._database:
                    stamped = [(key, row, _now()) for key, row in rows.items()]
                    self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", stamped)
                    self._file_bytes += sum(len(row) for row in rows.values())
                    self._shrink(self._database)
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def delete(self, keys: Iterable[bytes]) -> None:
        """Forgets rows; keys that are not there are ignored."""
        with self._lock:
            gone = list(keys)
            for key in gone:
                self._bytes -= len(self._rows.pop(key, b""))
            if self._database is None:
                return
            try:
                with self._database:
                    self._database.executemany("DELETE FROM rows WHERE key = ?", [(key,) for key in gone])
                self._count()
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def close(self) -> None:
        """Closes the file; closing twice is allowed."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _select(self, database: sqlite3.Connection, keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        try:
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                found = database.execute(f"SELECT key, row, used FROM rows WHERE key IN ({marks})", part).fetchall()
                rows += [(key, row) for key, row, _ in found]
                stale = [(_now(), key) for key, _, used in found if used < _now()]
                if stale:
                    with database:
                        database.executemany("UPDATE rows SET used = ? WHERE key = ?", stale)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return rows

    def _shrink(self, database: sqlite3.Connection) -> None:
        """Deletes the rows of the oldest use until the rest fits; inside a transaction."""
        if self._max_file_bytes is None or self._file_bytes <= self._max_file_bytes:
            return
        room = int(self._max_file_bytes * _KEPT_SHARE)
        self._count()  # replaced rows and other processes
        for key, size in database.execute("SELECT key, length(row) FROM rows ORDER BY used").fetchall():
            if self._file_bytes <= room:
                break
            database.execute("DELETE FROM rows WHERE key = ?", (key,))
            self._file_bytes -= size

    def _count(self) -> None:
        """How many bytes the file's rows have."""
        if self._database is not None:
            (self._file_bytes,) = self._database.execute("SELECT coalesce(sum(length(row)), 0) FROM rows").fetchone()

    def _remember(self, key: bytes, row: bytes) -> None:
        self._bytes += len(row) - len(self._rows.pop(key, b""))
        self._rows[key] = row
        while self._bytes > self._max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self._bytes -= len(dropped)

    def _unusable(self, error: sqlite3.Error) -> CacheError:
        name = self._path.name if self._path else "the cache"
        return CacheError(f"embedding cache {name}: {error}; delete the file, its rows can be computed again")


def _now() -> int:
    return int(time.time()) // _GRAIN_SECONDS


class CachedEncoder:
    """The same rows as `encoder`, computed once per distinct text. `hits` and `misses` count texts.

    A row from the cache and a row computed afresh may differ by float rounding, as rows of an encoder do with the batch
    they are computed in.
    """

    def __init__(self, encoder: Encoder, cache: EmbeddingCache) -> None:
        self._encoder = encoder
        self._cache = cache
        self.hits = 0
        self.misses = 0

    @property
    def name(self) -> str:
        return self._encoder.name

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def encode(self, texts: Sequence[str]) -> Floats:
        """float32 [len(texts), dim]."""
        keys = [self._key(text) for text in texts]
        known = self._cache.get(dict.fromkeys(keys))
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if len(known.get(key, b"")) != 4 * self.dim}
        self.hits += sum(key not in fresh for key in keys)
        self.misses += sum(key in fresh for key in keys)
        if fresh:
            computed = self._encoder.encode(list(fresh.values()))
            rows = {key: row.astype("<f4").tobytes() for key, row in zip(fresh, computed, strict=True)}
            self._cache.put(rows)
            known |= rows
        joined = b"".join(known[key] for key in keys)
        return np.frombuffer(joined, "<f4").reshape(len(texts), self.dim).astype(np.float32)

    def _key(self, text: str) -> bytes:
        digest = hashlib.sha256(self._encoder.name.encode())
        digest.update(b"\0")
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()
