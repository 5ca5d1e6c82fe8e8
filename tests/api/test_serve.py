"""Putting a server together, what it prints, and how it ends."""

import asyncio
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from api.harness import END, TEMPLATE, Bench, FakeEngine, adapter_files, byte_tokenizer, in_process, make_bench
from transformers import LlamaConfig

from loramux.server.api import serve as serve_module
from loramux.server.api.connections import BoundedProtocol, HandshakeLoop
from loramux.server.api.serve import (
    Parts,
    ServeError,
    Server,
    assemble,
    check_certificate,
    find_model,
    greeting,
    make_telemetry,
    raise_file_limit,
    register,
    server_config,
)
from loramux.server.demo.assets import DemoAdapter
from loramux.server.engine.protocol import EngineError
from loramux.server.settings import load_settings


def write_model(folder: Path) -> Path:
    """A llama's configuration and tokenizer; weights are not needed to put a server together."""
    folder.mkdir(exist_ok=True)
    LlamaConfig(
        vocab_size=264, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def demo(folder: Path, name: str = "skill") -> DemoAdapter:
    """One adapter of a demo."""
    folder.mkdir(exist_ok=True)
    for file, data in adapter_files().items():
        (folder / file).write_bytes(data)
    return DemoAdapter(name, folder, "does things", ("it's done", "b"))


def test_find_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    assert find_model(load_settings({"model": str(model)})) == model
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        (tmp_path / "empty", "config.json"),
        (tmp_path / "none", "no such directory"),
        ("./none", "no such"),
    ):
        with pytest.raises(ServeError, match=words):
            find_model(load_settings({"model": str(wrong)}))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr("loramux.server.engine.loading.snapshot_download", offline)
    with pytest.raises(ServeError, match=r"org/name.*offline$"):
        find_model(load_settings({"model": "org/name"}))


def test_weights_come_as_safetensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return "/somewhere"

    monkeypatch.setattr("loramux.server.engine.loading.snapshot_download", download)
    assert find_model(load_settings({"model": "org/name", "revision": "v1"})) == Path("/somewhere")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_assemble(tmp_path: Path) -> None:
    settings = {"model": str(write_model(tmp_path / "m")), "store_dir": str(tmp_path / "store")}
    made = assemble(load_settings(settings))
    assert made.demo == []
    assert made.state.vocab_size == 264
    assert made.state.settings.base_name == "m"
    assert made.state.store.base.name == "m"
    assert made.state.store.blob_dir.parent.parent == tmp_path / "store"
    with pytest.raises(ServeError, match="another process"):
        assemble(load_settings(settings))
    other = assemble(load_settings({**settings, "served_model_name": "other"}))
    assert other.state.store.blob_dir != made.state.store.blob_dir
    for parts in (made, other):
        parts.state.close()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ServeError, match="tokenizer"):
        assemble(load_settings({"model": str(model), "store_dir": str(tmp_path / "store")}))


