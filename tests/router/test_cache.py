"""The embedding cache: each text once, nothing stale, bounded memory, a file that survives and is shared."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from loramux.router.encoders.cache import CachedEncoder, CacheError, EmbeddingCache
from loramux.router.encoders.ngram import NgramEncoder
from loramux.router.interface import Floats


class Counting:
    """Rows of n-grams; remembers what it was asked."""

    def __init__(self, dim: int = 32) -> None:
        self.inner = NgramEncoder(dim)
        self.name, self.dim = self.inner.name, dim
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Floats:
        self.asked += texts
        return self.inner.encode(texts)


def test_each_text_is_encoded_once() -> None:
    counting = Counting()
    encoder = CachedEncoder(counting, EmbeddingCache())
    rows = encoder.encode(["a", "b", "a"])
    again = encoder.encode(["b", "c"])
    assert counting.asked == ["a", "b", "c"]
    assert (rows == counting.inner.encode(["a", "b", "a"])).all()
    assert (again == counting.inner.encode(["b", "c"])).all()
    assert (encoder.hits, encoder.misses) == (1, 4)
    assert encoder.encode([]).shape == (0, 32)
    assert (encoder.name, encoder.dim) == (counting.name, 32)


def test_rows_belong_to_their_encoder() -> None:
    cache = EmbeddingCache()
    narrow, wide = CachedEncoder(Counting(32), cache), CachedEncoder(Counting(64), cache)
    assert narrow.encode(["a"]).shape == (1, 32)
    assert wide.encode(["a"]).shape == (1, 64)


def test_memory_is_bounded_and_the_oldest_use_goes_first() -> None:
    counting = Counting()
    encoder = CachedEncoder(counting, EmbeddingCache(max_bytes=2 * 4 * 32))
    for text in ("a", "b", "a", "c", "a", "b"):
        encoder.encode([text])
    assert counting.asked == ["a", "b", "c", "b"]


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_the_file_outlives_the_process_and_is_shared(tmp_path: Path, max_bytes: int) -> None:
    path = tmp_path / "sub" / "rows.sqlite"
    first, second = EmbeddingCache(path, max_bytes), EmbeddingCache(path, max_bytes)
    texts = [f"text {i}" for i in range(1200)]
    expected = CachedEncoder(Counting(), first).encode(texts)
    counting = Counting()
    assert (CachedEncoder(counting, second).encode(texts) == expected).all()
    first.close()
    second.close()
    third = EmbeddingCache(path, max_bytes)
    assert (CachedEncoder(counting, third).encode(texts[::-1]) == expected[::-1]).all()
    assert counting.asked == []
    third.close()
    third.close()


def test_a_row_of_another_length_is_computed_again() -> None:
    cache, counting = EmbeddingCache(), Counting()
    encoder = CachedEncoder(counting, cache)
    encoder.encode(["a"])
    cache.put(dict.fromkeys(cache._rows, b"short"))
    assert np.isfinite(encoder.encode(["a"])).all()
    assert counting.asked == ["a", "a"]


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.sqlite"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(CacheError, match=r"rows\.sqlite: .*delete the file"):
        EmbeddingCache(path)
    with pytest.raises(ValueError, match="max_bytes"):
        EmbeddingCache(max_bytes=-1)


def test_the_file_is_bounded_and_the_oldest_use_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = [0]
    monkeypatch.setattr("loramux.router.encoders.cache._now", lambda: hour[0])
    path = tmp_path / "rows.sqlite"
    cache = EmbeddingCache(path, max_bytes=0, max_file_bytes=10 * 4 * 32)
    counting = Counting()
    encoder = CachedEncoder(counting, cache)
    for text in "abcdefghij":
        hour[0] += 1
        encoder.encode([text])
    encoder.encode(["a"])  # is of use again
    hour[0] += 1
    encoder.encode(["k"])  # one too many: a tenth goes
    counting.asked.clear()
    encoder.encode(list("adefghijk"))
    assert counting.asked == []
    encoder.encode(list("bc"))
    assert counting.asked == ["b", "c"]
    for number in range(200):
        encoder.encode([f"text {number}"])
    cache.close()
    again = EmbeddingCache(path, max_bytes=0, max_file_bytes=10 * 4 * 32)
    assert 0 < again._file_bytes <= 10 * 4 * 32
    again.close()


def test_rows_are_deleted(tmp_path: Path) -> None:
    for cache in (EmbeddingCache(), EmbeddingCache(tmp_path / "rows.sqlite")):
        cache.put({b"a": b"1234", b"b": b"5678"})
        cache.delete([b"a", b"c"])
        assert cache.get([b"a", b"b"]) == {b"b": b"5678"}
        cache.close()


def test_an_earlier_versions_file_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE embeddings (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID")
        database.execute("INSERT INTO embeddings VALUES (?, ?)", (b"a", b"1234"))
    for _ in range(2):
        cache = EmbeddingCache(path)
        assert cache.get([b"a"]) == {b"a": b"1234"}
        cache.close()
