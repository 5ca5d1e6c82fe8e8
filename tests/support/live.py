"""A real server in its own process, listening on a free local port."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 180.0


@dataclass(frozen=True)
class LiveServer:
    """A running server: its address, its process and its log."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels."""
        samples = {}
        for line in httpx.get(self.url + "/metrics", timeout=30).raise_for_status().text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def upload(self, name: str, directory: Path, **fields: str) -> httpx.Response:
        """Uploads a PEFT adapter; the response, whatever it is."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = [("files", (file, (directory / file).read_bytes())) for file in names]
        return httpx.post(self.url + "/v1/adapters", data={"name": name, **fields}, files=files, timeout=60)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def live_server(
    root: Path, *flags: str, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "loramux.server.cli")
) -> Iterator[LiveServer]:
    """`loramux serve` with its store under `root`; ready on entry, ended (by SIGTERM) on exit.

    `program` is what Python runs in place of the command line.
    """
    port = free_port()
    log = root / "server.log"
    command = [sys.executable, "-P", *program, "serve", "--host", "127.0.0.1", "--port", str(port),
               "--store-dir", str(root / "store"), "--threads", "1", *flags]  # fmt: skip
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
    server = LiveServer(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def wait_ready(server: LiveServer) -> None:
    """Returns when /ready answers 200; RuntimeError with the log when the process ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(server.url + "/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{server.log.read_text(errors='replace')[-4000:]}")
