"""The command line against a live server, and its exit statuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from api.harness import Bench, adapter_files

from loramux import __version__
from loramux.server.cli import main


@pytest.fixture
def server(live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A live server that the commands find by its variable; output is wide enough for every column."""
    bench = live()
    monkeypatch.setenv("LORAMUX_URL", bench.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    return bench


def directory(folder: Path, seed: int = 0) -> str:
    """An adapter as save_pretrained leaves it, README included."""
    folder.mkdir(exist_ok=True)
    for name, data in adapter_files(seed).items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("hello")
    return str(folder)


def test_push_ls_show_rm(server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory(tmp_path / "a")
    assert main(["adapters", "push", "skill", path, "--description", "does [bold]things", "--example", "do it"]) == 0
    assert "skill@1 is ready" in capsys.readouterr().out
    assert main(["adapters", "push", "skill", directory(tmp_path / "b", 1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert main(["adapters", "ls"]) == 0
    out = capsys.readouterr().out
    assert "skill" in out
    assert "does [bold]things" in out
    assert main(["adapters", "ls", "--json"]) == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["skill"]
    assert main(["adapters", "show", "skill@1"]) == 0
    out = capsys.readouterr().out
    assert "sha256:" in out
    assert "do it" in out
    assert main(["adapters", "show", "skill", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert main(["adapters", "rm", "skill"]) == 0
    assert "skill is deleted" in capsys.readouterr().out
    assert server.store.list().data == []


def test_refusals(server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "show", "nope"]) == 1
    assert main(["adapters", "rm", "../x"]) == 1
    assert main(["adapters", "push", "Bad Name", directory(tmp_path / "a")]) == 1
    err = capsys.readouterr().err
    assert "nope" in err
    assert "Traceback" not in err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["adapters", "push", "skill", str(empty)]) == 2
    (empty / "adapter_model.bin").write_bytes(b"x")
    assert main(["adapters", "push", "skill", str(empty)]) == 2
    assert "safe_serialization" in capsys.readouterr().err


def test_servers_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "ls", "--url", "http://127.0.0.1:9"]) == 3
    assert "loramux serve" in capsys.readouterr().err
    assert main(["adapters", "ls", "--url", "localhost:8000"]) == 2
    assert "http://" in capsys.readouterr().err


def test_key(live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = live(api_key=["right"])
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    assert main(["adapters", "ls", "--url", bench.url]) == 1
    assert "API key" in capsys.readouterr().err
    assert main(["adapters", "ls", "--url", bench.url + "/v1/", "--api-key", "right"]) == 0
    monkeypatch.setenv("LORAMUX_API_KEY", "right,other")
    assert main(["adapters", "ls", "--url", bench.url]) == 0


def test_pin_and_unpin(server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "push", "skill", directory(tmp_path / "a"), "--pin"]) == 0
    assert ", pinned" in capsys.readouterr().out
    assert main(["adapters", "ls"]) == 0
    assert "skill *" in capsys.readouterr().out
    assert main(["adapters", "unpin", "skill"]) == 0
    assert capsys.readouterr().out == "skill@1 is not pinned\n"
    assert main(["adapters", "pin", "skill", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pinned"] is True
    assert [pinned for _, pinned in server.engine.pins] == [True, False, True]
    assert main(["adapters", "pin", "nope"]) == 1


def test_which_and_in_what_order(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("sql-a", "sql-b", "talk")):
        server.put(name, seed)
    server.put("sql-b", 9)

    def listed(*flags: str) -> list[str]:
        assert main(["adapters", "ls", "--json", *flags]) == 0
        return [item["name"] for item in json.loads(capsys.readouterr().out)]

    assert listed("sql-*") == ["sql-a", "sql-b"]
    assert listed("--sort", "version")[0] == "sql-b"
    assert listed("nothing") == []
    for sort in ("name", "bytes", "rank", "created", "tier"):
        assert sorted(listed("--sort", sort)) == ["sql-a", "sql-b", "talk"]


def test_texts_from_elsewhere_steer_no_terminal(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    server.put("skill", description="\x1b[2Jgone\x07 [red]x[/red]\nnext", examples=["\x9b31m"])
    assert main(["adapters", "ls"]) == 0
    assert main(["adapters", "show", "skill"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "\\x1b[2Jgone\\x07 [red]x[/red] next" in out


def test_pages(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        server.put(f"a{number}")
    assert main(["adapters", "ls", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAMUX_")}
    return subprocess.run(
        [sys.executable, "-m", "loramux.server.cli", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_a_reader_that_goes_away(server: Bench) -> None:
    """As in `loramux adapters ls | head -1`: quiet, whatever there was to say."""
    for number in range(40):
        server.put(f"a{number}", description="x" * 4000)
    for flags in ([], ["--json"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "loramux.server.cli", "adapters", "ls", *flags], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "LORAMUX_URL": server.url},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
        process.stderr.close()


def test_a_pipe_gets_whole_lines_without_colours(server: Bench) -> None:
    server.put("skill", description="word " * 100)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "loramux.server.cli", "adapters", "ls"], capture_output=True, text=True, timeout=60,
        env={**environment, "LORAMUX_URL": server.url},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "\x1b" not in done.stdout
    assert lines[1].split()[6:] == ["word"] * 100


def test_commands_that_talk_to_a_server_start_without_torch() -> None:
    code = "import sys, loramux.server.cli as cli; cli._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_command_has_examples() -> None:
    for command in (["adapters"], ["adapters", "push"], ["adapters", "pin"], ["chat"], ["bench"], []):
        helped = run(*command, "--help")
        assert helped.returncode == 0
        assert "examples:" in helped.stdout
        assert "exit status:" in helped.stdout


def test_version_and_usage() -> None:
    assert run("--version").stdout.strip() == f"loramux {__version__}"
    assert run().returncode == 2
    helped = run("serve", "--help")
    assert helped.returncode == 0
    assert "LORAMUX_KV_CACHE_BYTES" in helped.stdout


def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    wrong = run("serve", "--port", "x", "--dtype", "int4")
    assert wrong.returncode == 2
    assert "--port" in wrong.stderr
    assert "--dtype" in wrong.stderr
    missing = run("serve", "--model", str(tmp_path / "none"), "--store-dir", str(tmp_path))
    assert missing.returncode == 1
    assert "no such directory" in missing.stderr
    assert "Traceback" not in missing.stderr + wrong.stderr
