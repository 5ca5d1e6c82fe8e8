"""From the words of a request (`model`, `adapters`) to the content that will serve it.

A name is resolved once, when the request arrives, to digests; these are held by leases until it ends. Whatever is
uploaded, replaced or deleted meanwhile, the request is served by what it was resolved to.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.names import address_of, key_at
from loramux.adapters_store.registry import AdapterVersion
from loramux.router.options import RouteOptions, RouterError
from loramux.router.policy import Decision
from loramux.router.sets import quantise
from loramux.server.api.admission import Admission
from loramux.server.api.auto.reports import options_of, refused, report_of
from loramux.server.api.auto.shadow import ShadowTicket
from loramux.server.api.caller import Caller
from loramux.server.api.errors import SERVER_ERROR, APIError, bad_request, model_not_found
from loramux.server.api.schemas.common import AdapterWeight, RouterParams, RouterReport, ServedAdapter, ServedBy
from loramux.server.api.state import ServerState
from loramux.server.engine.protocol import AdapterRef

AUTO = "auto"
LEASE_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Selection:
    """What serves a request: `model` as the client wrote it, and the adapters with their weights (none: the base).

    `salt` separates the prefix caches of whom `admission` is for from others', `report` is the router's decision where
    there was one, `shadow` the one that is being made for comparison.
    """

    model: str
    adapters: tuple[tuple[AdapterVersion, float], ...]
    admission: Admission
    salt: str
    report: RouterReport | None = None
    shadow: ShadowTicket | None = None

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        """The adapter set as the engine knows it; names that share their content are one member."""
        weights: dict[str, float] = {}
        for version, weight in self.adapters:
            weights[version.digest] = weights.get(version.digest, 0.0) + weight
        return tuple(AdapterRef(digest, weight) for digest, weight in weights.items())

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.admission.caller.tenant

    @property
    def served_by(self) -> ServedBy:
        """The body's `loramux` field at this moment."""
        adapters = [ServedAdapter(name=v.address(self.tenant), version=v.version, weight=w) for v, w in self.adapters]
        served = ServedBy(adapters=adapters)
        if self.report is not None:
            served.router = self.report
        if self.shadow is not None:
            shadow = self.shadow.report()
            for chosen in shadow.chosen or ():
                chosen.name = address_of(chosen.name, self.tenant)
            served.router = RouterReport(shadow=shadow)
        return served

    @property
    def headers(self) -> dict[str, str]:
        """`x-loramux-adapters: name@version;w=1, ...` unless the base answers alone; `x-loramux-router-rung`; what is
        left of the tenant's tokens, where they are limited."""
        found = self.admission.headers
        if self.adapters:
            members = (f"{v.address(self.tenant)}@{v.version};w={w:g}" for v, w in self.adapters)
            found["x-loramux-adapters"] = ", ".join(members)
        if self.report is not None:
            found["x-loramux-router-rung"] = str(self.report.rung)
        return found

    def labels(self, base_name: str) -> list[str]:
        """Whom the request counts for in the metrics."""
        return [version.key for version, _ in self.adapters] or [base_name]


def _lease(state: ServerState, tenant: str, name: str) -> AdapterVersion:
    """The version that `tenant` means by `name` now, with a lease on its content. Raises 404 `model_not_found`, or a
    503 for one whose content was lost. Blocks."""
    for _ in range(LEASE_ATTEMPTS):
        try:
            version = state.store.resolve(name, tenant=tenant)
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


def _lease_all(state: ServerState, tenant: str, names: Sequence[str], held: list[AdapterVersion]) -> None:
    """`_lease` for each name in turn; `held` says at any time what has to be released. Blocks."""
    for name in names:
        held.append(_lease(state, tenant, name))


def _release(state: ServerState, versions: Sequence[AdapterVersion]) -> None:
    """Gives the leases back. Blocks."""
    for version in versions:
        state.store.release_lease(version.digest)


