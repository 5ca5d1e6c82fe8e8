"""`/v1/route`, `/v1/feedback` and `/v1/router`: what `auto` would choose, what it knows, and how it learns."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.adapters_store.errors import AdapterNotFound
from loramux.adapters_store.names import address_of, owner_and_name
from loramux.router.interface import BASE
from loramux.router.options import RouterError
from loramux.router.policy import Decision
from loramux.router.scores.dataset import DatasetError, ScoredQuery
from loramux.server.api.auto.ledger import LedgerError
from loramux.server.api.auto.recent import Served
from loramux.server.api.auto.reports import options_of, refused, report_of
from loramux.server.api.auto.scoring import BASE_WORD, AdapterGoneError, as_routed
from loramux.server.api.auto.service import RouterService
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import Caller, From
from loramux.server.api.errors import APIError, bad_request, model_not_found, unavailable
from loramux.server.api.lanes import in_charged_lanes
from loramux.server.api.resolve import addressed
from loramux.server.api.schemas.routing import (
    FeedbackRequest,
    FeedbackTaken,
    RouteDecision,
    RouteList,
    RouteRequest,
    RouterState,
    ScoresTaken,
    TrainRequest,
    TrainStarted,
)
from loramux.server.api.state import ServerState, State

router = APIRouter(route_class=BodyRoute)

JSON = "application/json"
SCORES_PATH = "/v1/router/scores"
ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")
SHOWN_UNKNOWN = 20
RETRY_SECONDS = 5
SCORES_SCHEMA = {
    "required": True,
    "content": {"application/x-ndjson": {"schema": {"type": "string", "description": "one JSON object per line"}}},
}


@router.post("/v1/route", response_model=RouteList)
async def route(body: RouteRequest, state: State, caller: From) -> Response:
    """Which adapters would serve each input, with scores, and reasons unless `explain` is false; generates nothing."""
    service = state.require_router()
    options = options_of(body.router)
    if options.candidates is not None:
        options = replace(options, candidates=tuple(map(caller.key_at, options.candidates)))
    explain = body.router is None or body.router.explain is not False
    salt = caller.salt(body.cache_salt or "")

    async def one(query: str) -> Decision:
        return addressed(await service.decide(query, options, tenant=caller.tenant, salt=salt), caller.tenant)

    with state.gate.admit(caller) as admission:
        try:
            limited = caller.limits.tokens_per_minute is not None
            tokens = [await service.prompt_tokens(query) if limited else 0 for query in body.queries]
            decisions = await in_charged_lanes(admission, body.queries, tokens, one)
        except RouterError as error:
            raise refused(error) from None
        headers = admission.headers
    data = [
        RouteDecision(index=index, **report_of(decision, explain=explain).model_dump(exclude_unset=True))
        for index, decision in enumerate(decisions)
    ]
    return Response(RouteList(object="list", data=data).json_text(), media_type=JSON, headers=headers)


@router.get("/v1/router", response_model=RouterState)
async def router_state(state: State) -> Response:
    """The router's encoder, rungs, counts, calibration, and how its training went."""
    if state.router is None:
        answer = RouterState(object="router", enabled=False, encoder=None, adapters={}, rungs={}, shadow=False)
    else:
        report = await state.router.report()
        answer = RouterState(object="router", enabled=True, shadow=state.shadow is not None, **report)
    return Response(answer.json_text(), media_type=JSON)


@router.post("/v1/feedback", response_model=FeedbackTaken)
async def feedback(body: FeedbackRequest, state: State, caller: From) -> Response:
    """Keeps one opinion of how well an adapter answered a query, and counts it at once where the scorer can grow."""
    service = state.require_router()
    if (body.request_id is None) == (body.input is None):
        raise bad_request("Send either `request_id` or `input`.", "input" if body.request_id else "request_id")
    with state.gate.admit(caller):
        found = None if body.request_id is None else _recall(service, caller, body.request_id)
        text, since = (found.text, found.at) if found is not None else (body.input or "", time.monotonic())
        if body.adapter is not None:
            key = await _key_of(state, body.adapter, caller.tenant)
            _check_may_score(caller, key, found, body.adapter)
        elif found is not None and len(found.adapters) <= 1:
            key = found.adapters[0] if found.adapters else BASE
        else:
            raise bad_request("Name the `adapter` that the score is of.", "adapter", "missing_required_parameter")
        try:
            row = as_routed(ScoredQuery(text, {key: body.score}, body.group or ""), ())
        except DatasetError as error:
            raise bad_request(f"{error}.", "input", "invalid_value") from None
        name = address_of(key, caller.tenant) if key else state.settings.base_name
        try:
            learnt = await _keep(service, [row], since)
        except AdapterGoneError:
            raise APIError(
                404, f"The adapter {name!r} that this is of was deleted; score an answer of one that there is.",
                param="adapter" if found is None else "request_id", code="model_not_found",
            ) from None  # fmt: skip
    taken = FeedbackTaken(object="feedback", adapter=name, score=body.score, learnt=learnt)
    return Response(taken.json_text(), media_type=JSON)


