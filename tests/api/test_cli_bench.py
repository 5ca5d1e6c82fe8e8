"""`loramux bench` against a live server, and how it says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from api.harness import BASE, Bench

from loramux.server.cli import main

SMALL = ["--rate", "0", "--requests", "6", "--concurrency", "2", "--input", "2:4", "--output", "2:4", "--warmup", "1"]
IDS = ["--token-ids", "0:200"]


@pytest.fixture
def server(live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = live()
    for seed, name in enumerate(("skill", "other")):
        bench.put(name, seed)
    monkeypatch.setenv("LORAMUX_URL", bench.url)
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    return bench


def test_a_report_per_adapter(server: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    flags = [*SMALL, *IDS, "--adapters-from-models", "--mix", "distinct", "--out", str(out)]
    assert main(["bench", *flags]) == 0
    text = capsys.readouterr().out
    assert "6 / 6 / 6" in text
    assert "skill" in text
    result = json.loads(out.read_text())
    assert result["base"] == BASE
    assert {name: row["requests"] for name, row in result["measured"]["adapters"].items()} == {"skill": 3, "other": 3}
    assert "api_key" not in result["options"]
    assert main(["bench", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["requests"]["completed"] == 6


def test_a_key_and_words(
    live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = live(api_key=["right"])
    monkeypatch.setenv("LORAMUX_URL", bench.url)
    monkeypatch.setenv("LORAMUX_API_KEY", "right")
    assert main(["bench", *SMALL, "--endpoint", "chat", "--json"]) == 0
    assert "right" not in capsys.readouterr().out
    monkeypatch.setenv("LORAMUX_API_KEY", "wrong")
    assert main(["bench", *SMALL, "--base", BASE]) == 1
    assert "HTTP 401" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--rate", "0"], 2, "--requests"),
        (["--alpha", "-1"], 2, "alpha"),
        (["--url", "http://127.0.0.1:9"], 3, "loramux serve"),
        (["--url", "127.0.0.1"], 2, "address"),
        (["--url", "http://192.0.2.1"], 2, "--allow-remote"),
        ([*SMALL, "--adapters-from-models", "--num-adapters", "9", *IDS], 2, "--num-adapters"),
        ([*SMALL], 1, "--prompt-tokens words"),
        ([*SMALL, *IDS, "--out", "/proc/none/x"], 2, "--out"),
    ],
)
def test_what_is_wrong(
    server: Bench, flags: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == status
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
