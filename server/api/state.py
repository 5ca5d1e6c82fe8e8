"""What the routes share: one object per application, made at start and passed explicitly."""

import asyncio
import contextlib
import itertools
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.store import AdapterStore
from loramux.adapters_store.tenants import Tenants
from loramux.server.api.admission import TenantGate
from loramux.server.api.auth import KeyRing
from loramux.server.api.auto.parts import RouterParts
from loramux.server.api.auto.service import RouterService
from loramux.server.api.auto.shadow import Shadow
from loramux.server.api.errors import bad_request, unavailable
from loramux.server.api.grammar_check import GrammarCheck
from loramux.server.api.metrics import Metrics, StoreCounts
from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import EngineClient, EngineDeadError, EngineError, EngineInfo
from loramux.server.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

MAX_KNOWN_DIGESTS = 4096
PAGE = 500
STORE_THREADS = 4
UPLOAD_THREADS = 4
START_RETRY_SECONDS = 5


async def in_thread(executor: Executor, call: Callable[[], T]) -> T:
    """Runs a blocking call; a cancelled caller waits until the call has ended, so that nothing runs on behind it."""
    running = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # nobody is left to hear of it
        raise


def all_adapters(store: AdapterStore, tenant: str) -> Iterator[AdapterVersion]:
    """The newest version of every adapter that a tenant may use, its own first. Blocks."""
    after: str | None = None
    while True:
        page = store.visible(tenant, limit=PAGE, after=after)
        yield from page.data
        if not page.has_more:
            return
        after = page.data[-1].address(tenant)


def _blobs_on_disk(store: AdapterStore) -> StoreCounts:
    """How many canonical files there are, and their bytes. Blocks."""
    with os.scandir(store.blob_dir) as entries:
        sizes = [entry.stat().st_size for entry in entries if entry.is_file()]
    return StoreCounts(adapters=len(sizes), bytes=sum(sizes))


class AdapterNames:
    """Which adapters, by key, a digest was used for: the engine knows digests only. Bounded, newest kept."""

    def __init__(self, limit: int = MAX_KNOWN_DIGESTS) -> None:
        self._limit = limit
        self._keys: OrderedDict[str, dict[str, None]] = OrderedDict()

    def learn(self, version: AdapterVersion) -> None:
        """Called whenever a digest may reach the engine."""
        keys = self._keys.setdefault(version.digest, {})
        keys.pop(version.key, None)
        keys[version.key] = None
        self._keys.move_to_end(version.digest)
        while len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def forget(self, digest: str) -> None:
        """The digest belongs to no adapter any more."""
        self._keys.pop(digest, None)

    def drop(self, key: str) -> None:
        """The adapter was deleted; others that have its content keep it."""
        for digest, keys in list(self._keys.items()):
            keys.pop(key, None)
            if not keys:
                del self._keys[digest]

    def of(self, digest: str) -> str | None:
        """The key that it was used for last, if it is known."""
        return next(reversed(self._keys.get(digest, {})), None)

    def used(self, version: AdapterVersion) -> bool:
        """Whether the content was used under this adapter's own name: who else has it is nobody's business."""
        return version.key in self._keys.get(version.digest, {})


