"""The router of one server: which adapters there are, what is known of them, and the choice for a query."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.names import address_of
from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.store import AdapterStore
from loramux.router.encoders.cache import CacheError, EmbeddingCache
from loramux.router.gallery.gallery import Gallery
from loramux.router.gallery.saved import SavedGallery, load_gallery, save_gallery
from loramux.router.interface import BASE, Floats
from loramux.router.options import RouteOptions
from loramux.router.policy import Decision, Plan, Pool, RouterPolicy
from loramux.router.versions import ArtifactError
from loramux.server.api.auto.deciding import Deciding
from loramux.server.api.auto.embedders import CachedEmbedder, Embedder
from loramux.server.api.auto.ending import end
from loramux.server.api.auto.learning import Learner, Texts
from loramux.server.api.auto.parts import RouterParts
from loramux.server.api.auto.probing import Prompts
from loramux.server.api.auto.recent import RecentRequests, Served
from loramux.server.api.auto.scoring import QUERY_CHARS, ScoresRung
from loramux.server.api.auto.weights import WeightsRung
from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import EngineClient, EngineDeadError, EngineError
from loramux.server.settings import Settings

logger = logging.getLogger(__name__)

FOLDER = "router"
GALLERY = "gallery"
QUERY_CACHE_BYTES = 8 << 20
LEARN_SECONDS = 10.0
ENGINE_SECONDS = 0.2
LIST_PAGE = 500
MAX_SCOPES = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Scope:
    """What one tenant may use, as of one state of the store and of what is admitted."""

    generation: int
    changes: int
    pool: Pool


class RouterService:
    """Routing for one server. Everything public runs on the event loop; the caller may cancel any of it.

    Adapters are known by key (`adapters_store.names`). Only those that the store has, whose content is whole and that
    the caller may use are ever candidates.
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
        self._cache_bytes = int(settings.router_cache_bytes)
        self._policy = RouterPolicy(max_set_size=settings.max_adapters_per_set)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="router-write")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="router-encode")
        self._scoring = ThreadPoolExecutor(2, thread_name_prefix="router-score")
        self._deciding = Deciding(self._scoring)
        self._learner = Learner()
        weights_bytes = int(settings.router_weights_bytes)
        self._weights = WeightsRung(self._policy, store, parts.base_examples, weights_bytes)
        self._embedding: Embedder | None = None
        self._recent = RecentRequests()
        self.scores = ScoresRung(self._folder, self._policy, self._writer, int(settings.router_scores_bytes))
        self._names: dict[str, int] = {}  # keys, and the version that is known
        self._gone: set[str] = set()  # deleted while the store was being listed
        self._changes = 0  # of the keys
        self._deletions = 0
        self._scopes: OrderedDict[str | None, _Scope] = OrderedDict()
        self._listed = asyncio.Event()
        self._queries: CachedEmbedder | None = None
        self._gallery: Gallery | None = None
        self._cache: EmbeddingCache | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: dict[str, str] = {}  # parts whose work ended too early, and why

    # Life.

    def start(self) -> None:
        """Begins to list and to embed what the store has; queries are routed by what is there so far."""
        self._begin("router", self._build)

    async def stop(self) -> None:
        """Ends the work; what was embedded stays in the cache."""
        await end(self._tasks)
        await self._save()
        self._learner.close()
        await self.scores.stop()
        self._weights.close()
        for threads in (self._writer, self._encoding, self._scoring):
            threads.shutdown(wait=True, cancel_futures=True)
        self.scores.close()
        if self._cache is not None:
            self._cache.close()

    def _begin(self, part: str, work: Callable[[], Awaitable[None]]) -> None:
        """Starts work that goes on for as long as the server."""
        self._tasks.append(asyncio.create_task(self._guarded(part, work), name=part))

    async def _guarded(self, part: str, work: Callable[[], Awaitable[None]]) -> None:
        """Says, and keeps for the report, why work that goes on for as long as the server ends before it."""
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("part of the router ended; `auto` answers by what is known so far")
            self._ended[part] = f"{type(error).__name__}: {error}"
        finally:
            self._listed.set()  # nobody waits for a list that will not come

    async def _build(self) -> None:
        await self._list()
        embedder = await self._embedder()
        self._queries = CachedEmbedder(embedder, EmbeddingCache(max_bytes=QUERY_CACHE_BYTES))  # before any rung
        self._begin("router-weights", self._weigh)
        kept = await self._kept(embedder)
        self._embedding = kept
        await self._guarded("router-scores", partial(self.scores.load, kept))
        self._begin("router-scorers", self.scores.watch)
        if self._parts.base_examples:
            self._learner.add([(BASE, Texts(self._parts.base_examples, "examples"))], first=True)
        gallery = await self._restored(embedder)
        self._gallery = gallery
        self._policy.use_gallery(gallery, embedder.name)
        await self._learner.run(kept, gallery, self._writer, self._wait_ready, self._save)

    async def _restored(self, embedder: Embedder) -> Gallery:
        """The gallery as it was saved, but for what has changed since; an empty one where none fits."""
        loop = asyncio.get_running_loop()
        try:
            saved = await loop.run_in_executor(
                self._writer, partial(load_gallery, self._folder / GALLERY, embedder.name)
            )
        except ArtifactError as error:
            logger.warning("the saved gallery is not used: %s", error)
            saved = None
        if saved is None:
            return Gallery(embedder.dim)
        known = self._learner.recognise(saved.texts)
        kept = (*saved.state.keys, *([BASE] if len(saved.state.base) else []))
        stale = [key for key in kept if key not in known]
        self._learner.changed = bool(stale)
        gallery = await loop.run_in_executor(self._writer, Gallery.from_state, saved.state)
        if stale:
            await loop.run_in_executor(self._writer, partial(gallery.remove, *stale))
        return gallery

    async def _save(self) -> None:
        """Keeps what the examples rung knows for the next start."""
        if not self._learner.changed or self._gallery is None:
            return
        self._learner.changed = False
        counted, gallery, encoder = self._learner.counted(), self._gallery, self._queries
        assert encoder is not None  # it came with the gallery

        def save() -> None:
            state = gallery.state()
            known = {key: digest for key, digest in counted.items() if key == BASE or key in state.keys}
            save_gallery(self._folder / GALLERY, SavedGallery(state, encoder.name, known))

        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, save)
        except OSError as error:
            logger.error("the gallery is not saved; the next start fits it again: %s", error)

    async def _weigh(self) -> None:
        """Keeps the weights rung up to date."""
        await self._wait_ready()
        prompts = Prompts(self._renderer, min(self._parts.max_tokens, self._engine.info.max_model_len))
        await self._weights.run(self._engine, prompts, self._wait_ready)

    async def _list(self) -> None:
        """Every adapter's key, and its texts or its weights as work to do."""
        after: str | None = None
        while True:
            page = await asyncio.get_running_loop().run_in_executor(
                self._writer, partial(self._store.every, limit=LIST_PAGE, after=after)
            )
            for version in page.data:
                if version.key not in self._names and version.key not in self._gone and self._admit(version):
                    texts = Texts.of(version)
                    if texts is None:
                        self._weights.offer(version)
                    else:
                        self._learner.add([(version.key, texts)], first=False)
            if not page.has_more:
                break
            after = page.data[-1].key
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
        open_cache = partial(EmbeddingCache, path, max_bytes=0, max_file_bytes=self._cache_bytes)
        try:
            self._cache = await asyncio.get_running_loop().run_in_executor(self._writer, open_cache)
        except CacheError as error:
            logger.error("the router works without its cache: %s", error)
            return embedder
        return CachedEmbedder(embedder, self._cache, self._writer)

    # The store's events.

    async def learn(self, key: str) -> bool | None:
        """An adapter is new, or its texts are. Whether they count already; None for an adapter without any.

        What counts is what the store holds now, whichever of several changes this call came of. Waits a bounded time
        for the embedding: with False they count later.
        """
        version = await self._current(key)
        if version is None or not self._admit(version):
            return None
        texts = Texts.of(version)
        if texts is None:
            self._learner.drop(version.key)
            self._learner.uncount(version.key)
            self._weights.offer(version)
            if self._gallery is not None:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._gallery.remove, version.key)
            return None
        self._weights.drop(version.key)
        self._learner.add([(version.key, texts)], first=True)
        if self._gallery is None:
            return False
        try:
            return await asyncio.wait_for(asyncio.shield(texts.learned), LEARN_SECONDS)
        except TimeoutError:
            return False

    def _admit(self, version: AdapterVersion) -> bool:
        """Whether a request could be served by it and nothing newer is known; then it is a candidate from now on."""
        key = version.key
        if version.version < self._names.get(key, 0):
            return False
        if version.status != "ready" or version.rank > self._max_rank:
            self._dismiss(key)
            return False
        self._gone.discard(key)
        self._changes += key not in self._names
        self._names[key] = version.version
        return True

    async def deleted(self, key: str) -> None:
        """The adapter was deleted: no rung knows it when this returns, nor ever again whoever takes its name."""
        texts = self._learner.uncount(key)
        self._deletions += 1
        self._dismiss(key)

        def forget() -> None:
            self.scores.forget(key)  # first: a scorer that comes into use in between asks it
            self._policy.forget(key)

        await asyncio.get_running_loop().run_in_executor(self._writer, forget)
        if texts is not None and isinstance(self._embedding, CachedEmbedder):
            await self._embedding.forget(texts.texts)

    def _dismiss(self, key: str) -> None:
        """The adapter cannot be served: it is no candidate from now on, whatever any rung knows of it."""
        self._changes += self._names.pop(key, None) is not None
        if not self._listed.is_set():
            self._gone.add(key)
        self._learner.drop(key)
        self._learner.uncount(key)
        self._weights.drop(key)

    async def recheck(self, key: str) -> None:
        """A chosen adapter could not be leased: the store's word replaces what the router believes of it."""
        version = await self._current(key)
        if version is not None and version.status != "ready":
            self._dismiss(key)

    async def _current(self, key: str) -> AdapterVersion | None:
        """The adapter as the store has it; None for one that is gone, which is no candidate from now on.

        The writer's thread answers in the order of calls, so that an older state never follows a newer one; a deletion
        that was heard of while it read has it read again.
        """
        while True:
            deletions = self._deletions
            try:
                version = await asyncio.get_running_loop().run_in_executor(self._writer, self._store.by_key, key)
            except AdapterNotFound:
                self._dismiss(key)
                return None
            if deletions == self._deletions:
                return version

    # Queries.

    async def decide(
        self,
        text: str,
        options: RouteOptions,
        *,
        tenant: str | None = None,
        salt: str = "",
        without: Collection[str] = (),
    ) -> Decision:
        """The choice for a query among the adapters that the tenant may use, but for those in `without`; all by
        key, and the reason in the tenant's own names.

        No `tenant` is nobody in particular: every adapter there is. In the engine's queue the query's probes are the
        tenant's. Raises `RouterError` for options that cannot be followed, `EngineError` for a probe without an answer.
        """
        await self._listed.wait()
        pool = await self._pool(tenant)
        if without:
            pool = pool.without(without)
        text = text[-QUERY_CHARS:]
        row: Floats | None = None
        plan: Plan | None = self._policy.plan(pool, options)
        while plan is not None:
            if plan.encoder and row is None:
                assert self._queries is not None  # there is no rung before there is an encoder
                row = (await self._queries.embed([text], salt, tenant or ""))[0]
            states = await self._weights.states(text, salt, tenant or "") if plan.layers else None
            decision = await self._deciding.decide(plan, row, states)
            plan = plan.after(decision)
        waiting = self._learner.waiting(pool.known)
        if waiting:
            decision = replace(decision, reason=f"{decision.reason}; {waiting} adapters wait to be embedded")
        return decision

    async def prompt_tokens(self, text: str) -> int:
        """Tokens of the prompt by which the base looks at a query. Raises a 400 where the chat template refuses it."""
        return len(await Prompts(self._renderer, self._parts.max_tokens).tokens_of(text[-QUERY_CHARS:]))

    async def _pool(self, tenant: str | None) -> Pool:
        """What the tenant may choose from; read again only when the store, or what is admitted of it, has changed."""
        names, changes = self._names, self._changes
        generation = 0 if tenant is None else self._store.generation
        scope = self._scopes.get(tenant)
        if scope is None or (scope.generation, scope.changes) != (generation, changes):
            if tenant is None:
                pool = Pool(names)
            else:
                visible = partial(self._store.visible_keys, tenant)
                keys = await asyncio.get_running_loop().run_in_executor(self._scoring, visible)
                pool = Pool((name for name in names if name in keys), partial(address_of, tenant=tenant))
            self._scopes[tenant] = scope = _Scope(generation, changes, pool)
            while len(self._scopes) > MAX_SCOPES:
                self._scopes.popitem(last=False)
        self._scopes.move_to_end(tenant)
        return scope.pool

    def knows(self, key: str) -> bool:
        """Whether there is such an adapter to choose."""
        return key in self._names

    # Feedback.

    def remember(self, id: str, text: str, adapters: Collection[str]) -> None:
        """Keeps what a request asked, for feedback that names it."""
        self._recent.add(id, Served(text[-QUERY_CHARS:], tuple(adapters)))

    def recall(self, id: str) -> Served | None:
        """A request that is still remembered."""
        return self._recent.get(id)

    def train(self, seed: int) -> bool | None:
        """Starts to train the scorer; False while that runs already, None before there is an encoder."""
        return self.scores.train(tuple(self._names), seed)

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
        encoder = None
        if self._queries is not None and self._gallery is not None:
            encoder = {"name": self._queries.name, "dim": self._queries.dim}
        return {
            "encoder": encoder,
            "ended": dict(self._ended),
            "adapters": {
                "registered": len(self._names),
                "pending": self._learner.pending,
                "failed": sorted(self._learner.failed),
            },
            "rungs": {
                "scores": await self.scores.report(),
                "examples": examples,
                "weights": self._weights.report(),
            },
        }
