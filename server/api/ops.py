"""What probes, scrapers and people who debug look at; open to everybody."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loramux import __version__
from loramux.server.api.state import State

router = APIRouter()


@router.get("/health")
async def health() -> JSONResponse:
    """200 while this process answers; says nothing about the engine."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(state: State) -> JSONResponse:
    """200 when requests are served right now, else 503 with the reason and `Retry-After`."""
    state.require_engine()
    return JSONResponse({"status": "ready", "model": state.settings.base_name})


@router.get("/version")
async def version() -> JSONResponse:
    """The server's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request, state: State) -> Response:
    """Prometheus' text format, or OpenMetrics for those who ask for it."""
    body, content_type = state.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The API's description. Made at the first request, which takes a moment, in a thread."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))
