"""Runs against fake servers: what is sent, what is counted, what is printed, and what is refused."""

import ast
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loramux.server.bench import http_client, latency, load, openai_stream, workload

SMALL = ["--input", "2:5", "--output", "2:4", "--warmup", "0", "--base", "base", "--rate", "0"]


def run(serve: Any, capsys: pytest.CaptureFixture[str], url: str, *options: str) -> tuple[int, Any, str, str]:
    """Exit status, the JSON line, the text before it, and standard error of a run."""
    status = serve.main(["--url", url, *SMALL, *options])
    out, err = capsys.readouterr()
    text, _, line = out.rstrip("\n").rpartition("\n")
    return status, json.loads(line), text, err


def test_the_trace_arrives_at_the_server(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    with fake(wire.answer) as server:
        options = [
            "--adapters", "lora-{i}", "--num-adapters", "4", "--requests", "12", "--concurrency", "3", "--ignore-eos",
            "--api-key", "sesame", "--extra-body", '{"top_k": 1, "temperature": null}', "--slo-ttft", "600",
        ]  # fmt: skip
        status, result, text, _ = run(serve, capsys, server.url + "/v1/", *options)
        asked = server.asked
    trace = workload.generate(workload.Workload(12, 4, rate=0.0, input=(2, 5), output=(2, 4)))
    assert status == 0
    assert sorted(a.body for a in asked) == sorted(
        json.dumps({
            "model": f"lora-{r.adapter}", "max_tokens": r.output_tokens, "stream": True,
            "stream_options": {"include_usage": True}, "prompt": workload.prompt_ids(42, r, 100, 10000),
            "ignore_eos": True, "top_k": 1,
        }).encode()
        for r in trace
    )  # fmt: skip
    assert {a.line for a in asked} == {"POST /v1/completions HTTP/1.1"}
    assert {a.headers["authorization"] for a in asked} == {"Bearer sesame"}
    measured = result["measured"]
    assert measured["requests"] == {
        "planned": 12, "sent": 12, "completed": 12, "failed": 0, "unfinished": 0, "without_text": 0, "without_usage": 0,
    }  # fmt: skip
    assert measured["output_tokens"] == sum(r.output_tokens for r in trace)
    assert measured["prompt_tokens"] == sum(r.input_tokens for r in trace)
    assert measured["itl_seconds"]["count"] == sum(r.output_tokens - 1 for r in trace)
    assert {name: row["requests"] for name, row in measured["adapters"].items()} == {
        f"lora-{a}": sum(r.adapter == a for r in trace) for a in {r.adapter for r in trace}
    }
    assert measured["ttft_cold_seconds"]["count"] == len({r.adapter for r in trace})
    assert measured["slo"] == {"ttft_seconds": 600.0, "attained": 12, "attainment": 1.0}
    assert result["base"] == "base"
    assert "sesame" not in json.dumps(result) + text
    assert result["options"]["requests"] == 12
    assert [row.split()[0] for row in text.splitlines()[-len(measured["adapters"]) :]] == sorted(
        measured["adapters"], key=lambda name: (-measured["adapters"][name]["requests"], name)
    )


def test_concurrency_bounds_what_is_in_flight(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    flying: set[Any] = set()
    most = []
    two = asyncio.Event()

    async def slow(asked: Any, writer: asyncio.StreamWriter) -> None:
        flying.add(writer)
        most.append(len(flying))
        if len(flying) == 2:
            two.set()
        await two.wait()
        await asyncio.sleep(0.01)  # a third would come now
        flying.remove(writer)
        await wire.answer(asked, writer)

    with fake(slow) as server:
        status, result, _, _ = run(serve, capsys, server.url, "--requests", "9", "--concurrency", "2")
    assert (status, max(most)) == (0, 2)
    assert result["measured"]["adapters"].keys() == {"base"}


def test_failures_are_counted_by_kind(serve: Any, fake: Any, wire: Any, capsys: Any, tmp_path: Path) -> None:
    async def picky(asked: Any, writer: asyncio.StreamWriter) -> None:
        if asked.fields["model"] == "a-0":
            await wire.answer(asked, writer)
        elif asked.fields["model"] == "a-1":
            body = b'{"error": {"message": "the model a-1 does not exist"}}'
            writer.write(b"HTTP/1.1 404 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            writer.write(wire.HEAD + wire.chunk(wire.text_event("x")) + b"0\r\n\r\n")

    out = tmp_path / "results" / "serve.json"
    options = ["--adapters", "a-{i}", "--num-adapters", "3", "--mix", "distinct", "--requests", "6"]
    options += ["--out", str(out), "--slo-ttft", "600"]
    with fake(picky) as server:
        status, result, text, _ = run(serve, capsys, server.url, *options)
    measured = result["measured"]
    assert status == 1
    assert measured["requests"]["completed"] == 2
    assert measured["requests"]["failed"] == 4
    assert measured["errors"] == {
        "HTTP 404": {"count": 2, "first": "the model a-1 does not exist"},
        "cut off: no finish_reason": {"count": 2, "first": ""},
    }
    assert {name: row["failed"] for name, row in measured["adapters"].items()} == {"a-0": 0, "a-1": 2, "a-2": 2}
    assert measured["slo"]["attainment"] == pytest.approx(1 / 3)
    assert measured["fairness"]["jain_output_tokens"] == pytest.approx(1 / 3)
    assert "HTTP 404" in text
    assert json.loads(out.read_text()) == result


def test_interrupted_runs_say_what_was_measured(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    seen = []

    async def handler(asked: Any, writer: asyncio.StreamWriter) -> None:
        seen.append(asked)
        if len(seen) < 3:
            await wire.answer(asked, writer)
            return
        writer.write(wire.HEAD + wire.chunk(wire.text_event("x")))
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    with fake(handler) as server:
        status, result, text, _ = run(serve, capsys, server.url, "--requests", "8", "--concurrency", "1")
    counts = result["measured"]["requests"]
    assert (status, result["measured"]["interrupted"]) == (130, True)
    assert (counts["planned"], counts["sent"], counts["completed"], counts["failed"]) == (8, 3, 2, 0)
    assert counts["unfinished"] == 1
    assert "2 / 3 / 8" in text


def test_no_request_is_sent_after_the_duration(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    async def slow(asked: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        await wire.answer(asked, writer)

    options = ["--requests", "500", "--duration", "1", "--concurrency", "1"]
    with fake(slow) as server:
        status, result, _, _ = run(serve, capsys, server.url, *options)
    counts = result["measured"]["requests"]
    assert status == 0
    assert 1 <= counts["sent"] == counts["completed"] < counts["planned"] == 500


def test_warm_up_goes_to_the_base_and_is_not_counted(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    options = ["--adapters", "a-{i}", "--num-adapters", "2", "--requests", "4", "--warmup", "2"]
    with fake(wire.answer) as server:
        status, result, _, _ = run(serve, capsys, server.url, *options)
        assert [a.fields["model"] for a in server.asked[:2]] == ["base", "base"]
        assert len({json.dumps(a.fields["prompt"]) for a in server.asked}) == 6
    assert (status, result["measured"]["requests"]["sent"]) == (0, 4)


def test_a_server_that_fails_the_whole_warm_up_is_not_measured(serve: Any, fake: Any, capsys: Any) -> None:
    async def broken(asked: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops")

    with fake(broken) as server:
        assert serve.main(["--url", server.url, *SMALL, "--requests", "5", "--warmup", "2"]) == 1
        assert len(server.asked) == 2
    assert "HTTP 500 oops" in capsys.readouterr().err


def test_names_from_the_servers_list(serve: Any, fake: Any, wire: Any, capsys: Any) -> None:
    models = [{"id": "b", "parent": None}, {"id": "x", "parent": "b"}, {"id": "y", "parent": "b"}]

    async def handler(asked: Any, writer: asyncio.StreamWriter) -> None:
        if asked.line.startswith("GET"):
            body = json.dumps({"object": "list", "data": models}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            await wire.answer(asked, writer)

    with fake(handler) as server:
        options = ["--url", server.url, "--adapters-from-models", "--mix", "distinct", "--rate", "0", "--requests", "4"]
        assert serve.main([*options, "--output", "1:3", "--warmup", "1"]) == 0
        assert [a.line.split()[1] for a in server.asked[:1]] == ["/v1/models"]
        assert server.asked[1].fields["model"] == "b"
        assert sorted(a.fields["model"] for a in server.asked[2:]) == ["x", "x", "y", "y"]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["base"] == "b"
    assert {name: row["requests"] for name, row in result["measured"]["adapters"].items()} == {"x": 2, "y": 2}


def test_splitting_a_list_of_models() -> None:
    flat = [{"id": "base"}, {"id": "x"}]
    assert load.names_in(flat, None) == ("base", ["x"])
    assert load.names_in(flat, "x") == ("x", ["base"])
    nested = [{"id": "x", "parent": "base"}, {"id": "alias", "parent": None}, {"id": "base", "parent": None}]
    assert load.names_in(nested, "base") == ("base", ["x"])
    assert load.names_in(nested, None) == ("alias", ["x"])
    with pytest.raises(ValueError, match="--base"):
        load.names_in([{"id": "x", "parent": "base"}], None)


def test_choosing_names(serve: Any, tmp_path: Path) -> None:
    def choose(*options: str) -> Any:
        return load.choose_names(serve.parse(options), ["p", "q"])

    file = tmp_path / "names"
    file.write_text("one\n\n two \nthree\n")
    assert choose("--adapters", "m:{i}{i}", "--num-adapters", "2") == ["m:00", "m:11"]
    assert choose("--adapters", str(file)) == ["one", "two", "three"]
    assert choose("--adapters", str(file), "--num-adapters", "2") == ["one", "two"]
    assert choose("--adapters-from-models") == ["p", "q"]
    assert choose() == choose("--adapters-from-models", "--num-adapters", "0") == []
    for wrong in (["--adapters", "m{i}"], ["--adapters", "no such file"], ["--num-adapters", "1"],
                  ["--adapters", str(file), "--num-adapters", "4"]):  # fmt: skip
        with pytest.raises(ValueError, match="--"):
            choose(*wrong)


def test_words_for_chat_and_for_servers_without_token_ids(serve: Any) -> None:
    trace = workload.generate(workload.Workload(2, 0, rate=0.0))
    for options, field in ((["--endpoint", "chat"], "messages"), (["--prompt-tokens", "words"], "prompt")):
        calls = load.make_calls(serve.parse([*options, "--requests", "2"]), trace, "m", [])
        value = json.loads(calls[1].body)[field]
        text = value if field == "prompt" else value[0]["content"]
        assert text == workload.prompt_words(42, trace[1])
        assert calls[1].path == ("/v1/chat/completions" if field == "messages" else "/v1/completions")


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--duration", "0"],
        ["--extra-body", "[1]"],
        ["--extra-body", "{"],
        ["--concurrency", "-1"],
        ["--num-adapters", "-1"],
        ["--timeout", "0"],
        ["--token-ids", "5:5"],
        ["--input", "8"],
        ["--adapters", "x{i}", "--adapters-from-models"],
    ],
)
def test_options_that_cannot_be(serve: Any, capsys: Any, options: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serve.main(options)
    assert end.value.code == 2


@pytest.mark.parametrize("options", [["--cv", "0"], ["--input", "9:3"], ["--requests", "0"], ["--alpha", "-1"]])
def test_traces_that_cannot_be(serve: Any, capsys: Any, options: list[str]) -> None:
    assert serve.main(["--base", "b", *options]) == 2
    assert options[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    ["http://192.0.2.7:80", "http://0.0.0.0:80", "http://[2001:db8::1]/v1", "http://[::ffff:192.0.2.1]:80"],
)
def test_other_machines_are_refused(serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, url: str) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("no connection may be tried")

    monkeypatch.setattr(socket, "create_connection", never)
    assert serve.main(["--url", url, "--base", "b"]) == 2
    assert "--allow-remote" in capsys.readouterr().err


def test_a_name_that_also_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0, 0, 0, "", ("127.0.0.1", 80)), (0, 0, 0, "", ("192.0.2.7", 80))]
    tried = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(address: Any, **_: Any) -> Connection:
        tried.append(address)
        return Connection()

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match=r"192\.0\.2\.7"):
        http_client.find_target("http://both.example")
    assert tried == []
    target = http_client.find_target("https://both.example/x/v1", allow_remote=True)
    assert (target.host, target.port, target.address, target.prefix) == ("both.example", 443, "127.0.0.1", "/x")
    assert tried == [("127.0.0.1", 443)]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://u:p@127.0.0.1", "http://127.0.0.1/?a=1",
            "http://127.0.0.1:port"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|Port"):
        http_client.find_target(url)


def test_a_key_cannot_add_headers() -> None:
    with pytest.raises(ValueError, match="key"):
        http_client.find_target("http://127.0.0.1:1", api_key="a\r\nX: y")


def test_a_bare_image_has_all_that_is_imported(scripts: Any) -> None:
    package = Path(load.__file__).parent
    for path in [*package.glob("*.py"), *(Path(module.__file__) for module in vars(scripts).values())]:
        tree = ast.parse(path.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {n.name for node in nodes if isinstance(node, ast.Import) for n in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        optional = {"torch"} if path.name == "report.py" else set()
        allowed = sys.stdlib_module_names | {"numpy"} | optional | vars(scripts).keys()
        own = {name for name in names if re.match(r"loramux\.server\.bench(\.|$)", name)}
        assert {name.partition(".")[0] for name in names - own} <= allowed, path.name


def test_a_run_needs_no_torch(serve: Any, fake: Any, wire: Any) -> None:
    code = "import sys; sys.modules['torch'] = None; import serve; sys.exit(serve.main())"
    with fake(wire.answer) as server:
        command = [sys.executable, "-c", code, "--url", server.url, *SMALL, "--requests", "2"]
        done = subprocess.run(command, cwd=Path(serve.__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["measured"]["requests"]["completed"] == 2
    assert (result["environment"]["threads"], result["environment"]["card"]) == (None, None)


def test_percentiles_are_numpys() -> None:
    values = np.random.RandomState(0).exponential(size=101).tolist()
    for n in (1, 2, 7, 101):
        found = latency.spread(values[:n])
        assert found["count"] == n
        for q in (50, 90, 99):
            assert found[f"p{q}"] == pytest.approx(np.percentile(values[:n], q))
        assert (found["mean"], found["max"]) == (pytest.approx(np.mean(values[:n])), max(values[:n]))
    assert set(latency.spread([]).values()) == {0, None}


def test_jains_index() -> None:
    assert latency.jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert latency.jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert latency.jain([1.0, 3.0]) == pytest.approx(16 / 20)
    assert latency.jain([]) is latency.jain([0.0]) is None


def outcome(adapter: str, sent: float, *times: float, **more: Any) -> Any:
    """A completed request unless told otherwise."""
    given = {"times": list(times), "finish_reason": "length", "ended": times[-1] if times else None, **more}
    return openai_stream.Outcome(openai_stream.Call(0.0, adapter, "", b""), due=sent, sent=sent, **given)


def test_cold_joined_and_warm_uses() -> None:
    first, second, third = (
        outcome("a", 0.0, 2.0), outcome("a", 1.0, 2.5), outcome("a", 2.0, 2.1),
    )  # fmt: skip
    other, silent = outcome("b", 1.5, error="timeout", ended=9.0), outcome("b", 8.0, 8.5)
    uses = latency.by_use([first, second, other, third, silent])
    assert uses == {"cold": [first, other], "joined": [second, silent], "warm": [third]}


def test_the_summary_of_known_outcomes() -> None:
    run = latency.Run([], seconds=10.0, cpu_seconds=1.0)
    run.outcomes = [
        outcome("a", 0.0, 1.0, 2.0, 4.0, usage_tokens=4, prompt_tokens=7),
        outcome("b", 1.0, 8.0, usage_tokens=1, prompt_tokens=3),
        outcome("b", 2.0, 2.5, ended=3.0, error="timeout"),
        outcome("b", 3.0),
    ]
    result = latency.summarise(run, slo_ttft=6.0)
    assert result["requests"] == {
        "planned": 0, "sent": 4, "completed": 2, "failed": 1, "unfinished": 1, "without_text": 0, "without_usage": 0,
    }  # fmt: skip
    assert (result["output_tokens"], result["prompt_tokens"]) == (5, 10)
    assert (result["requests_per_second"], result["output_tokens_per_second"]) == (0.2, 0.5)
    assert (result["ttft_seconds"]["mean"], result["ttft_seconds"]["max"]) == (4.0, 7.0)
    assert (result["itl_seconds"]["count"], result["itl_seconds"]["mean"]) == (2, 1.5)
    assert (result["tpot_seconds"]["count"], result["tpot_seconds"]["mean"]) == (1, 1.0)
    assert result["e2e_seconds"]["mean"] == 5.5
    assert result["slo"] == {"ttft_seconds": 6.0, "attained": 1, "attainment": pytest.approx(1 / 3)}
    speeds = [4 / 4.0, (1 / 7.0 + 0) / 2]
    assert result["fairness"]["jain_tokens_per_second"] == pytest.approx(latency.jain(speeds))
    assert result["adapters"]["b"]["failed"] == 1
    assert result["client"]["cpu_share"] == 0.1
    assert "1 more in the JSON" in latency.tables(result, 1)


def test_notes_warn_about_numbers_that_say_less() -> None:
    run = latency.Run([], seconds=1.0, cpu_seconds=0.9)
    run.outcomes = [outcome("a", 5.0, ended=6.0)]
    run.outcomes[0].due = 1.0
    assert len(latency.notes(latency.summarise(run, 6.0), rate=1.0)) == 4
    assert len(latency.notes(latency.summarise(run, 6.0), rate=0.0)) == 3
    assert latency.notes(latency.summarise(latency.Run([]), 6.0), rate=1.0) == []
