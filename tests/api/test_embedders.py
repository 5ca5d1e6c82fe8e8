"""What turns texts into rows beside the event loop: batching, joining, caching, and the encoder that settings name."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from api.harness import STATES, FakeEngine, byte_tokenizer
from support.encoders import save_encoder

from loramux.router.encoders.cache import CacheError, EmbeddingCache
from loramux.router.encoders.ngram import NgramEncoder
from loramux.router.interface import Floats
from loramux.server.api.auto.embedders import CachedEmbedder, JoinedEmbedder, LocalEmbedder
from loramux.server.api.auto.parts import NGRAM_DIM, RouterSetupError, prepare
from loramux.server.api.rendering import Renderer
from loramux.server.demo.assets import demo_base_path
from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.settings import flag_of, load_settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Slow:
    """An encoder that waits to be let go, and remembers its batches."""

    name = "slow"
    dim = 2

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> Floats:
        self.batches.append(list(texts))
        assert self.go.wait(10)
        if "bad" in texts:
            raise ValueError("bad text")
        return np.asarray([[len(text), 1] for text in texts], np.float32)


async def test_texts_that_wait_are_computed_together(threads: ThreadPoolExecutor) -> None:
    slow = Slow()
    embedder = LocalEmbedder(slow, threads)
    calls = [asyncio.create_task(embedder.embed(texts)) for texts in (["a"], ["bb", "ccc"], ["left"], ["dddd"])]
    while not slow.batches:
        await asyncio.sleep(0.001)
    calls[2].cancel()
    await asyncio.sleep(0.01)
    slow.go.set()
    rows = [await call for call in (calls[0], calls[1], calls[3])]
    assert [row[:, 0].tolist() for row in rows] == [[1.0], [2.0, 3.0], [4.0]]
    assert slow.batches[-1][-1] == "dddd"
    seen = [text for batch in slow.batches for text in batch]
    assert [text for text in seen if text != "left"] == ["a", "bb", "ccc", "dddd"]
    with pytest.raises(ValueError, match="bad text"):
        await embedder.embed(["bad"])
    assert (await embedder.embed(["again"])).tolist() == [[5.0, 1.0]]


async def test_a_cache_that_fails_costs_no_answer(
    threads: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    slow.go.set()
    cache = EmbeddingCache(tmp_path / "rows.sqlite3")
    embedder = CachedEmbedder(LocalEmbedder(slow, threads), cache, threads)
    first = await embedder.embed(["a", "bb", "a"])
    assert first[:, 0].tolist() == [1.0, 2.0, 1.0]
    assert (await embedder.embed(["bb", "a"])).tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert slow.batches == [["a", "bb"]]
    await embedder.embed(["a"], "another salt")
    assert slow.batches == [["a", "bb"], ["a"]]

    def refuse(*_: object) -> None:
        raise CacheError("disk full")

    monkeypatch.setattr(cache, "get", refuse)
    monkeypatch.setattr(cache, "put", refuse)
    assert (await embedder.embed(["a"])).tolist() == [[1.0, 1.0]]
    cache.close()


async def test_parts_stand_side_by_side(threads: ThreadPoolExecutor) -> None:
    one, two = NgramEncoder(32), NgramEncoder(16, longest=2)
    joined = JoinedEmbedder([LocalEmbedder(one, threads), LocalEmbedder(two, threads)])
    rows = await joined.embed(["hello", "world"])
    assert rows.shape == (2, joined.dim) == (2, 48)
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1], abs=1e-6)
    assert rows[:, :32] * np.sqrt(2) == pytest.approx(one.encode(["hello", "world"]), abs=1e-6)
    assert joined.name != JoinedEmbedder([LocalEmbedder(two, threads), LocalEmbedder(one, threads)]).name


async def test_encoders_by_their_setting(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    engine = FakeEngine()
    await engine.start()
    renderer = Renderer(byte_tokenizer())
    folder = save_encoder(tmp_path / "encoder")
    dims, names = {}, {}
    for spec in (
        "base", "ngram", "base+ngram", "ngram+base", str(folder), f"{folder}+ngram", f"ngram+{folder}",
    ):  # fmt: skip
        parts = prepare(load_settings({"router_encoder": spec}), demo_base_path(), 4)
        assert parts is not None
        assert parts.base_examples == demo_base_examples()
        embedder = parts.embedder(engine, renderer, threads)
        dims[spec] = embedder.dim
        names[spec] = embedder.name
        assert (await embedder.embed(["w1 w2", "w3"])).shape == (2, embedder.dim)
    assert list(dims.values()) == [STATES, NGRAM_DIM, STATES + NGRAM_DIM, STATES + NGRAM_DIM, 16, *[16 + NGRAM_DIM] * 2]
    assert names[f"{folder}+ngram"] == names[f"ngram+{folder}"] != names[str(folder)]
    assert prepare(load_settings({"router": "off"}), demo_base_path(), 4) is None
    for name, value in (("router_encoder", "base+base"), ("router_layer", "5")):
        with pytest.raises(RouterSetupError, match=flag_of(name)):
            prepare(load_settings({name: value}), demo_base_path(), 4)
    last = prepare(load_settings({"router_layer": "4"}), demo_base_path(), 4)
    assert last is not None
    assert last.layer == 4
