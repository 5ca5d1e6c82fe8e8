"""The README is true: its commands run as written, in order, against the server that its first one starts."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.live import START_SECONDS, free_port
from support.settings_table import BEGIN, END, README, table

ROOT = README.parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVES = re.compile(r"^(make serve|\S*loramux serve)\b")


def blocks() -> list[tuple[str, str]]:
    return [(m.group(1), m.group(2)) for m in BLOCK.finditer(README.read_text())]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The README's ports are replaced by free ones, uploads stay out of the user's own store, and what a `make` that
    runs this was told is not told to the README's."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "ARGS")}
    return {**inherited, "PORT": str(free_port()), "XDG_DATA_HOME": str(tmp_path_factory.mktemp("data"))}


def in_background(command: str, environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        return subprocess.Popen(
            ["bash", "-ec", command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url + "/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server did not become ready:\n{log.read_text(errors='replace')[-3000:]}")


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return  # by itself: what it wrote says why
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def url(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that the README's first command starts."""
    language, command = blocks()[0]
    assert (language, command.strip()) == ("sh", "make serve")
    log = tmp_path_factory.mktemp("log") / "serve.log"
    process = in_background(command, environment, log)
    address = f"http://127.0.0.1:{environment['PORT']}"
    try:
        wait_ready(address, process, log)
        yield address
        assert "curl " + address in log.read_text(), "the server prints a first request"
    finally:
        end(process)


def run_block(language: str, text: str, environment: dict[str, str]) -> str:
    """Runs one block and returns what it printed."""
    command = [str(ROOT / ".venv/bin/python"), "-c", text] if language == "python" else ["bash", "-ec", text]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert '"error"' not in done.stdout, f"{text}\n{done.stdout}"
    return done.stdout


def test_every_command_works_as_written(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    printed = []
    for language, text in blocks()[1:]:
        text = text.replace("http://127.0.0.1:8000", url)
        if SERVES.match(text):
            port = re.search(r"--port (\d+)", text)
            assert port is not None
            chosen = str(free_port())
            process = in_background(
                text.replace(f"--port {port.group(1)}", f"--port {chosen}"), environment, tmp_path / "log"
            )
            try:
                wait_ready(f"http://127.0.0.1:{chosen}", process, tmp_path / "log")
            finally:
                end(process)
            continue
        printed.append(run_block(language, text, {**environment, "LORAMUX_URL": url}))
    everything = "\n".join(printed)
    assert "tenalp" in everything
    assert "XIV" in everything
    names = [m["id"] for m in httpx.get(url + "/v1/models").json()["data"]]
    assert "mirror" in names


def test_the_settings_table_is_complete() -> None:
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()
