"""Keeping the examples rung up to date: what is to be embedded, in what order, and when it counts.

One worker embeds texts a batch at a time, what was uploaded last first, and puts the rows into the gallery in a thread.
What is replaced or removed meanwhile never reaches the gallery.
"""

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loramux.adapters_store.registry import AdapterVersion
from loramux.router.gallery.gallery import Gallery, Kind
from loramux.router.interface import BASE
from loramux.server.api.auto.embedders import Embedder
from loramux.server.engine.protocol import EngineError

logger = logging.getLogger(__name__)

LEARNT_AT_ONCE = 256  # texts: the gallery fits anew after each batch while it is small
RETRY_SECONDS = 0.5
LOG_SECONDS = 5.0
SAVE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """What one adapter is known by. `learned` becomes True when it counts, False when it never will."""

    texts: tuple[str, ...]
    kind: Kind
    learned: "asyncio.Future[bool]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @classmethod
    def of(cls, version: AdapterVersion) -> "Texts | None":
        """An adapter's example prompts, or its description; None where it has neither."""
        examples = tuple(text for text in version.examples or () if text.strip())
        if examples:
            return cls(examples, "examples")
        if version.description and version.description.strip():
            return cls((version.description,), "description")
        return None

    @property
    def digest(self) -> str:
        """Tells these texts from others."""
        return hashlib.sha256(json.dumps([self.kind, self.texts]).encode()).hexdigest()

    def end(self, learned: bool) -> None:
        """Tells who waits."""
        if not self.learned.done():
            self.learned.set_result(learned)


class Learner:
    """The worker. Everything but the thread's work happens on the event loop."""

    def __init__(self) -> None:
        self._todo: OrderedDict[str, Texts] = OrderedDict()
        self._flying: dict[str, Texts] = {}
        self._wake = asyncio.Event()
        self._counted: dict[str, Texts] = {}
        self.changed = False  # since what counts was last saved
        self.failed: dict[str, str] = {}

    @property
    def pending(self) -> int:
        """Adapters whose texts do not count yet."""
        return sum(key != BASE for key in self._todo) + sum(key != BASE for key in self._flying)

    def waiting(self, keys: Collection[str]) -> int:
        """How many of these adapters have texts that do not count yet."""
        return sum(key in keys for key in self._todo) + sum(key in keys for key in self._flying)

    def add(self, items: Iterable[tuple[str, Texts]], *, first: bool) -> None:
        """Takes texts in; what the same adapter had waiting is replaced."""
        for key, texts in items:
            self.drop(key)
            self._todo[key] = texts
            if first:
                self._todo.move_to_end(key, last=False)
        self._wake.set()

    def drop(self, key: str) -> None:
        """Forgets what is waiting, or being embedded, for an adapter."""
        self.failed.pop(key, None)
        for found in (self._todo.pop(key, None), self._flying.pop(key, None)):
            if found is not None:
                found.end(False)

    def uncount(self, key: str) -> Texts | None:
        """The adapter's texts count no more; what they were."""
        found = self._counted.pop(key, None)
        self.changed |= found is not None
        return found

    def counted(self) -> dict[str, str]:
        """A digest of the texts of each adapter, and of the base, that counts."""
        return {key: texts.digest for key, texts in self._counted.items()}

    def recognise(self, saved: Mapping[str, str]) -> set[str]:
        """Whose texts wait and have these digests; they count already."""
        found = {key for key, texts in self._todo.items() if saved.get(key) == texts.digest}
        for key in found:
            self._counted[key] = self._todo.pop(key)
            self._counted[key].end(True)
        return found

    async def run(
        self,
        embedder: Embedder,
        gallery: Gallery,
        writer: ThreadPoolExecutor,
        ready: Callable[[], Awaitable[None]],
        save: Callable[[], Awaitable[None]],
    ) -> None:
        """Works until cancelled. `ready` gives something to wait for after the engine failed.

        `save` is called when something counts that did not, or no more, and nothing has waited for a while.
        """
        loop = asyncio.get_running_loop()
        said = loop.time()
        done = 0
        while True:
            while not self._todo:
                if done:
                    logger.info("the router knows %d more adapters by their texts; none wait", done)
                    done = 0
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), SAVE_SECONDS if self.changed else None)
                except TimeoutError:
                    await save()
            batch = self._take()
            try:
                await self._learn(batch, embedder, gallery, writer)
                done += len(batch)
            except EngineError as error:
                logger.info("embedding waits for the engine: %s", error)
                self._put_back(batch)
                await asyncio.sleep(RETRY_SECONDS)
                await ready()
            except Exception as error:
                if len(batch) == 1:
                    self._fail(batch, error)
                else:
                    await self._one_by_one(batch, embedder, gallery, writer)
            if loop.time() - said > LOG_SECONDS:
                said = loop.time()
                logger.info("the router embeds texts: %d adapters are done, %d wait", done, self.pending)

    def _take(self) -> dict[str, Texts]:
        """The next adapters, of about `LEARNT_AT_ONCE` texts together."""
        size = 0
        batch = {}
        while self._todo and size < LEARNT_AT_ONCE:
            key, texts = self._todo.popitem(last=False)
            self._flying[key] = batch[key] = texts
            size += len(texts.texts)
        return batch

    async def _learn(
        self, batch: dict[str, Texts], embedder: Embedder, gallery: Gallery, writer: ThreadPoolExecutor
    ) -> None:
        rows = await embedder.embed([text for texts in batch.values() for text in texts.texts])
        ends = np.cumsum([len(texts.texts) for texts in batch.values()])
        parts = dict(zip(batch, np.split(rows, ends[:-1]), strict=True))
        current = {key: texts for key, texts in batch.items() if self._flying.get(key) is texts}
        entries = [(key, parts[key], texts.kind) for key, texts in current.items()]
        # the thread works in the order of calls: what is removed from here on is removed after this
        await asyncio.get_running_loop().run_in_executor(writer, gallery.put_many, entries)
        for key, texts in current.items():
            if self._flying.get(key) is texts:
                del self._flying[key]
                self._counted[key] = texts
                self.changed = True
            texts.end(True)

    async def _one_by_one(
        self, batch: dict[str, Texts], embedder: Embedder, gallery: Gallery, writer: ThreadPoolExecutor
    ) -> None:
        """A batch that was refused: only the adapter at fault stays out. An engine that fails now puts it back."""
        for key, texts in batch.items():
            if self._flying.get(key) is not texts:
                continue
            try:
                await self._learn({key: texts}, embedder, gallery, writer)
            except EngineError:
                self._put_back({key: texts})
            except Exception as error:
                self._fail({key: texts}, error)

    def _put_back(self, batch: dict[str, Texts]) -> None:
        for key, texts in batch.items():
            if self._flying.get(key) is texts:
                del self._flying[key]
                self._todo[key] = texts

    def _fail(self, batch: dict[str, Texts], error: Exception) -> None:
        for key, texts in batch.items():
            logger.error("the texts of %s cannot be embedded; the router does not know it by them", key, exc_info=error)
            if self._flying.get(key) is texts:
                del self._flying[key]
                self.failed[key] = f"{type(error).__name__}: {error}"
            texts.end(False)

    def close(self) -> None:
        """Nobody waits any longer."""
        for key in [*self._todo, *self._flying]:
            self.drop(key)