def test_registering_the_demo_twice_changes_nothing(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    for _ in range(2):
        register(bench.store, [demo(tmp_path / "a")])
    (version,) = bench.store.versions("skill")
    assert (version.description, version.examples) == ("does things", ["it's done", "b"])


@pytest.mark.anyio
async def test_the_demo_is_there_for_every_tenant(tmp_path: Path) -> None:
    async with in_process(make_bench(tmp_path)) as bench:
        register(bench.store, [demo(tmp_path / "a")])
        secret, _ = bench.state.tenants.create_key("acme")
        headers = {"authorization": f"Bearer {secret}"}
        listed = (await bench.client.get("/v1/models", headers=headers)).json()["data"]
        assert "default/skill" in [model["id"] for model in listed]
        body = {"model": "default/skill", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert (await bench.client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
        assert (await bench.client.delete("/v1/adapters/default%2Fskill", headers=headers)).status_code != 200


def test_greeting_can_be_pasted(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, api_key=["secret-key"])
    register(bench.store, [demo(tmp_path / "a")])
    text = greeting(bench.state, "http://127.0.0.1:1", "skill")
    assert "secret-key" not in text
    command = re.search(r"curl .*?'\n", text, re.S).group(0).replace("curl", "printf '%s\\n'", 1)
    shown = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={"LORAMUX_API_KEY": "k"}, check=True
    )
    lines = shown.stdout.splitlines()
    assert "authorization: Bearer k" in lines
    assert lines[0] == "http://127.0.0.1:1/v1/chat/completions"
    assert json.loads(lines[-1]) == {"model": "skill", "messages": [{"role": "user", "content": "it's done"}]}
    plain = greeting(make_bench(tmp_path / "b", template=None).state, "http://h:1", "")
    assert "/v1/completions" in plain
    assert "Bearer" not in plain


class Running:
    """A `Server` in a thread, and what it wrote."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.written: list[str] = []
        self.server = Server(server_config(bench.state, bench.app), bench.state)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        async def run() -> None:
            announcement = asyncio.create_task(self.server.announce(self.written.append, ""))
            await self.server.serve()
            announcement.cancel()

        self.loop.run_until_complete(run())
        self.loop.close()

    def signal(self) -> None:
        """What the signal handler does, on the loop's thread."""
        self.loop.call_soon_threadsafe(self.server.handle_exit, signal.SIGTERM, None)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Any]:
    """Starts servers, and sees to it that they end."""
    started: list[Running] = []

    def start(engine: FakeEngine | None = None, **settings: Any) -> Running:
        bench = make_bench(tmp_path, **settings)
        if engine is not None:
            bench.engine = bench.state.engine = engine
        started.append(Running(bench))
        return started[-1]

    yield start
    for item in started:
        if item.thread.is_alive():
            item.signal()
        item.thread.join(20)
        assert not item.thread.is_alive()


def test_announces_its_address(running: Any) -> None:
    made = running()
    while not made.written:
        threading.Event().wait(0.01)
    address = re.search(r"http://\S+:\d+", made.written[0]).group(0)
    assert httpx.get(f"{address}/ready").status_code == 200


def test_an_engine_that_cannot_start_ends_the_server(running: Any) -> None:
    class Broken(FakeEngine):
        async def wait_ready(self, timeout: float | None = None) -> None:
            raise EngineError("falcon is not supported", retryable=False)

    made = running(Broken())
    made.thread.join(20)
    assert made.server.failure == "falcon is not supported"
    assert made.written == []


def test_a_signal_drains(running: Any) -> None:
    made = running(drain_seconds=3.0)
    while not made.written:
        threading.Event().wait(0.01)
    go = threading.Event()

    def script(request: Any) -> Iterator[Any]:
        yield [97]
        while not go.is_set():
            yield 0.01
        yield [END]

    made.bench.engine.script = script
    body = {"model": "tiny/base", "prompt": "a", "stream": True}
    with httpx.stream("POST", f"{made.server.address}/v1/completions", json=body, timeout=20) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        made.signal()
        while made.bench.engine.stopped_with is None:
            threading.Event().wait(0.01)
        assert made.bench.engine.stopped_with == 3.0
        go.set()
        assert list(lines)[-1] == "data: [DONE]"
    made.thread.join(20)
    assert not made.thread.is_alive()


def test_the_loop_bounds_handshakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(tmp_path, header_timeout_seconds=7)
    loops = []

    async def serves(server: Server, sockets: list[socket.socket]) -> None:
        loops.append(asyncio.get_running_loop())
        sockets[0].close()
        server.started = True

    async def announces(*_: object) -> None:
        pass

    for name in ("configure_logging", "raise_file_limit"):  # which would outlive the test
        monkeypatch.setattr(serve_module, name, lambda *_: 1 << 20)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(serve_module, "assemble", lambda _: Parts(bench.state, []))
    monkeypatch.setattr(Server, "serve", serves)
    monkeypatch.setattr(Server, "announce", announces)
    assert serve_module.serve(bench.state.settings) == 0
    (loop,) = loops
    assert isinstance(loop, HandshakeLoop)
    assert loop._handshake_seconds == 7


def test_connections_are_served_by_the_bounded_h11_protocol(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, max_connections=7, header_timeout_seconds=3.0, max_header_bytes=2048)
    config = server_config(bench.state, bench.app)
    config.load()
    protocol = config.http_protocol_class
    assert issubclass(protocol, BoundedProtocol)
    assert (protocol.max_connections, protocol.head_seconds) == (7, 3.0)
    assert config.h11_max_incomplete_event_size == 2048
    assert config.ws_protocol_class is None


def test_connections_are_counted(running: Any) -> None:
    made = running(max_connections=5)
    while not made.written:
        threading.Event().wait(0.01)
    with httpx.Client(base_url=made.server.address) as client:
        text = client.get("/metrics").text
    assert "loramux_http_connections 1.0" in text
    assert "loramux_http_connections_limit 5.0" in text


def test_a_certificate_that_cannot_be_used_is_refused_at_start(tmp_path: Path) -> None:
    authority = trustme.CA()
    paths = []
    for name in "ab":
        made = authority.issue_cert("localhost")
        made.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        paths += [tmp_path / f"{name}.pem", tmp_path / f"{name}.key"]
    (tmp_path / "no.pem").write_text("nothing")
    both, key, _, other_key = paths
    check_certificate(load_settings())
    check_certificate(load_settings({"ssl_certfile": both}))
    check_certificate(load_settings({"ssl_certfile": both, "ssl_keyfile": key}))
    for cert, wrong in ((both, other_key), (tmp_path / "no.pem", key)):
        with pytest.raises(ServeError, match="--ssl-certfile"):
            check_certificate(load_settings({"ssl_certfile": cert, "ssl_keyfile": wrong}))


def test_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        assert raise_file_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_telemetry_unless_asked_for() -> None:
    assert make_telemetry(load_settings()) is None


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, loramux.server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
