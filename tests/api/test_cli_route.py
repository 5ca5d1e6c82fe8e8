"""`loramux route`: one text, a file of queries, and training without a server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api.harness import BASE, Bench, adapter_files, listening, make_bench, parts
from api.test_routing import NOBODYS, QUERY, SPELL, SUM, TALK
from safetensors import SafetensorError
from support.encoders import save_encoder

from loramux.router import artifacts
from loramux.router.encoders.huggingface import HuggingFaceEncoder
from loramux.router.scores.routerdc import RouterDC
from loramux.server.api.auto import offline
from loramux.server.api.auto.parts import prepare
from loramux.server.cli import main
from loramux.server.demo.assets import demo_base_path
from loramux.server.settings import load_settings


@pytest.fixture(autouse=True)
def _plain_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands configure logging for their process; a test's own capture stays."""
    monkeypatch.setattr("loramux.server.api.auto.offline.configure_logging", lambda level: None)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A live server with two skills, which the commands find by its variable."""
    with listening(make_bench(tmp_path, base_examples=TALK)) as bench:
        while not httpx.get(f"{bench.url}/v1/router").json()["rungs"]["examples"]["knows_base"]:
            time.sleep(0.01)
        for seed, (name, examples) in enumerate((("spell", SPELL), ("sum", SUM))):
            fields = {"name": name, "examples": json.dumps(examples)}
            response = httpx.post(f"{bench.url}/v1/adapters", data=fields, files=parts(adapter_files(seed)))
            assert response.headers["x-loramux-router"] == "ready"
        monkeypatch.setenv("LORAMUX_URL", bench.url)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
        yield bench


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_one_text(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", QUERY]) == 0
    out = capsys.readouterr().out
    assert "spell (1)" in out
    assert "rung examples" in out
    assert main(["route", "--json", "--top-k", "2", "--threshold", "-10", QUERY]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["scores"]] == ["spell", "sum"]
    assert main(["route", NOBODYS]) == 0
    assert "the base" in capsys.readouterr().out
    assert main(["route", "--candidate", "sum", "--threshold", "-10", QUERY]) == 0
    assert "sum (1)" in capsys.readouterr().out
    assert main(["route", "--top-k", "0", QUERY]) == 1
    assert "router.top_k" in capsys.readouterr().err
    assert main(["route", "--", "train"]) == 0


def test_a_file_of_queries(server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [
        {"query": QUERY, "adapter": "spell"},
        {"query": NOBODYS, "adapter": "base"},
        {"query": QUERY, "adapter": "sum"},
    ]
    scored = [{"query": QUERY, "scores": {"spell": 0.5, "sum": 1}}, {"query": NOBODYS, "scores": {"base": 1, "sum": 0}}]
    odd = [{"query": QUERY, "scores": {"sum": 1}}]
    assert main(["route", "eval", lines(tmp_path / "a.jsonl", [*named, *scored, *odd]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_adapter"]["sum"] == {"queries": 1, "accuracy": 0.0, "abstained": 0}
    assert (found["queries"], found["abstained"], found["scored"], found["without_score"]) == (6, 2, 2, 1)
    assert (found["mean_score"], found["share_of_oracle"]) == (0.5, 0.5)
    assert main(["route", "eval", lines(tmp_path / "b.jsonl", [*named, *scored])]) == 0
    out = capsys.readouterr().out
    assert "accuracy 66.7%" in out
    assert "75.0% of the oracle (0 of 2 choices have no score and count as 0)" in out


def test_choices_without_a_score_count_as_nothing(
    server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A router that leaves nearly all to the base, of which no score is known, is far from the oracle."""
    rows = [{"query": QUERY, "scores": {"spell": 1}}, *({"query": NOBODYS, "scores": {"spell": 1}} for _ in range(9))]
    assert main(["route", "eval", lines(tmp_path / "a.jsonl", rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["abstained"], found["scored"], found["without_score"]) == (9, 1, 9)
    assert (found["mean_score"], found["share_of_oracle"]) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_base_goes_by_its_names(server: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"query": NOBODYS, "adapter": BASE}, {"query": NOBODYS, "scores": {BASE: 0.5, "spell": 1}}]
    assert main(["route", "eval", lines(tmp_path / "a.jsonl", rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by_adapter"] == {"base": {"queries": 1, "accuracy": 1.0, "abstained": 1}}
    assert (found["accuracy"], found["without_score"], found["mean_score"]) == (1.0, 0, 0.5)


@pytest.mark.parametrize(
    "row",
    ["{", "[]", {"query": 3, "adapter": "a"}, {"query": "a"}, {"query": "a", "scores": {"b": "c"}}, {"adapter": "a"}],
)
def test_wrong_lines_are_named(server: Bench, tmp_path: Path, row: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "eval", lines(tmp_path / "a.jsonl", [{"query": "a", "adapter": "spell"}, row])]) == 2
    assert "line 2" in capsys.readouterr().err
    assert main(["route", "eval", str(tmp_path / "none.jsonl")]) == 2


@pytest.fixture
def scores(tmp_path: Path) -> str:
    rows: list[Any] = [{"query": q, "scores": {"reverse": 1, "add-ten": 0, "base": 0.5}} for q in SPELL]
    rows += [{"query": q, "scores": {"reverse": 0, "add-ten": 1, "base": 0.5}} for q in SUM]
    return lines(tmp_path / "scores.jsonl", rows)


def test_training_is_deterministic(tmp_path: Path, scores: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        flags = ["--router-encoder", "ngram", "--store-dir", str(tmp_path / "store"), "--json"]
        assert main(["route", "train", scores, "--out", str(tmp_path / name), "--seed", "4", *flags]) == 0
        made = json.loads(capsys.readouterr().out)
        assert (made["version"], made["rows"], made["folder"]) == (1, 16, str(tmp_path / name))
    files = [sorted((tmp_path / name / "v000001").iterdir()) for name in ("one", "two")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    artifact = artifacts.load(tmp_path / "one")
    assert set(artifact.scorer.candidates) == {"", "add-ten", "reverse"}


def test_training_says_what_is_wrong(tmp_path: Path, scores: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store-dir", str(tmp_path / "store")]
    few = lines(tmp_path / "few.jsonl", [{"query": "a", "scores": {"b": 1}}])
    for flags, words in (
        ([few, "--router-encoder", "ngram"], "too few"),
        ([lines(tmp_path / "bad.jsonl", ["{"]), "--router-encoder", "ngram"], "line 1"),
        ([str(tmp_path / "none"), "--router-encoder", "ngram"], "none"),
        ([scores, "--router", "off"], "--router off"),
        ([scores, "--router-encoder", str(tmp_path)], "--router-encoder"),
        ([scores, "--router-layer", "99"], "--router-layer"),
    ):
        assert main(["route", "train", *flags, *store]) == 1, flags
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert main(["route", "train", scores, "--router", "maybe"]) == 2


def test_the_encoder_is_trained_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder it is written to is an encoder for a server, and the scorer is for that one."""
    source = save_encoder(tmp_path / "source", pooling="cls_token")
    rows = [
        {"query": f"w{i % 20 + 20 * (i % 2)} w{i * 7 % 20 + 20 * (i % 2)}", "scores": {"odd": i % 2, "even": 1 - i % 2}}
        for i in range(80)
    ]
    flags = ["--router-encoder", str(source), "--store-dir", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    command = ["route", "train", lines(tmp_path / "scores.jsonl", rows), *flags, "--fine-tune"]
    trained = tmp_path / "made" / "trained"
    assert main([*command, str(trained)]) == 0
    assert f"serve with --router-encoder {trained}" in capsys.readouterr().out
    settings = load_settings({"router_encoder": str(trained)})
    parts = prepare(settings, demo_base_path(), 4)
    assert parts is not None
    assert isinstance(parts.local, HuggingFaceEncoder)
    assert parts.local.pooling == "cls"
    artifact = artifacts.load(tmp_path / "out")
    artifact.check_encoder(parts.local.name, parts.local.dim)
    assert parts.local.name != HuggingFaceEncoder(source).name
    assert isinstance(artifact.scorer, RouterDC)
    assert artifact.scorer.projection is None
    assert artifact.scorer.candidates == ("even", "odd")
    assert 0 <= artifact.notes["compared"][0]["estimate"] <= 1
    monkeypatch.setattr(offline, "fine_tune_encoder", None)  # what follows is found before any training
    for more, words in (
        ([str(trained)], "there is something already"),
        ([str(tmp_path / "new"), "--router-encoder", "ngram"], "only a sentence encoder"),
        ([str(tmp_path / "new"), "--router-encoder", f"{source}+ngram"], "only a sentence encoder"),
        ([str(tmp_path / "scores.jsonl" / "new")], "cannot be written"),
    ):
        assert main([*command, *more]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("full", ["encoder", "scorer"])
def test_a_full_disk_leaves_no_encoder_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scores: str, full: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left") if full == "encoder" else OSError(28, "No space left")

    def untrained(encoder: HuggingFaceEncoder, *_: object, **__: object) -> tuple[RouterDC, float]:
        return RouterDC(("a", "b"), np.eye(2, encoder.dim, dtype=np.float32), None, 1.0), 0.5

    source = save_encoder(tmp_path / "source")
    monkeypatch.setattr(offline, "fine_tune_encoder", untrained)
    if full == "encoder":
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", refuse)
    else:
        monkeypatch.setattr(artifacts, "save", refuse)
    flags = ["--router-encoder", str(source), "--store-dir", str(tmp_path / "store")]
    assert main(["route", "train", scores, *flags, "--fine-tune", str(tmp_path / "made" / "trained")]) == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert ("--fine-tune" if full == "encoder" else "the scorer cannot be saved") in error
    assert list((tmp_path / "made").iterdir()) == []


def test_training_with_the_base(tmp_path: Path, scores: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The default encoder asks an engine; the version lands where a server of the same settings looks."""
    assert (demo_base_path() / "config.json").is_file()
    assert main(["route", "train", scores, "--store-dir", str(tmp_path / "store"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "store").glob("*/router/scorers")
    assert artifacts.versions(folder) == [1]
    assert "is version 1" in out
    assert artifacts.load(folder).encoder.startswith("joined-")
