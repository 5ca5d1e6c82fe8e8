"""The application: routes, middleware, and what runs from start to end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from loramux import __version__
from loramux.server.api import adapters, chat, completions, errors, models, ops, routing
from loramux.server.api.auth import ApiKeys, AuthMiddleware
from loramux.server.api.middleware import BodyMiddleware, RequestMiddleware
from loramux.server.api.state import ServerState
from loramux.server.api.uploads import OVERHEAD_BYTES

EVENT_SECONDS = 1.0
UPLOAD_PATH = "/v1/adapters"


async def _take_events(state: ServerState) -> None:
    """Moves the engine's step events into the histograms, also when nobody scrapes."""
    while True:
        await asyncio.sleep(EVENT_SECONDS)
        state.metrics.take_events()


def create_app(state: ServerState) -> FastAPI:
    """The application over the given parts. Its lifespan starts the engine, and stops it at the end.

    The application answers from the first moment: until the engine is ready, requests get a 503.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
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

    app = FastAPI(
        title="loramux",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    for module in (chat, completions, models, adapters, routing, ops):
        app.include_router(module.router)
    errors.install(app)

    def limit_of(path: str) -> int:
        if path == UPLOAD_PATH:
            return int(state.settings.adapter_max_bytes) + OVERHEAD_BYTES
        if path == routing.SCORES_PATH:
            return int(state.settings.router_scores_bytes)
        return int(state.settings.max_request_bytes)

    # the last one added is the outermost
    keys = ApiKeys([key.get_secret_value() for key in state.settings.api_key])
    app.add_middleware(AuthMiddleware, keys=keys)
    app.add_middleware(BodyMiddleware, limit_of=limit_of, pause_seconds=state.settings.body_timeout_seconds)
    app.add_middleware(RequestMiddleware)
    return app
