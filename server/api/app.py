"""The application: routes, middleware, and what runs from start to end."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from loramux import __version__
from loramux.server.api import (
    adapters,
    admin,
    chat,
    completions,
    console,
    embeddings,
    errors,
    lora_modules,
    models,
    openapi,
    ops,
    refused,
    responses,
    routing,
    tokenize,
)
from loramux.server.api.auth import AuthMiddleware
from loramux.server.api.middleware import BodyMiddleware, RequestMiddleware
from loramux.server.api.state import ServerState
from loramux.server.api.uploads import OVERHEAD_BYTES
from loramux.server.observability.telemetry import Telemetry

EVENT_SECONDS = 1.0
WORK_THREADS = 4
"""Threads for long texts and bodies. Each one that computes takes turns with the event loop, so they are few."""
UPLOAD_PATH = "/v1/adapters"
CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
CORS_EXPOSED = (
    "x-request-id", "x-loramux-adapters", "x-loramux-router", "x-loramux-router-rung", "retry-after", "x-should-retry",
    "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
)  # fmt: skip
CORS_SECONDS = 600


async def _take_events(state: ServerState) -> None:
    """Moves the engine's step events into the histograms, also when nobody scrapes."""
    while True:
        await asyncio.sleep(EVENT_SECONDS)
        state.metrics.take_events()


def create_app(state: ServerState, telemetry: Telemetry | None = None) -> FastAPI:
    """The application over the given parts. Its lifespan starts the engine, and stops it and `telemetry` at the end.

    The application answers from the first moment: until the engine is ready, requests get a 503.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = ThreadPoolExecutor(WORK_THREADS, thread_name_prefix="work")
        asyncio.get_running_loop().set_default_executor(work)
        await state.count_store()
        await state.engine.start()
        events = asyncio.create_task(_take_events(state))
        if state.router is not None:
            state.router.start()
        try:
            yield
        finally:
            events.cancel()
            await state.stop(drain_seconds=0.0)
            await state.stop_routing()
            state.close()
            if telemetry is not None:
                await asyncio.to_thread(telemetry.shutdown)

    app = FastAPI(
        title="loramux",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # `ops` serves it
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": state.settings.root_path}] if state.settings.root_path else None,
    )
    app.state.server = state
    for module in (chat, completions, responses, embeddings, tokenize, models, adapters, lora_modules, admin, routing,
                   ops, refused):  # fmt: skip
        app.include_router(module.router)
    if state.settings.console == "on":
        app.include_router(console.make_router(console.Console.load(state.settings.root_path)))
    errors.install(app)
    app.openapi = openapi.describe(app)  # type: ignore[method-assign]

    def limit_of(path: str) -> int:
        if path == UPLOAD_PATH:
            return int(state.settings.adapter_max_bytes) + OVERHEAD_BYTES
        if path == routing.SCORES_PATH:
            return int(state.settings.router_scores_bytes)
        return int(state.settings.max_request_bytes)

    # the last one added is the outermost
    app.add_middleware(AuthMiddleware, keys=state.keys, metrics_open=state.settings.metrics_open)
    app.add_middleware(BodyMiddleware, limit_of=limit_of, pause_seconds=state.settings.body_timeout_seconds)
    app.add_middleware(
        RequestMiddleware,
        metrics=state.metrics,
        telemetry=telemetry,
        max_header_bytes=int(state.settings.max_header_bytes),
        root_path=state.settings.root_path,
    )
    if state.settings.cors_origin:  # a browser asks for permission without a key, and reads no answer without
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.settings.cors_origin,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],
            expose_headers=CORS_EXPOSED,
            max_age=CORS_SECONDS,
        )
    return app
