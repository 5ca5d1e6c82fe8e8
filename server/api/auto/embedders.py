"""Texts to rows without stopping the event loop: engine probes, encoders in a thread, both side by side, and caches."""

import asyncio
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol, TypeVar

import numpy as np

from loramux.router.encoders.cache import CacheError, EmbeddingCache
from loramux.router.interface import Encoder, Floats
from loramux.server.api.auto.base_states import BaseStates
from loramux.server.api.auto.probing import pooled
from loramux.server.api.auto.together import Together
from loramux.server.api.lanes import in_lanes
from loramux.server.engine.protocol import EngineClient

PROBES_AT_ONCE = 8  # of one call: examples by the thousand must not fill the engine's queue
TEXTS_AT_ONCE = 64
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Embedder(Protocol):
    """An encoder whose rows are waited for. `name` and `dim` mean what they mean for `router.interface.Encoder`."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    async def embed(self, texts: Sequence[str], salt: str = "", tenant: str = "") -> Floats:
        """float32 [len(texts), dim]. `salt` separates what one caller's texts leave in caches from other callers';
        `tenant` is whose turn in the engine's queue it is, "" the router's own."""
        ...


class ProbeEmbedder:
    """Rows from the engine's hidden states (`BaseStates`), one pooling request per text. Raises `EngineError`.

    Of one call `at_once` texts are under way; with 1 no batch's rounding depends on timing.
    """

    def __init__(self, engine: EngineClient, states: BaseStates, at_once: int = PROBES_AT_ONCE) -> None:
        self._at_once = at_once
        self._engine = engine
        self._states = states
        self._numbers = itertools.count()

    @property
    def name(self) -> str:
        return self._states.name

    @property
    def dim(self) -> int:
        return self._states.dim

    async def embed(self, texts: Sequence[str], salt: str = "", tenant: str = "") -> Floats:
        """See `Embedder.embed`. Raises a 400 where the chat template refuses a text."""
        if len(texts) == 1:
            return (await self._row(texts[0], salt, tenant))[None]
        rows = await in_lanes(texts, lambda text: self._row(text, salt, tenant), self._at_once)
        return np.array(rows, np.float32).reshape(len(texts), self.dim)

    async def _row(self, text: str, salt: str, tenant: str) -> Floats:
        tokens = await self._states.prompts.tokens_of(text)
        if not tokens:
            return np.zeros(self.dim, np.float32)
        name = f"probe-{next(self._numbers)}"
        data = await pooled(self._engine, name, tokens, self._states.pooling, salt, tenant=tenant)
        return self._states.row(data)


class LocalEmbedder:
    """An encoder that runs in a thread. Texts that arrive while it computes are computed together next."""

    def __init__(self, encoder: Encoder, threads: Executor) -> None:
        self._encoder = encoder
        self._lots: Together[Sequence[str], Floats] = Together(threads, self._encoded, TEXTS_AT_ONCE, len)

    @property
    def name(self) -> str:
        return self._encoder.name

    @property
    def dim(self) -> int:
        return self._encoder.dim

    async def embed(self, texts: Sequence[str], salt: str = "", tenant: str = "") -> Floats:
        """See `Embedder.embed`; nothing is kept and no engine asked, so that it is the same for every caller."""
        return await self._lots.ask(texts)

    def _encoded(self, parts: list[Sequence[str]]) -> list[Floats]:
        rows = self._encoder.encode([text for part in parts for text in part])
        ends = np.cumsum([len(part) for part in parts])
        return np.split(rows, ends[:-1])


class JoinedEmbedder:
    """Several embedders' rows side by side, divided by sqrt(their number): of rows of norm 1 it makes such rows."""

    def __init__(self, parts: Sequence[Embedder]) -> None:
        self._parts = tuple(parts)
        names = json.dumps([part.name for part in parts])
        self.name = f"joined-{hashlib.sha256(names.encode()).hexdigest()[:32]}"
        self.dim = sum(part.dim for part in parts)

    async def embed(self, texts: Sequence[str], salt: str = "", tenant: str = "") -> Floats:
        """See `Embedder.embed`; the parts work at the same time."""
        rows = await asyncio.gather(*(part.embed(texts, salt, tenant) for part in self._parts))
        return np.asarray(np.concatenate(rows, axis=1) / np.sqrt(len(rows)), dtype=np.float32)


class CachedEmbedder:
    """The same rows, computed once per distinct text and salt. A cache with a file is read and written in a thread.

    A file that fails costs time, not answers: rows are computed again, and the log says why.
    """

    def __init__(self, embedder: Embedder, cache: EmbeddingCache, threads: Executor | None = None) -> None:
        self._embedder = embedder
        self._cache = cache
        self._threads = threads

    @property
    def name(self) -> str:
        return self._embedder.name

    @property
    def dim(self) -> int:
        return self._embedder.dim

    async def embed(self, texts: Sequence[str], salt: str = "", tenant: str = "") -> Floats:
        """See `Embedder.embed`."""
        keys = [self._key(text, salt) for text in texts]
        known: dict[bytes, bytes] = {}
        try:
            known = await self._call(lambda: self._cache.get(dict.fromkeys(keys)))
        except CacheError as error:
            logger.error("%s", error)
        fresh = {key: text for key, text in zip(keys, texts, strict=True) if len(known.get(key, b"")) != 4 * self.dim}
        if fresh:
            rows = await self._embedder.embed(list(fresh.values()), salt, tenant)
            found = {key: row.astype("<f4").tobytes() for key, row in zip(fresh, rows, strict=True)}
            known |= found
            try:
                await self._call(lambda: self._cache.put(found))
            except CacheError as error:
                logger.error("%s", error)
        joined = b"".join(known[key] for key in keys)
        return np.frombuffer(joined, "<f4").reshape(len(texts), self.dim).astype(np.float32)

    async def forget(self, texts: Sequence[str]) -> None:
        """Deletes the rows of texts that nobody has any more; who has the same text computes it again."""
        try:
            await self._call(lambda: self._cache.delete(self._key(text, "") for text in texts))
        except CacheError as error:
            logger.error("%s", error)

    async def _call(self, call: Callable[[], T]) -> T:
        if self._threads is None:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _key(self, text: str, salt: str) -> bytes:
        digest = hashlib.sha256(json.dumps([self.name, salt]).encode())
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()