@router.post(SCORES_PATH, response_model=ScoresTaken, openapi_extra={"requestBody": SCORES_SCHEMA})
async def upload_scores(request: Request, state: State) -> Response:
    """Keeps scores of many queries: per line `{"query": text, "scores": {adapter: 0 to 1}}`, with a `group` or not."""
    service = state.require_router()
    data = await request.body()
    words = {*state.settings.base_names} | (set() if service.knows(BASE_WORD) else {BASE_WORD})
    rows, named, count = await asyncio.to_thread(_rows_of, data, words)
    unknown = sorted(name for name in named if not service.knows(name))
    await _keep(service, rows)
    taken = ScoresTaken(object="router.scores", queries=len(rows), scores=count, unknown=unknown[:SHOWN_UNKNOWN])
    return Response(taken.json_text(), media_type=JSON)


@router.post("/v1/router/train", response_model=TrainStarted, status_code=202)
async def train(body: TrainRequest, state: State) -> Response:
    """Trains the scorer on the scores that are kept, in the background; the one in use serves until it is done."""
    started = state.require_router().train(body.seed)
    if started is None:
        raise unavailable("The router's encoder is not ready yet.", code="router_starting")
    if not started:
        raise APIError(
            409, "A training is running; GET /v1/router says how it goes.", code="already_training",
            headers={"x-should-retry": "false"},
        )  # fmt: skip
    answer = TrainStarted(object="router.training", status="running")
    return Response(answer.json_text(), status_code=202, media_type=JSON)


async def _keep(service: RouterService, rows: Sequence[ScoredQuery], since: float | None = None) -> bool:
    """`ScoresRung.add`. Raises a 503 when the disk refuses."""
    try:
        return await service.scores.add(rows, since)
    except LedgerError as error:
        raise unavailable(f"The {error}.", code="scores_not_kept", retry_after=RETRY_SECONDS) from error


def _recall(service: RouterService, caller: Caller, id: str) -> Served:
    """The caller's request of this id, or of what the answer's `id` puts a prefix before. Raises a 404."""
    for known in (id, *(id.removeprefix(prefix) for prefix in ID_PREFIXES if id.startswith(prefix))):
        found = service.recall(caller.remembered(known))
        if found is not None:
            return found
    raise APIError(
        404, f"The request {id!r} is not remembered (any longer); send its text as `input`.", param="request_id",
        code="request_not_found",
    )  # fmt: skip


def _check_may_score(caller: Caller, key: str, found: Served | None, name: str) -> None:
    """Raises a 403 where a user scores what is not its tenant's and did not serve the request that it names."""
    own = key != BASE and owner_and_name(key)[0] == caller.tenant
    served = found is not None and key in (found.adapters or (BASE,))
    if caller.role != "admin" and not own and not served:
        raise APIError(
            403, f"{name!r} is not your tenant's adapter: send the `request_id` of an answer that it gave you, or use "
            "a key with the role `admin`.", param="adapter", code="insufficient_permissions",
        )  # fmt: skip


async def _key_of(state: ServerState, name: str, tenant: str) -> str:
    """The candidate that a client of this tenant means. Raises a 404 for neither the base nor an adapter."""
    if name in state.settings.base_names:
        return BASE
    try:
        return (await state.in_store(state.store.resolve, name, tenant=tenant)).key
    except AdapterNotFound:
        if name == BASE_WORD:
            return BASE
        error = model_not_found(name)
        error.param = "adapter"
        raise error from None


def _rows_of(data: bytes, base_words: set[str]) -> tuple[list[ScoredQuery], set[str], int]:
    """The rows of a JSON-lines body as they are routed, which adapters they name, and how many scores they have.

    Raises a 400 that names the line. Blocks.
    """
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                rows.append(as_routed(ScoredQuery.from_json(line), base_words))
            except DatasetError as error:
                raise bad_request(f"Line {number}: {error}.", None, "invalid_scores") from None
    if not rows:
        raise bad_request("The body has no line of scores.", None, "invalid_scores")
    named = {name for row in rows for name in row.scores} - {BASE}
    return rows, named, sum(len(row.scores) for row in rows)
