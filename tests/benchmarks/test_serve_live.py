"""The workload against a real server of a tiny model with three adapters: counts and fields, never times."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live import LiveServer, live_server
from support.models import family_config, mixed_recipes, random_model, save_adapter, save_model

from loramux.server.bench import workload

NAMES = ["lora-0", "lora-1", "lora-2"]
VOCABULARY = 262


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("live")
    model = random_model(family_config("llama", vocab_size=VOCABULARY))
    save_model(model, root / "base", tokenizer=True)
    recipes = mixed_recipes(model)[: len(NAMES)]
    with live_server(root, "--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8") as running:
        for name, recipe in zip(NAMES, recipes, strict=True):
            assert running.upload(name, save_adapter(model, recipe, root / "adapters")).status_code == 201
        yield running


def measure(serve: Any, capsys: pytest.CaptureFixture[str], server: LiveServer, *options: str) -> tuple[int, Any, str]:
    shape = ["--url", server.url, "--requests", "12", "--input", "4:9", "--output", "2:6", "--ignore-eos"]
    status = serve.main([*shape, "--token-ids", f"3:{VOCABULARY - 3}", *options])
    text, _, line = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return status, json.loads(line), text


def test_completions_by_rate(serve: Any, server: LiveServer, capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    options = ["--adapters", "lora-{i}", "--num-adapters", "3", "--rate", "50", "--cv", "2", "--return-token-ids"]
    status, result, text = measure(serve, capsys, server, *options, "--out", str(out))
    trace = workload.generate(workload.Workload(12, 3, rate=50.0, cv=2.0, input=(4, 9), output=(2, 6)))
    measured = result["measured"]
    assert status == 0, measured["errors"]
    assert measured["requests"] == {
        "planned": 12, "sent": 12, "completed": 12, "failed": 0, "unfinished": 0, "without_text": 0, "without_usage": 0,
    }  # fmt: skip
    assert measured["prompt_tokens"] == sum(r.input_tokens for r in trace)
    assert measured["output_tokens"] == sum(r.output_tokens for r in trace)
    assert {name: row["requests"] for name, row in measured["adapters"].items()} == Counter(
        NAMES[r.adapter] for r in trace
    )
    assert {name: row["output_tokens"] for name, row in measured["adapters"].items()} == {
        name: sum(r.output_tokens for r in trace if NAMES[r.adapter] == name) for name in measured["adapters"]
    }
    uses = [measured[f"ttft_{use}_seconds"]["count"] for use in ("cold", "joined", "warm")]
    assert (uses[0], sum(uses)) == (len(measured["adapters"]), 12)
    assert measured["ttft_seconds"]["count"] == measured["e2e_seconds"]["count"] == 12
    assert measured["errors"] == {}
    assert 0 < measured["fairness"]["jain_output_tokens"] <= 1
    assert result["environment"]["packages"]["torch"]
    assert json.loads(out.read_text()) == result
    assert all(name in text for name in measured["adapters"])
    assert server.metrics()  # the server is well


def test_chat_at_once_with_the_servers_own_names(serve: Any, server: LiveServer, capsys: Any) -> None:
    options = ["--endpoint", "chat", "--adapters-from-models", "--rate", "0", "--concurrency", "4", "--mix", "distinct"]
    status, result, _ = measure(serve, capsys, server, *options)
    measured = result["measured"]
    assert status == 0, measured["errors"]
    assert result["base"] == "base"
    assert {name: row["requests"] for name, row in measured["adapters"].items()} == dict.fromkeys(NAMES, 4)
    assert measured["requests"]["completed"] == 12


def test_an_adapter_that_is_not_there(serve: Any, server: LiveServer, capsys: Any) -> None:
    options = ["--adapters", "lora-{i}", "--num-adapters", "4", "--mix", "distinct", "--rate", "0", "--warmup", "0"]
    status, result, _ = measure(serve, capsys, server, *options)
    errors = result["measured"]["errors"]
    assert (status, errors["HTTP 404"]["count"], len(errors)) == (1, 3, 1)
    assert "lora-3" in errors["HTTP 404"]["first"]
    assert result["measured"]["adapters"]["lora-3"]["failed"] == 3
