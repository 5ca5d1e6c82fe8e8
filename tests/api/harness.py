"""What the API's tests are made of: a scripted engine, a byte tokenizer, a small base, adapters, and servers."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loramux.adapters_store.base_spec import BaseSpec, LinearSpec
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore
from loramux.router.encoders.ngram import NgramEncoder
from loramux.server.api.app import create_app
from loramux.server.api.auto.parts import RouterParts
from loramux.server.api.rendering import Renderer, SamplingDefaults
from loramux.server.api.serve import server_config
from loramux.server.api.state import ServerState
from loramux.server.engine.protocol import (
    EngineDeadError,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    StepEvent,
)
from loramux.server.observability.telemetry import Telemetry
from loramux.server.settings import Settings

BEGIN, END, USER, ASSISTANT, SYSTEM = range(256, 261)
MARKS = ("<|begin|>", "<|stop|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCAB = 264
BASE = "tiny/base"
WIDTH = 8
STATES = 64
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
TEMPLATE = (
    "<|begin|>{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(marks: Sequence[str] = ()) -> Tokenizer:
    """Token id = byte for 0..255, then the marks, and the special tokens `marks`."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    symbols = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (*MARKS, *marks)])
    return tokenizer


Step = Sequence[int] | float | EngineOutput | Exception | Awaitable[Any]
Script = Callable[[EngineRequest], Iterable[Step]]


def saying(text: str | bytes, *, per_step: int = 1, end: bool = True) -> Script:
    """An engine that says this text, a few tokens per step, and then ends the sequence (or goes on to be cut off)."""
    data = text if isinstance(text, bytes) else text.encode()

    def script(request: EngineRequest) -> list[Step]:
        steps: list[Step] = [list(data[i : i + per_step]) for i in range(0, len(data), per_step)]
        return [*steps, [END]] if end else steps

    return script


def writing(tokenizer: Tokenizer, text: str, *, per_step: int = 1, end: bool = True) -> Script:
    """The same of a text whose special tokens are written as such."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids

    def script(request: EngineRequest) -> list[Step]:
        steps: list[Step] = [ids[i : i + per_step] for i in range(0, len(ids), per_step)]
        return [*steps, [END]] if end else steps

    return script


class FakeEngine:
    """An `EngineClient` that follows a script, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.state: Any = "starting"
        self.info_value: EngineInfo | None = None
        self.stats = EngineStats()
        self.events: list[StepEvent] = []
        self.script: Script = saying("hello")
        self.requests: list[EngineRequest] = []
        self.probes: list[EngineRequest] = []
        self.probe_gate: asyncio.Event | None = None
        self.probe_error: Exception | None = None
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.forgotten: list[str] = []
        self.pins: list[tuple[str, bool]] = []
        self.pin_error: Exception | None = None
        self.stopped_with: float | None = None
        self.cached_tokens = 0
        self.start_state = "ready"

    @property
    def info(self) -> EngineInfo:
        if self.info_value is None:
            raise EngineDeadError("the engine is not ready yet")
        return self.info_value

    def drain_events(self) -> list[StepEvent]:
        events, self.events = self.events, []
        return events

    async def start(self) -> None:
        self.state = self.start_state
        if self.state == "ready":
            self.info_value = EngineInfo(256, 8, 16, 64, "float32", "cpu", (END,), 1 << 20, 1 << 20, 4, STATES, 1)

    async def wait_ready(self, timeout: float | None = None) -> None:
        return

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        self.stopped_with = drain_seconds
        self.state = "draining"

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        if self.state != "ready":
            raise EngineDeadError(f"the engine is {self.state}")
        if request.pooling is not None:
            yield await self._pool(request)
            return
        self.requests.append(request)
        self.running.add(request.request_id)
        left = request.sampling.max_tokens
        finished = False
        try:
            for step in self.script(request):
                await asyncio.sleep(step if isinstance(step, float) else 0)
                if isinstance(step, float):
                    continue
                if isinstance(step, Exception):
                    finished = True
                    raise step
                if isinstance(step, EngineOutput):
                    finished = step.finish_reason is not None
                    yield step._replace(request_id=request.request_id)
                    continue
                if isinstance(step, Awaitable):
                    await step
                    continue
                output = self._output(request, list(step)[:left], left)
                left -= len(output.token_ids)
                finished = output.finish_reason is not None
                yield output
                if finished:
                    return
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def _pool(self, request: EngineRequest) -> EngineOutput:
        """A histogram of the prompt's tokens, once the gate is open: alike texts have alike states.

        Single tokens' states are one of `WIDTH` axes each, by the token's number.
        """
        self.probes.append(request)
        if self.probe_gate is not None:
            await self.probe_gate.wait()
        if self.probe_error is not None:
            raise self.probe_error
        assert request.pooling is not None
        if request.pooling.tokens:
            last = np.asarray(request.prompt_token_ids)[-request.pooling.tokens :]
            states = np.stack([np.eye(WIDTH, dtype=np.float32)[last % WIDTH]] * len(request.pooling.layers))
            return EngineOutput(request.request_id, (), "stop", embedding=states.tobytes())
        counts = np.bincount(np.asarray(request.prompt_token_ids) % STATES, minlength=STATES)
        means = (counts / len(request.prompt_token_ids)).astype(np.float32)
        return EngineOutput(request.request_id, (), "stop", embedding=means.tobytes())

    def _output(self, request: EngineRequest, tokens: list[int], left: int) -> EngineOutput:
        sampling = request.sampling
        made = EngineOutput(request.request_id, tuple(tokens), cached_tokens=self.cached_tokens)
        ends = tokens and (tokens[-1] in sampling.stop_token_ids or (tokens[-1] == END and not sampling.ignore_eos))
        if ends:
            return made._replace(finish_reason="stop", stop_token_id=tokens[-1])
        return made._replace(finish_reason="length") if len(tokens) >= left else made

    async def forget_adapter(self, digest: str) -> None:
        self.forgotten.append(digest)

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        if self.pin_error is not None:
            raise self.pin_error
        self.pins.append((digest, pinned))