class _Leases:
    """The leases of one tenant's request, given back at its end whatever happened in between."""

    def __init__(self, state: ServerState, tenant: str) -> None:
        self._state = state
        self._tenant = tenant
        self._used: list[AdapterVersion] = []
        self.held: list[AdapterVersion] = []

    async def __aenter__(self) -> "_Leases":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    async def take(self, names: Sequence[str]) -> None:
        """Leases what these names mean now. Raises what `_lease` raises."""
        if not names:
            return
        await self._state.in_store(_lease_all, self._state, self._tenant, names, self.held)
        for version in self.held:
            self._state.use(version)
            self._used.append(version)

    async def try_take(self, names: Sequence[str]) -> str | None:
        """`take`; returns the first name that cannot be had, None when all are."""
        try:
            await self.take(names)
        except APIError:
            return names[len(self.held)]
        return None

    def give_back(self) -> None:
        """Ends the leases; there are none afterwards. Not waited for: it must happen even when cancelled."""
        for version in self._used:
            self._state.release(version)
        if self.held:
            self._state.store_threads.submit(_release, self._state, self.held)
        self._used, self.held = [], []


def _check_fusion(state: ServerState, tenant: str, model: str, adapters: Sequence[AdapterWeight]) -> None:
    """Raises a 400 naming the entry that is wrong."""
    base, limit = state.settings.base_name, state.settings.max_adapters_per_set
    if model not in state.settings.base_names:
        raise bad_request(
            f"`adapters` goes with the base model: send model {base!r}, or leave `adapters` out.", "adapters"
        )
    if len(adapters) > limit:
        raise bad_request(f"At most {limit} adapters can be fused in one request, got {len(adapters)}.", "adapters")
    seen: set[str] = set()
    for index, entry in enumerate(adapters):
        name = entry.name.partition("@")[0]
        key = key_at(name, tenant)
        if key in seen:
            raise bad_request(f"The adapter {name!r} is listed twice; add its weights up.", f"adapters[{index}].name")
        seen.add(key)
        if name in (*state.settings.base_names, AUTO):
            raise bad_request(f"{name!r} is not an adapter.", f"adapters[{index}].name")


@dataclass(frozen=True, slots=True)
class Query:
    """What serving a request takes besides its model: its id, its text, the client's options for the router and salt
    for its caches, and who sent it.

    `text` is called when it is needed, and is None where there is no single one (several prompts in one request).
    """

    id: str
    text: Callable[[], str] | None
    params: RouterParams | None
    salt: str
    caller: Caller

    @property
    def explain(self) -> bool:
        """Whether the client asks for the router's reason."""
        return self.params is not None and bool(self.params.explain)

    @property
    def engine_salt(self) -> str:
        """What separates its caches from other tenants'."""
        return self.caller.salt(self.salt)


@asynccontextmanager
async def select(
    state: ServerState, model: str, adapters: Sequence[AdapterWeight] | None, query: Query
) -> AsyncIterator[Selection]:
    """What serves the request, leased for the length of the context, which counts for the caller's share.

    Raises 404 `model_not_found` for a name that does not exist or that the caller may not use (also one in `adapters`),
    400 for fusions that make no sense, for `router` options that cannot be followed or go with a named model, and for
    `auto` where nothing routes, 429 for a caller that has its share under way.
    """
    if adapters:
        _check_fusion(state, query.caller.tenant, model, adapters)
    with state.gate.admit(query.caller) as admission:
        if model == AUTO:
            async with _routed(state, query, admission) as selection:
                yield selection
        else:
            async with _named(state, model, adapters or (), query, admission) as selection:
                yield selection


@asynccontextmanager
async def _named(
    state: ServerState, model: str, adapters: Sequence[AdapterWeight], query: Query, admission: Admission
) -> AsyncIterator[Selection]:
    """What the client named, leased."""
    if query.params is not None and state.shadow is None:
        raise bad_request(
            f"`router` goes with model {AUTO!r} (or with --router-shadow): leave it out, or send that model.", "router"
        )
    names = [entry.name for entry in adapters] if adapters else [] if model in state.settings.base_names else [model]
    async with _Leases(state, query.caller.tenant) as leases:
        await leases.take(names)
        rank, limit = sum(version.rank for version in leases.held), state.settings.max_set_rank
        if rank > limit:
            raise bad_request(
                f"The ranks of this request's adapters add up to {rank}; this server computes at most {limit} "
                "(--max-set-rank).", "adapters" if adapters else "model", "limit_exceeded",
            )  # fmt: skip
        weights = [1.0 if e.weight is None else e.weight for e in adapters] if adapters else [1.0] * len(names)
        shadow = None
        if state.shadow is not None and query.text is not None:
            actual = frozenset(version.key for version in leases.held)
            shadow = state.shadow.offer(
                ShadowTicket(
                    query.text(), _options(query), query.engine_salt, actual, query.caller.tenant, explain=query.explain
                )
            )
        _remember(state, query, leases.held)
        adapters_held = tuple(zip(leases.held, weights, strict=True))
        yield Selection(model, adapters_held, admission, query.engine_salt, shadow=shadow)


