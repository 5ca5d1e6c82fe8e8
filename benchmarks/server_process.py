"""A loramux server in its own process, and the few requests that a benchmark makes; the standard library only."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 180.0


@dataclass(frozen=True)
class Server:
    """Where a running server listens."""

    host: str
    port: int

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """One request; the decoded JSON answer. RuntimeError for a status of 400 or more."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {text.decode(errors='replace')[:500]}")
        return json.loads(text) if text else None

    def complete(self, model: str, prompt: list[int], max_tokens: int) -> list[int]:
        """A greedy completion of exactly `max_tokens` tokens of a prompt of token ids."""
        body = {
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        answer = self.call("POST", "/v1/completions", json.dumps(body).encode())
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def upload(self, name: str, directory: Path) -> None:
        """Uploads a PEFT adapter."""
        boundary = uuid.uuid4().hex
        parts = [_field(boundary, 'name="name"', name.encode())]
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            data = (directory / file).read_bytes()
            parts.append(_field(boundary, f'name="files"; filename="{file}"', data))
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        self.call("POST", "/v1/adapters", body, f"multipart/form-data; boundary={boundary}")


def _field(boundary: str, disposition: str, data: bytes) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + data + b"\r\n"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(model: Path, *flags: str) -> Iterator[Server]:
    """A server of this model on a free local port; it ends with the block."""
    port = free_port()
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile() as log:
        command = [
            sys.executable, "-P", "-m", "loramux.server.cli", "serve", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--store-dir", store, *flags,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            _wait_ready(port, process, log)
            yield Server("127.0.0.1", port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(port: int, process: "subprocess.Popen[bytes]", log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError("the server did not become ready:\n" + log.read().decode(errors="replace")[-4000:])
