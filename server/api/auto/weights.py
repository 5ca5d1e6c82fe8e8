"""The weights rung: what is kept of adapters that nobody described, read from the store's files one by one.

Nothing happens until there is such an adapter. Then a reference is probed once (the base's own examples, or everyday
prompts where it has too few), and a thread reads the matrices of each adapter where the router looks and keeps small
factors of them, up to a bound in bytes; adapters beyond it are not candidates until others go.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from loramux.adapters_store.canonical import CanonicalError, read_header
from loramux.adapters_store.digests import blob_name
from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.registry import AdapterVersion
from loramux.adapters_store.store import AdapterStore
from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.interface import Floats
from loramux.router.policy import RouterPolicy
from loramux.router.weights_only import EVERYDAY, MIN_PROMPTS, AdapterFactors, Reference, WeightsScorer, default_layers
from loramux.router.weights_only.modules import attention_inputs
from loramux.server.api.auto.probing import Prompts, pooled
from loramux.server.api.errors import APIError
from loramux.server.engine.protocol import EngineClient, EngineError, PoolingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOKENS = 64  # of a prompt, its last ones: their states are fetched one by one
REFERENCE_PROMPTS = 144
REFERENCE_BYTES = 256 << 20
PROBES_AT_ONCE = 8
ADAPTERS_AT_ONCE = 32  # that become candidates together: all factors are copied each time
RETRY_SECONDS = 0.5


class StateProbe:
    """A prompt's states at some layers, asked of the engine: no adapter applied, the first token left out.

    The first token's states are the same for every prompt and larger than all others' (it is where attention goes that
    has nowhere to go); whitening and responses would be of it alone.
    """

    def __init__(self, engine: EngineClient, prompts: Prompts, layers: Sequence[int], tokens: int) -> None:
        self._engine = engine
        self._prompts = prompts
        self._numbers = itertools.count()
        self._tokens = tokens
        self.layers = tuple(layers)

    async def states(self, text: str, salt: str = "", tenant: str = "") -> Mapping[int, Floats]:
        """Layer -> float32 [tokens, hidden]; {} for a text that makes no two tokens. Raises `EngineError`."""
        tokens = await self._prompts.tokens_of(text)
        wanted = min(self._tokens, len(tokens) - 1)
        if wanted < 1:
            return {}
        name = f"states-{next(self._numbers)}"
        data = await pooled(self._engine, name, tokens, PoolingParams(self.layers, wanted), salt, tenant=tenant)
        rows = np.frombuffer(data, "<f4").reshape(len(self.layers), wanted, -1)
        return {layer: np.asarray(part, np.float32) for layer, part in zip(self.layers, rows, strict=True)}


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """An adapter to be known by its weights, as it was offered: told from others by identity."""

    digest: str


class WeightsRung:
    """What is known of adapters by their matrices alone. Everything but the thread's work happens on the event loop."""

    def __init__(self, policy: RouterPolicy, store: AdapterStore, base_examples: Sequence[str], max_bytes: int) -> None:
        self._policy = policy
        self._store = store
        self._base_examples = base_examples
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="router-weights")
        self._wake = asyncio.Event()
        self._wanted: dict[str, Wanted] = {}
        self._todo: dict[str, Wanted] = {}
        self._left_out: dict[str, Wanted] = {}
        self._known: dict[str, Wanted] = {}  # what the scorer holds
        self._silent: set[str] = set()
        self._failed: set[str] = set()
        self._probe: StateProbe | None = None
        self._scorer: WeightsScorer | None = None

    def offer(self, version: AdapterVersion) -> None:
        """An adapter that is known by nothing else, or a new version of it."""
        known = self._wanted.get(version.key)
        if self._max_bytes == 0 or (known is not None and known.digest == version.digest):
            return
        self.drop(version.key)
        self._wanted[version.key] = self._todo[version.key] = Wanted(version.digest)
        self._wake.set()

    def drop(self, key: str) -> None:
        """The adapter is gone, has other content now, or is known by something better."""
        if self._wanted.pop(key, None) is None:
            return
        for place in (self._todo, self._left_out):
            place.pop(key, None)
        for group in (self._silent, self._failed):
            group.discard(key)
        if key in self._known:
            self._publish()
            self._todo |= self._left_out  # there will be room
            self._left_out.clear()
            self._wake.set()

    async def states(self, text: str, salt: str, tenant: str) -> Mapping[int, Floats]:
        """What a query's decision needs. Raises `EngineError`."""
        assert self._probe is not None  # it came before the scorer
        return await self._probe.states(text, salt, tenant)

    async def run(self, engine: EngineClient, prompts: Prompts, ready: Callable[[], Awaitable[None]]) -> None:
        """Works until cancelled. `ready` gives something to wait for after the engine failed."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._scorer is None:
                try:
                    self._scorer = WeightsScorer(await self._reference(engine, prompts))
                except EngineError as error:
                    logger.info("routing by weights waits for the engine: %s", error)
                    await asyncio.sleep(RETRY_SECONDS)
                    await ready()
                    self._wake.set()
                    continue
            while self._todo or self._stale():
                await self._load(self._scorer)

    async def _reference(self, engine: EngineClient, prompts: Prompts) -> Reference:
        """The base's own examples as the reference, everyday prompts where fewer than two of them can be used.

        Their number times their length is bounded by the reference's bytes. Raises `EngineError`, and ValueError where
        no prompts can be used.
        """
        info = engine.info
        layers = default_layers(info.num_layers)
        for own in (True, False):
            texts = _spread(self._base_examples if own else EVERYDAY, REFERENCE_PROMPTS)
            room = REFERENCE_BYTES // (4 * info.hidden_size * len(layers) * max(len(texts), 1))
            probe = StateProbe(engine, prompts, layers, max(min(TOKENS, room), 1))
            found = await self._probed(probe, texts)
            if len(found) >= MIN_PROMPTS:
                break
        fitted = await self._in_thread(partial(Reference.fit, found, own=own))
        self._probe = probe
        return fitted

    async def _probed(self, probe: StateProbe, texts: Sequence[str]) -> list[Mapping[int, Floats]]:
        """The states of the texts that make a prompt."""
        turns = asyncio.Semaphore(PROBES_AT_ONCE)

        async def one(text: str) -> Mapping[int, Floats]:
            async with turns:
                try:
                    return await probe.states(text)
                except APIError as error:
                    logger.warning("a prompt of the weights rung's reference is left out: %s", error)
                    return {}

        return [states for states in await asyncio.gather(*map(one, texts)) if states]

    async def _load(self, scorer: WeightsScorer) -> None:
        """The next adapters that wait become candidates, and what was dropped leaves the memory."""
        batch = dict(itertools.islice(self._todo.items(), ADAPTERS_AT_ONCE))
        found = await self._in_thread(partial(self._read, batch, scorer.reference))
        stale = self._stale()
        room = self._max_bytes - scorer.bytes + sum(scorer.adapters[key].bytes for key in stale)
        new: dict[str, AdapterFactors] = {}
        for key, wanted in batch.items():
            if self._todo.get(key) is not wanted:
                continue  # dropped, or replaced, meanwhile
            del self._todo[key]
            factors = found[key]
            if isinstance(factors, str):
                logger.error("%s cannot be routed to by its weights: %s", key, factors)
                self._failed.add(key)
            elif factors is None:
                self._silent.add(key)
            elif factors.bytes > room:
                self._left_out[key] = wanted
            else:
                new[key] = factors
                room -= factors.bytes
        made = await self._in_thread(lambda: scorer.without(stale).with_adapters(new))
        self._known = {k: w for k, w in self._known.items() if k not in stale} | {k: batch[k] for k in new}
        self._scorer = made
        self._publish()

    def _read(self, batch: Mapping[str, Wanted], reference: Reference) -> Mapping[str, AdapterFactors | str | None]:
        """The factors of each, None for an adapter that does nothing where the router looks, or what went wrong."""
        found: dict[str, AdapterFactors | str | None] = {}
        for key, wanted in batch.items():
            try:
                with self._store.lease(wanted.digest):
                    weights = read_modules(self._store, wanted.digest, reference.layers)
                found[key] = AdapterFactors.of(weights, reference)
            except (AdapterNotFound, CanonicalError, SafetensorError, OSError, ValueError, RuntimeError) as error:
                found[key] = f"{type(error).__name__}: {error}"
        return found

    def _stale(self) -> list[str]:
        """What the scorer holds and is not wanted as it is."""
        return [key for key, known in self._known.items() if self._wanted.get(key) is not known]

    def _publish(self) -> None:
        self._policy.use_weights(self._scorer, hidden=self._stale())

    def report(self) -> Mapping[str, Any]:
        """The rung in plain values."""
        scorer = self._scorer
        return {
            "adapters": len(self._known) - len(self._stale()),
            "pending": len(self._todo),
            "left_out": len(self._left_out),
            "silent": len(self._silent),
            "failed": sorted(self._failed),
            "bytes": 0 if scorer is None else scorer.bytes,
            "layers": [] if scorer is None else list(scorer.layers),
            "calibration": None if scorer is None else scorer.reference.describe(),
        }

    def close(self) -> None:
        """Ends the thread."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def read_modules(store: AdapterStore, digest: str, layers: Sequence[int]) -> Mapping[str, ModuleWeights]:
    """The matrices of an adapter that read the attention inputs of these layers. Blocks.

    Raises `CanonicalError`, `OSError` or `SafetensorError` for a file that cannot be read.
    """
    path = store.blob_dir / blob_name(digest)
    scales = read_header(path).scales
    with safe_open(path, "pt") as file:
        return {
            module: ModuleWeights(file.get_tensor(f"{module}.A"), file.get_tensor(f"{module}.B"), scales[module])
            for module in attention_inputs(scales, layers)
        }


def _spread(texts: Sequence[str], most: int) -> tuple[str, ...]:
    """Up to so many of the texts, evenly spread over them."""
    step = max(len(texts) / most, 1)
    return tuple(texts[int(i * step)] for i in range(min(len(texts), most)))
