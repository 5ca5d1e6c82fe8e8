"""`loramux serve`: puts a server together from its settings, runs it, and says when it can be talked to."""

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sqlite3
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from loramux.adapters_store.base_spec import BaseSpec, base_spec_from_config
from loramux.adapters_store.errors import AdapterError, StoreUnavailableError
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.registry import Sharing
from loramux.adapters_store.store import AdapterStore
from loramux.server.api.app import create_app
from loramux.server.api.auto.ledger import LedgerError
from loramux.server.api.auto.parts import RouterSetupError, prepare
from loramux.server.api.connections import HandshakeLoop, bounded
from loramux.server.api.lora_modules import LoraModuleError, register_modules
from loramux.server.api.rendering import Renderer, TokenizerError
from loramux.server.api.state import ServerState
from loramux.server.demo.assets import DemoAdapter, demo_adapters, demo_base_path
from loramux.server.engine.client import ProcessEngineClient
from loramux.server.engine.loading import UnsupportedModelError, load_config, resolve_model
from loramux.server.engine.protocol import EngineError
from loramux.server.observability import logs
from loramux.server.observability.telemetry import Telemetry, TelemetryUnavailableError
from loramux.server.settings import Settings

logger = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
GRACE_SECONDS = 10
SPARE_FILES = 256  # for blobs, the registry, the engine's pipes
SWITCH_SECONDS = 0.0005
"""After how long a thread that computes hands over to the event loop, which waits for that after each send; by default
ten times as long."""


class ServeError(Exception):
    """The server cannot start; the message says why and what would help."""


def find_model(settings: Settings) -> Path:
    """The base model's directory: the demo's, a local one, or a download from the hub (resumed, cached, then offline).

    Raises `ServeError`.
    """
    if settings.model is None:
        path = demo_base_path()
        if not (path / "config.json").is_file():
            raise ServeError("the embedded demo is not part of this installation; pass --model")
        return path
    try:
        return resolve_model(settings.model, settings.revision)
    except UnsupportedModelError as error:
        raise ServeError(f"--model {settings.model}: {error}") from None


def structure_of(spec: BaseSpec) -> str:
    """Text that is equal for two bases exactly when the same adapters fit both."""
    linears = {name: (s.in_features, s.out_features, s.transposed) for name, s in sorted(spec.linears.items())}
    return json.dumps([spec.model_type, spec.architecture, spec.hidden_size, spec.num_layers, linears])


def register(store: AdapterStore, adapters: Sequence[DemoAdapter]) -> None:
    """Puts the demo's adapters into the store, once and for every tenant: names that were replaced or deleted since are
    left alone."""
    for adapter in adapters:
        if store.ever_registered(adapter.name):
            continue
        with store.begin_upload() as upload:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                sink = upload.open_file(file)
                with (adapter.path / file).open("rb") as source:
                    while piece := source.read(COPY_BYTES):
                        sink.write(piece)
                sink.close()
            store.commit(
                upload, name=adapter.name, description=adapter.description, examples=list(adapter.examples),
                sharing=Sharing("public"),
            )  # fmt: skip


@dataclass(slots=True)
class Parts:
    """A server put together but not started; `demo` are the adapters that the embedded demo registered."""

    state: ServerState
    demo: list[DemoAdapter]


def assemble(settings: Settings) -> Parts:
    """Finds the model, opens its store, loads its tokenizer. The engine is made, not started. Raises `ServeError`."""
    path = find_model(settings)
    try:
        spec = base_spec_from_config(load_config(path), name=settings.base_name)
        renderer = Renderer.load(
            path, chat_template=settings.chat_template, response_template=settings.response_template
        )
        routing = prepare(settings, path, spec.num_layers)
    except (UnsupportedModelError, TokenizerError, RouterSetupError) as error:
        raise ServeError(str(error)) from error
    except Exception as error:  # transformers and its configurations raise whatever a damaged file leads them to
        raise ServeError(f"--model {path}: cannot be read ({type(error).__name__}: {error})") from error
    root = settings.store_root(structure_of(spec))
    limits = StoreLimits(max_upload_bytes=int(settings.adapter_max_bytes), max_adapters=settings.max_adapters)
    try:
        store = AdapterStore(root, spec, limits, reserved_names=settings.base_names)
        demo = demo_adapters() if settings.model is None else []
        register(store, demo)
        register_modules(store, settings.lora_modules)
    except LoraModuleError as error:
        raise ServeError(str(error)) from None
    except (AdapterError, StoreUnavailableError, sqlite3.Error, OSError) as error:
        raise ServeError(f"--store-dir {settings.store_dir}: {error}") from error
    engine = ProcessEngineClient(
        settings.to_engine_config(str(path), str(store.blob_dir)),
        step_timeout_seconds=settings.step_timeout_seconds,
        queue_timeout_seconds=settings.queue_timeout_seconds,
        request_timeout_seconds=settings.request_timeout_seconds,
    )
    try:
        state = ServerState.make(
            settings,
            engine,
            store,
            renderer,
            routing=routing,
            vocab_size=spec.vocab_size,
            model_created=int((path / "config.json").stat().st_mtime),
        )
    except LedgerError as error:
        raise ServeError(f"--store-dir {settings.store_dir}: the router's {error}") from error
    state.metrics.watch_process(engine)
    return Parts(state, demo)


