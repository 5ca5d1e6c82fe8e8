"""The router of one server: which adapters there are, what is known of them, and the choice for a query."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.store import AdapterStore
from loramux.router.encoders.cache import CacheError, EmbeddingCache
from loramux.router.gallery.gallery import Gallery
from loramux.router.interface import BASE, Floats
from loramux.router.options import RouteOptions
from loramux.router.policy import Decision, RouterPolicy
from loramux.router.weights_only import WeightsScorer
from loramux.server.api.auto.embedders import CachedEmbedder, Embedder
from loramux.server.api.auto.learning import Learner, Texts
from loramux.server.api.auto.parts import RouterParts
from loramux.server.api.auto.recent import RecentRequests, Served
from loramux.server.api.auto.scoring import QUERY_CHARS, ScoresRung
from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import EngineClient, EngineDeadError, EngineError
from loramux.server.settings import Settings

logger = logging.getLogger(__name__)

FOLDER = "router"
QUERY_CACHE_BYTES = 8 << 20
INLINE_CANDIDATES = 512  # with more the scores are computed in a thread
LEARN_SECONDS = 10.0
ENGINE_SECONDS = 0.2
LIST_PAGE = 500


class ModuleInputs(Protocol):
    """What the weights rung asks of the engine: a prompt's inputs of some modules, no adapter applied."""

    async def inputs(self, text: str, modules: Sequence[str], salt: str) -> Mapping[str, Floats]:
        """Module -> float32 [tokens, in]. Raises `EngineError`."""
        ...