@dataclass(slots=True)
class ServerState:
    """The parts of a running server.

    `vocab_size` is the number of token ids the model knows, `model_created` the unix time that the base reports as its
    creation. `router` serves `auto`, None where routing is off; `shadow` compares it with requests that name their
    model, if asked to. `tenants` are the registry's keys and limits, `keys` what counts as a key, `gate` what each
    tenant has under way, `grammars` tries what answers shall be held to. `pinned` maps keys of adapters whose newest
    version stays on the device to the digest pinned now.
    """

    settings: Settings
    engine: EngineClient
    store: AdapterStore
    renderer: Renderer
    metrics: Metrics
    names: AdapterNames
    router: RouterService | None
    shadow: Shadow | None
    tenants: Tenants
    keys: KeyRing
    gate: TenantGate
    vocab_size: int
    model_created: int
    store_threads: ThreadPoolExecutor
    upload_threads: ThreadPoolExecutor
    pinned: dict[str, str] = field(default_factory=dict)
    sequence_numbers: Iterator[int] = field(default_factory=itertools.count)
    grammars: GrammarCheck = field(default_factory=GrammarCheck)
    _in_use: Counter[str] = field(default_factory=Counter)
    _retired: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _stopping: asyncio.Task[None] | None = None

    @classmethod
    def make(
        cls,
        settings: Settings,
        engine: EngineClient,
        store: AdapterStore,
        renderer: Renderer,
        *,
        routing: RouterParts | None,
        vocab_size: int,
        model_created: int,
    ) -> "ServerState":
        """The state of one application; no `routing` is a server without `auto`."""
        names = AdapterNames()
        metrics = Metrics(
            engine, model_name=settings.base_name, max_adapters=settings.metrics_max_adapters, name_of=names.of
        )
        store_threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
        tenants = Tenants(store.registry_path)
        keys = [key.get_secret_value() for key in settings.api_key]

        def bound() -> int | None:
            try:
                return engine.info.max_num_seqs + settings.max_queue
            except EngineDeadError:
                return None

        router = None if routing is None else RouterService(routing, settings, engine, renderer, store)
        return cls(
            settings=settings,
            engine=engine,
            store=store,
            renderer=renderer,
            metrics=metrics,
            names=names,
            router=router,
            shadow=Shadow(router, metrics) if router is not None and settings.router_shadow else None,
            vocab_size=vocab_size,
            model_created=model_created,
            tenants=tenants,
            keys=KeyRing(tenants, keys, settings.tenant_limits, store_threads.submit),
            gate=TenantGate(bound),
            store_threads=store_threads,
            upload_threads=ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="upload"),
        )

    async def in_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking call of the store in one of its threads."""
        return await in_thread(self.store_threads, lambda: call(*args, **kwargs))

    def require_engine(self) -> EngineInfo:
        """The engine's constants. Raises a 503 unless requests are served right now."""
        state = self.engine.state
        if state == "ready":
            return self.engine.info
        words = {
            "starting": "The model is still being loaded.",
            "draining": "The server is shutting down.",
            "dead": "The engine is not running; it is being restarted.",
        }
        raise unavailable(words[state], code=f"engine_{state}", retry_after=START_RETRY_SECONDS)

    def require_router(self) -> RouterService:
        """The router. Raises a 400 `no_policy` where routing is switched off."""
        if self.router is None:
            raise bad_request(
                "Routing is switched off on this server (--router off): name a model or an adapter.", "model",
                "no_policy",
            )  # fmt: skip
        return self.router

    def use(self, version: AdapterVersion) -> None:
        """A request is about to bring this content to the engine."""
        self.names.learn(version)
        self._in_use[version.digest] += 1

    def release(self, version: AdapterVersion) -> None:
        """The request has ended. Content that was deleted meanwhile leaves the engine with its last request."""
        digest = version.digest
        self._in_use[digest] -= 1
        if self._in_use[digest]:
            return
        del self._in_use[digest]
        if digest in self._retired:
            self._retired.discard(digest)
            task = asyncio.create_task(self._forget(digest))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def retire(self, digest: str) -> None:
        """No adapter has this content any more: the engine frees it, again after requests that were on their way."""
        self.names.forget(digest)
        if digest in self._in_use:
            self._retired.add(digest)
        await self._forget(digest)

    async def _forget(self, digest: str) -> None:
        with contextlib.suppress(EngineError):  # an engine that is down has nothing to free
            await self.engine.forget_adapter(digest)

    async def count_store(self) -> None:
        """Refreshes what the metrics say of the store."""
        self.metrics.store = await self.in_store(_blobs_on_disk, self.store)

    async def stop_routing(self) -> None:
        """Ends the router's work; nothing is routed afterwards."""
        if self.shadow is not None:
            await self.shadow.stop()
        if self.router is not None:
            await self.router.stop()

    async def stop(self, *, drain_seconds: float) -> None:
        """Stops the engine, giving running requests that long. A second call waits for the first."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self.engine.stop(drain_seconds=drain_seconds))
        await asyncio.shield(self._stopping)
        await self.grammars.stop()

    def close(self) -> None:
        """Ends the threads and closes the store; nothing may use the state afterwards."""
        self.store_threads.shutdown(wait=True)
        self.upload_threads.shutdown(wait=True)
        self.tenants.note_uses(self.keys.take_uses())
        self.tenants.close()
        self.store.close()


async def _state_of(request: Request) -> ServerState:
    """The application's state."""
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_state_of)]