class Server(uvicorn.Server):
    """Uvicorn that drains the engine from the first signal on: running requests finish or end with an error event."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        state.metrics.watch_connections(lambda: len(self.server_state.connections), state.settings.max_connections)
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self.failure: str | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler, on the loop's thread. A second Ctrl-C ends at once.

        Unlike uvicorn's own, it does not raise the signal again at the end: a drained server exits with 0.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(
                self._state.stop(drain_seconds=self._state.settings.drain_seconds)
            )

    @property
    def address(self) -> str:
        """`http://host:port` (or `https://`) as a client on this machine writes it."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}"

    async def announce(self, write: Callable[[str], object], example: str) -> None:
        """Waits until requests are served, then writes the address and a first request. Ends a server that cannot."""
        while not self.started:
            await asyncio.sleep(0.05)
        try:
            await self._state.engine.wait_ready()
        except EngineError as error:
            self.failure = str(error)
            self.should_exit = True
            return
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process: keep the collector out of it
        write(greeting(self._state, self.address, example))


def _resolves(store: AdapterStore, name: str) -> bool:
    """Whether the name is an adapter now."""
    try:
        store.resolve(name)
    except AdapterError:
        return False
    return True


def greeting(state: ServerState, address: str, adapter: str) -> str:
    """What a newcomer needs: where the server is, and a request to paste. `adapter` may be empty."""
    settings = state.settings
    prompt = "Hello!"
    field: dict[str, Any]
    if adapter:
        examples = state.store.resolve(adapter).examples
        prompt = examples[0] if examples else prompt
    if state.renderer.can_chat:
        path, field = "chat/completions", {"messages": [{"role": "user", "content": prompt}]}
    else:
        path, field = "completions", {"prompt": prompt}
    body = json.dumps({"model": adapter or settings.base_name, **field}, ensure_ascii=False).replace("'", "'\\''")
    key = " -H 'authorization: Bearer '\"$LORAMUX_API_KEY\"" if settings.api_key else ""
    return (
        f"\nloramux serves {settings.base_name} on {address} (OpenAI API under {address}/v1)\n\n"
        f"  curl {address}/v1/{path}{key} -H 'content-type: application/json' \\\n    -d '{body}'\n\n"
        f"  loramux adapters push NAME DIRECTORY --url {address}\n"
    )


def configure_logging(level: str, format: logs.LogFormat = "text") -> None:
    """One line per record on standard error."""
    logs.configure(level, format, process="api")


def raise_file_limit() -> int:
    """Lets the process open as many files (connections, blobs) as the system allows it; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def make_telemetry(settings: Settings) -> Telemetry | None:
    """What sends traces, if that is asked for. Raises `ServeError`."""
    if settings.otlp_endpoint is None:
        return None
    try:
        most = settings.metrics_max_adapters + len(settings.base_names)
        return Telemetry.to(settings.otlp_endpoint, service="loramux", max_models=most)
    except TelemetryUnavailableError as error:
        raise ServeError(str(error)) from None


def check_certificate(settings: Settings) -> None:
    """Raises `ServeError` for a certificate or key that cannot be used."""
    if settings.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (ssl.SSLError, OSError) as error:
        raise ServeError(f"--ssl-certfile {settings.ssl_certfile}: cannot be used with its key ({error})") from None


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on, taken before anything is loaded. Raises `ServeError` when it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ServeError(
            f"--host {settings.host} --port {settings.port}: {error.strerror}; choose others (--port 0: any free one)"
        ) from None


class ServerConfig(uvicorn.Config):
    """Uvicorn's configuration with a bound on TLS handshakes."""

    def __init__(self, app: ASGIApp, *, handshake_seconds: float, **options: Any) -> None:
        super().__init__(app, **options)
        self._handshake_seconds = handshake_seconds

    def get_loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        """What makes the event loop that the server must run on."""
        return partial(HandshakeLoop, self._handshake_seconds)


def server_config(state: ServerState, app: ASGIApp) -> ServerConfig:
    """Uvicorn's part of the settings, for the application over `state`."""
    settings = state.settings
    return ServerConfig(
        app,
        handshake_seconds=settings.header_timeout_seconds,
        host=settings.host,
        port=settings.port,
        http=bounded(
            max_connections=settings.max_connections,
            head_seconds=settings.header_timeout_seconds,
            on_refusal=state.metrics.refused,
        ),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=int(settings.max_header_bytes),
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=int(settings.drain_seconds) + GRACE_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


def serve(settings: Settings) -> int:
    """Serves until a signal. Returns the exit status; raises `ServeError` when it cannot start."""
    configure_logging(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # decided once: the library warns and guesses otherwise
    files = raise_file_limit()
    if files < settings.max_connections + SPARE_FILES:
        logger.warning(
            "the system allows %d open files, too few for --max-connections %d: raise the limit (ulimit -n) or lower "
            "the setting", files, settings.max_connections,
        )  # fmt: skip
    telemetry = make_telemetry(settings)
    check_certificate(settings)
    listener = listen(settings)
    parts = assemble(settings)
    config = server_config(parts.state, create_app(parts.state, telemetry))
    server = Server(config, parts.state)

    def write(text: str) -> None:
        if settings.log_format == "json":  # for machines: one more record instead of a text for people
            fields = {"address": server.address, "model": settings.base_name}
            logger.info("serving", extra={"fields": fields})
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    async def run() -> None:
        example = next((a.name for a in parts.demo if _resolves(parts.state.store, a.name)), "")
        announcement = asyncio.create_task(server.announce(write, example))
        try:
            await server.serve(sockets=[listener])
        finally:
            announcement.cancel()
            gc.unfreeze()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    if server.failure is not None:
        raise ServeError(server.failure)
    return 0 if server.started else 1