def base_spec() -> BaseSpec:
    """A base with two projections."""
    linears = {module: LinearSpec(WIDTH, WIDTH) for module in MODULES}
    return BaseSpec(BASE, "llama", "LlamaForCausalLM", WIDTH, 1, VOCAB, linears, {"lm_head": "Linear"})


def adapter_files(seed: int = 0, *, rank: int = 2, width: int = WIDTH) -> dict[str, bytes]:
    """What peft's save_pretrained writes for this base."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in MODULES:
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(rank, width)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(width, rank)).astype(np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": BASE,
    }  # fmt: skip
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def parts(files: dict[str, bytes]) -> list[tuple[str, Any]]:
    """The files as multipart parts."""
    return [("files", (name, data, "application/octet-stream")) for name, data in files.items()]


@dataclass
class Bench:
    """A server's parts, without a transport."""

    engine: FakeEngine
    store: AdapterStore
    state: ServerState
    app: Any
    url: str = ""
    client: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)

    def put(self, name: str, seed: int = 0, **texts: Any) -> Any:
        """An adapter straight into the store."""
        with self.store.begin_upload() as upload:
            for file, data in adapter_files(seed).items():
                sink = upload.open_file(file)
                sink.write(data)
                sink.close()
            return self.store.commit(upload, name=name, **texts).adapter

    async def chat(self, **body: Any) -> httpx.Response:
        """One chat request with a default body."""
        whole = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], **body}
        return await self.client.post("/v1/chat/completions", json=whole)

    async def complete(self, **body: Any) -> httpx.Response:
        """One text completion with a default body."""
        return await self.client.post("/v1/completions", json={"model": BASE, "prompt": "ab", **body})

    async def upload(self, name: str, seed: int = 0, **fields: str) -> httpx.Response:
        """One upload over HTTP."""
        return await self.client.post("/v1/adapters", data={"name": name, **fields}, files=parts(adapter_files(seed)))

    def leases(self) -> dict[str, int]:
        """The leases that are held; those of requests that just ended are waited for."""
        for _ in range(500):
            with self.store._guard:
                if not self.store._leases:
                    break
            threading.Event().wait(0.01)
        return dict(self.store._leases)


def make_bench(
    root: Path,
    *,
    template: str | None = TEMPLATE,
    response_template: dict[str, Any] | None = None,
    marks: Sequence[str] = (),
    defaults: SamplingDefaults | None = None,
    base_examples: Sequence[str] = (),
    telemetry: Telemetry | None = None,
    **settings: Any,
) -> Bench:
    """A server's parts over a store in `root`."""
    chosen = Settings(**{"model": None, "served_model_name": BASE, "store_dir": root, "port": 0, **settings})
    store = AdapterStore(root / "store", base_spec(), StoreLimits(min_free_bytes=0))
    engine = FakeEngine()
    renderer = Renderer(
        byte_tokenizer(marks), chat_template=template, response_template=response_template, defaults=defaults
    )
    parts = RouterParts(True, "tiny", None, 64, NgramEncoder(64), tuple(base_examples))
    state = ServerState.make(
        chosen, engine, store, renderer, routing=parts if chosen.router == "on" else None,
        vocab_size=max(VOCAB, renderer.vocab_size),
        model_created=1_700_000_000,
    )  # fmt: skip
    return Bench(engine, store, state, create_app(state, telemetry))


@asynccontextmanager
async def in_process(bench: Bench, **client: Any) -> AsyncIterator[Bench]:
    """The bench behind httpx's ASGI transport, between start and end of the application's life."""
    async with bench.app.router.lifespan_context(bench.app):
        transport = httpx.ASGITransport(app=bench.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", **client) as http:
            bench.client = http
            yield bench


@contextmanager
def listening(bench: Bench) -> Iterator[Bench]:
    """The bench behind a real socket, served by uvicorn in a thread of its own."""
    config = server_config(bench.state, bench.app)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        threading.Event().wait(0.005)
    host, port = server.servers[0].sockets[0].getsockname()
    bench.url = f"{'https' if config.is_ssl else 'http'}://{host}:{port}"
    try:
        yield bench
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def sse(text: str) -> list[Any]:
    """The events of a stream: decoded JSON, and the string `[DONE]`."""
    events = []
    for block in text.split("\n\n"):
        if block:
            assert block.startswith("data: "), block
            data = block.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
    return events