class RouterService:
    """Routing for one server. Everything public runs on the event loop; the caller may cancel any of it.

    Adapters are known by name. Only those that the store has, and whose content is whole, are ever candidates.
    """

    def __init__(
        self, parts: RouterParts, settings: Settings, engine: EngineClient, renderer: Renderer, store: AdapterStore
    ) -> None:
        self._parts = parts
        self._engine = engine
        self._renderer = renderer
        self._store = store
        self._folder = store.blob_dir.parent / FOLDER
        self._max_rank = settings.max_set_rank
        self._policy = RouterPolicy(max_set_size=settings.max_adapters_per_set)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="router-write")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="router-encode")
        self._scoring = ThreadPoolExecutor(2, thread_name_prefix="router-score")
        self._learner = Learner()
        self._inputs: ModuleInputs | None = None
        self._embedding: Embedder | None = None
        self._recent = RecentRequests()
        self.scores = ScoresRung(self._folder, self._policy, self._writer, int(settings.router_scores_bytes))
        self._names: dict[str, int] = {}  # and the version that is known
        self._gone: set[str] = set()  # deleted while the store was being listed
        self._allowed: tuple[str, ...] = ()
        self._listed = asyncio.Event()
        self._queries: CachedEmbedder | None = None
        self._gallery: Gallery | None = None
        self._cache: EmbeddingCache | None = None
        self._building: asyncio.Task[None] | None = None

    # Life.

    def start(self) -> None:
        """Begins to list and to embed what the store has; queries are routed by what is there so far."""
        self._building = asyncio.create_task(self._build(), name="router")

    async def stop(self) -> None:
        """Ends the work; what was embedded stays in the cache."""
        if self._building is not None:
            self._building.cancel()
            await asyncio.gather(self._building, return_exceptions=True)
        self._learner.close()
        await self.scores.stop()
        for threads in (self._writer, self._encoding, self._scoring):
            threads.shutdown(wait=True, cancel_futures=True)
        self.scores.close()
        if self._cache is not None:
            self._cache.close()

    async def _build(self) -> None:
        try:
            await self._list()
            embedder = await self._embedder()
            kept = await self._kept(embedder)
            await self.scores.load(embedder)
            gallery = Gallery(embedder.dim)
            self._embedding = kept
            self._queries = CachedEmbedder(embedder, EmbeddingCache(max_bytes=QUERY_CACHE_BYTES))
            self._gallery = gallery
            self._policy.use_gallery(gallery, embedder.name)
            if self._parts.base_examples:
                self._learner.add([(BASE, Texts(self._parts.base_examples, "examples"))], first=True)
            await self._learner.run(kept, gallery, self._writer, self._wait_ready)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("the router ended; `auto` answers by what it knew")
            raise
        finally:
            self._listed.set()  # nobody waits for a list that will not come

    async def _list(self) -> None:
        """Every adapter's name, and its texts as work to do."""
        after: str | None = None
        while True:
            page = await asyncio.get_running_loop().run_in_executor(
                self._writer, partial(self._store.list, limit=LIST_PAGE, after=after)
            )
            for version in page.data:
                if version.name not in self._names and version.name not in self._gone:  # else it is known better
                    texts = Texts.of(version) if self._admit(version) else None
                    if texts is not None:
                        self._learner.add([(version.name, texts)], first=False)
            if not page.has_more:
                break
            after = page.data[-1].id
        self._gone.clear()
        self._listed.set()

    async def _embedder(self) -> Embedder:
        """The encoder; where it needs the engine, once that is ready."""
        while True:
            try:
                return self._parts.embedder(self._engine, self._renderer, self._encoding)
            except EngineDeadError:
                await self._wait_ready()

    async def _wait_ready(self) -> None:
        """Returns when the engine is ready; waits for ever for one that cannot start, which ends the server."""
        while self._engine.state != "ready":
            with contextlib.suppress(EngineError):
                await self._engine.wait_ready()
            await asyncio.sleep(ENGINE_SECONDS)

    async def _kept(self, embedder: Embedder) -> Embedder:
        """The encoder over the cache on disk; over none where that cannot be used."""
        path = self._folder / "embeddings.sqlite3"
        try:
            self._cache = await asyncio.get_running_loop().run_in_executor(
                self._writer, partial(EmbeddingCache, path, max_bytes=0)
            )
        except CacheError as error:
            logger.error("the router works without its cache: %s", error)
            return embedder
        return CachedEmbedder(embedder, self._cache, self._writer)

    # The store's events.

    async def learn(self, version: AdapterVersion) -> bool | None:
        """An adapter is new, or its texts are. Whether they count already; None for an adapter without any.

        Waits a bounded time for the embedding: with False they count later.
        """
        if not self._admit(version):
            return None
        texts = Texts.of(version)
        if texts is None:
            self._learner.drop(version.name)
            if self._gallery is not None:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._gallery.remove, version.name)
            return None
        self._learner.add([(version.name, texts)], first=True)
        if self._gallery is None:
            return False
        try:
            return await asyncio.wait_for(asyncio.shield(texts.learned), LEARN_SECONDS)
        except TimeoutError:
            return False

    def _admit(self, version: AdapterVersion) -> bool:
        """Whether a request could be served by it and nothing newer is known; then it is a candidate from now on."""
        if version.version < self._names.get(version.name, 0):
            return False
        if version.status != "ready" or version.rank > self._max_rank:
            self._dismiss(version.name)
            return False
        self._gone.discard(version.name)
        self._names[version.name] = version.version
        self._allowed = ()
        return True

    async def deleted(self, name: str) -> None:
        """The adapter was deleted: no rung knows it when this returns, nor ever again whoever takes its name."""
        self._dismiss(name)

        def forget() -> None:
            self.scores.forget(name)  # first: a scorer that comes into use in between asks it
            self._policy.forget(name)

        await asyncio.get_running_loop().run_in_executor(self._writer, forget)

    def _dismiss(self, name: str) -> None:
        """The adapter cannot be served: it is no candidate from now on, whatever any rung knows of it."""
        self._names.pop(name, None)
        if not self._listed.is_set():
            self._gone.add(name)
        self._allowed = ()
        self._learner.drop(name)

    async def recheck(self, name: str) -> None:
        """A chosen adapter could not be leased: the store's word replaces what the router believes of it."""
        try:
            version = await asyncio.get_running_loop().run_in_executor(self._writer, self._store.get, name)
        except AdapterNotFound:
            self._dismiss(name)
        else:
            if version.status != "ready":
                self._dismiss(name)

    # Queries.

    async def decide(
        self, text: str, options: RouteOptions, *, salt: str = "", without: Collection[str] = ()
    ) -> Decision:
        """The choice for a query among the adapters there are, but for those in `without`.

        Raises `RouterError` for options that cannot be followed, `EngineError` when a probe cannot be answered.
        """
        await self._listed.wait()
        plan = self._policy.plan(self._pool(without), options)
        text = text[-QUERY_CHARS:]
        row: Floats | None = None
        features: Mapping[str, Floats] | None = None
        if plan.encoder:
            assert self._queries is not None  # there is no rung before there is an encoder
            row = (await self._queries.embed([text], salt))[0]
        if plan.modules:
            assert self._inputs is not None  # they came with the rung
            features = await self._inputs.inputs(text, plan.modules, salt)
        if len(plan.candidates) <= INLINE_CANDIDATES:
            decision = plan.decide(row, features)
        else:
            decision = await asyncio.get_running_loop().run_in_executor(self._scoring, plan.decide, row, features)
        if self._learner.pending:
            note = f"{decision.reason}; {self._learner.pending} adapters wait to be embedded"
            decision = replace(decision, reason=note)
        return decision

    def _pool(self, without: Collection[str]) -> tuple[str, ...]:
        if not self._allowed and self._names:
            self._allowed = tuple(self._names)
        return tuple(name for name in self._allowed if name not in without) if without else self._allowed

    def use_weights(self, scorer: WeightsScorer, inputs: ModuleInputs) -> None:
        """Adds the weights rung, for adapters that nothing else is known of; `inputs` gives it the prompts' states."""
        self._inputs = inputs
        self._policy.use_weights(scorer)

    def knows(self, name: str) -> bool:
        """Whether there is such an adapter to choose."""
        return name in self._names

    # Feedback.

    def remember(self, id: str, text: str, adapters: Collection[str]) -> None:
        """Keeps what a request asked, for feedback that names it."""
        self._recent.add(id, Served(text[-QUERY_CHARS:], tuple(adapters)))

    def recall(self, id: str) -> Served | None:
        """A request that is still remembered."""
        return self._recent.get(id)

    def train(self, seed: int) -> bool | None:
        """Starts to train the scorer; False while that runs already, None before there is an encoder."""
        if self._embedding is None:
            return None
        return self.scores.train(self._embedding, tuple(self._names), seed)

    # What `GET /v1/router` shows.

    async def report(self) -> Mapping[str, Any]:
        """The router's state in plain values."""
        snapshot = None if self._gallery is None else self._gallery.snapshot()
        examples: dict[str, Any] = {"adapters": 0, "knows_base": False, "calibration": None, "threshold": None}
        if snapshot is not None:
            examples = {
                "adapters": len(snapshot.slots),
                "knows_base": snapshot.knows_base,
                "calibration": snapshot.calibration.describe(),
                "threshold": snapshot.calibration.threshold,
            }
        encoder = None if self._queries is None else {"name": self._queries.name, "dim": self._queries.dim}
        return {
            "encoder": encoder,
            "adapters": {
                "registered": len(self._names),
                "pending": self._learner.pending,
                "failed": sorted(self._learner.failed),
            },
            "rungs": {"scores": await self.scores.report(), "examples": examples},
        }
