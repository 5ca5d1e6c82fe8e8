"""From the words of a request (`model`, `adapters`) to the content that will serve it.

A name is resolved once, when the request arrives, to digests; these are held by leases until it ends. Whatever is
uploaded, replaced or deleted meanwhile, the request is served by what it was resolved to.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.registry import AdapterVersion
from loramux.server.api.errors import SERVER_ERROR, APIError, bad_request, model_not_found
from loramux.server.api.schemas.common import AdapterWeight, ServedAdapter, ServedBy
from loramux.server.api.state import ServerState
from loramux.server.engine.protocol import AdapterRef

AUTO = "auto"
LEASE_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Selection:
    """What serves a request: `model` as the client wrote it, and the adapters with their weights (none: the base)."""

    model: str
    adapters: tuple[tuple[AdapterVersion, float], ...]

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        """The adapter set as the engine knows it; names that share their content are one member."""
        weights: dict[str, float] = {}
        for version, weight in self.adapters:
            weights[version.digest] = weights.get(version.digest, 0.0) + weight
        return tuple(AdapterRef(digest, weight) for digest, weight in weights.items())

    @property
    def served_by(self) -> ServedBy:
        """The body's `loramux` field."""
        served = [ServedAdapter(name=v.name, version=v.version, weight=w) for v, w in self.adapters]
        return ServedBy(adapters=served)

    @property
    def headers(self) -> dict[str, str]:
        """`x-loramux-adapters: name@version;w=1, ...`; nothing for the base alone."""
        if not self.adapters:
            return {}
        return {"x-loramux-adapters": ", ".join(f"{v.name}@{v.version};w={w:g}" for v, w in self.adapters)}

    def labels(self, base_name: str) -> list[str]:
        """Whom the request counts for in the metrics."""
        return [version.name for version, _ in self.adapters] or [base_name]


def _lease(state: ServerState, name: str) -> AdapterVersion:
    """The version that `name` means now, with a lease on its content. Raises 404 `model_not_found`, or a
    503 for one whose content was lost. Blocks."""
    for _ in range(LEASE_ATTEMPTS):
        try:
            version = state.store.resolve(name)
        except AdapterNotFound:
            break
        if version.status == "failed":
            raise APIError(
                503, f"The adapter {name!r} cannot be served: {version.last_error}", type=SERVER_ERROR, param="model",
                code="adapter_failed", headers={"x-should-retry": "false"},
            )  # fmt: skip
        try:
            state.store.acquire_lease(version.digest)
        except AdapterNotFound:  # replaced or deleted in between: look again
            continue
        return version
    raise model_not_found(name)


def _lease_all(state: ServerState, names: Sequence[str], held: list[AdapterVersion]) -> None:
    """`_lease` for each name in turn; `held` says at any time what has to be released. Blocks."""
    for name in names:
        held.append(_lease(state, name))


def _release(state: ServerState, versions: Sequence[AdapterVersion]) -> None:
    """Gives the leases back. Blocks."""
    for version in versions:
        state.store.release_lease(version.digest)


def _check_fusion(state: ServerState, model: str, adapters: Sequence[AdapterWeight]) -> None:
    """Raises a 400 naming the entry that is wrong."""
    base, limit = state.settings.base_name, state.settings.max_adapters_per_set
    if model != base:
        raise bad_request(
            f"`adapters` goes with the base model: send model {base!r}, or leave `adapters` out.", "adapters"
        )
    if len(adapters) > limit:
        raise bad_request(f"At most {limit} adapters can be fused in one request, got {len(adapters)}.", "adapters")
    seen: set[str] = set()
    for index, entry in enumerate(adapters):
        name = entry.name.partition("@")[0]
        if name in seen:
            raise bad_request(f"The adapter {name!r} is listed twice; add its weights up.", f"adapters[{index}].name")
        seen.add(name)
        if name in (base, AUTO):
            raise bad_request(f"{name!r} is not an adapter.", f"adapters[{index}].name")


@asynccontextmanager
async def select(state: ServerState, model: str, adapters: Sequence[AdapterWeight] | None) -> AsyncIterator[Selection]:
    """What serves the request, leased for the length of the context.

    Raises 404 `model_not_found` for a name that does not exist (also one in `adapters`) and 400 for `auto` and for
    fusions that make no sense.
    """
    if model == AUTO:
        raise bad_request("No routing policy is configured: name a model or an adapter.", "model", "no_policy")
    if adapters:
        _check_fusion(state, model, adapters)
    names = [entry.name for entry in adapters] if adapters else [] if model == state.settings.base_name else [model]
    if not names:
        yield Selection(model, ())
        return
    held: list[AdapterVersion] = []
    used: list[AdapterVersion] = []
    try:
        await state.in_store(_lease_all, state, names, held)
        for version in held:
            state.use(version)
            used.append(version)
        rank, limit = sum(version.rank for version in held), state.settings.max_set_rank
        if rank > limit:
            raise bad_request(
                f"The ranks of this request's adapters add up to {rank}; this server computes at most {limit} "
                "(--max-set-rank).", "adapters" if adapters else "model", "limit_exceeded",
            )  # fmt: skip
        weights = [1.0 if e.weight is None else e.weight for e in adapters] if adapters else [1.0]
        yield Selection(model, tuple(zip(held, weights, strict=True)))
    finally:
        for version in used:
            state.release(version)
        state.store_threads.submit(_release, state, held)  # not awaited: it must happen even when cancelled