def _options(query: Query) -> RouteOptions:
    """The request's options for the router, with candidates by key."""
    options = options_of(query.params)
    if options.candidates is None:
        return options
    return replace(options, candidates=tuple(query.caller.key_at(name) for name in options.candidates))


@asynccontextmanager
async def _routed(state: ServerState, query: Query, admission: Admission) -> AsyncIterator[Selection]:
    """What the router chooses, leased. An adapter that is gone before it is leased is left out of another choice."""
    router = state.require_router()
    if query.text is None:
        raise bad_request(f"Model {AUTO!r} routes one prompt per request: send a request for each.", "prompt")
    options, text, tenant = _options(query), query.text(), query.caller.tenant
    gone: set[str] = set()
    milliseconds = 0.0
    async with _Leases(state, tenant) as leases:
        for _ in range(LEASE_ATTEMPTS):
            try:
                decision = await router.decide(text, options, tenant=tenant, salt=query.engine_salt, without=gone)
            except RouterError as error:
                raise refused(error) from None
            milliseconds += decision.milliseconds
            decision = replace(decision, milliseconds=milliseconds)
            missing = await leases.try_take([address_of(key, tenant) for key, _ in decision.chosen])
            members = _within_rank(leases.held, decision.chosen, state.settings.max_set_rank)
            if missing is None and (members or not decision.chosen):
                break
            lost = decision.chosen[0][0] if missing is None else key_at(missing, tenant)
            gone.add(lost)
            if missing is not None:
                await router.recheck(lost)
            leases.give_back()
        else:
            members = ()
            names = ", ".join(sorted(address_of(key, tenant) for key in gone))
            note = f"the adapters that were chosen cannot be served ({names}); {decision.reason}"
            decision = replace(decision, chosen=(), reason=note)
        if len(members) != len(decision.chosen):
            note = f"{decision.reason}; the lightest members left out for --max-set-rank {state.settings.max_set_rank}"
            decision = replace(decision, chosen=tuple((v.key, w) for v, w in members), reason=note)
        state.metrics.routed(decision, state.settings.base_name)
        _remember(state, query, [version for version, _ in members])
        report = report_of(addressed(decision, tenant), explain=query.explain)
        yield Selection(AUTO, members, admission, query.engine_salt, report=report)


def addressed(decision: Decision, tenant: str) -> Decision:
    """The decision with adapters named as `tenant` calls them, as its reason names them already."""
    chosen = tuple((address_of(key, tenant), weight) for key, weight in decision.chosen)
    scores = tuple((key and address_of(key, tenant), score) for key, score in decision.scores)
    return replace(decision, chosen=chosen, scores=scores)


def _remember(state: ServerState, query: Query, served: Sequence[AdapterVersion]) -> None:
    """Keeps what is needed for feedback that names the request."""
    if state.router is not None and query.text is not None:
        id = query.caller.remembered(query.id)
        state.router.remember(id, query.text(), [version.key for version in served])


def _within_rank(
    held: Sequence[AdapterVersion], chosen: Sequence[tuple[str, float]], limit: int
) -> tuple[tuple[AdapterVersion, float], ...]:
    """The heaviest members whose ranks add up to `limit` at most, weights in proportion; () if the first exceeds it."""
    kept: list[tuple[AdapterVersion, float]] = []
    for version, (_, weight) in zip(held, chosen, strict=False):
        if sum(member.rank for member, _ in kept) + version.rank > limit:
            break
        kept.append((version, weight))
    if not kept or len(kept) == len(chosen):
        return tuple(kept)
    weights = quantise([weight for _, weight in kept])
    return tuple((version, w) for (version, _), w in zip(kept, weights, strict=True) if w > 0)
