"""`loramux chat`: one answer for a script, a conversation for a person."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, Bench, saying

from loramux.server.cli import main
from loramux.server.cli_chat import Conversation, weighted
from loramux.server.cli_client import Api, CommandError
from loramux.server.cli_output import output
from loramux.server.cli_repl import COMMANDS, Repl


@pytest.fixture
def server(live: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A live server with two adapters, which the commands find by its variable."""
    bench = live()
    for seed, name in enumerate(("skill", "other")):
        bench.put(name, seed)
    monkeypatch.setenv("LORAMUX_URL", bench.url)
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return bench


def last(bench: Bench) -> tuple[str, str]:
    """The last prompt that reached the engine, as text, and the adapters of it."""
    request = bench.engine.requests[-1]
    return bytes(i for i in request.prompt_token_ids if i < 256).decode(), str(request.adapters)


def test_one_answer(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-m", "skill", "-s", "Be kind.", "hello?"]) == 0
    assert capsys.readouterr() == ("hello\n", "")
    assert last(server)[0] == "Be kind.hello?"
    assert main(["chat", "--stats", "--temperature", "0", "--max-tokens", "3", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "hel\n"
    assert err.startswith("the base · 3 tokens · first after ")
    assert "ended by length" in err
    assert server.engine.requests[-1].sampling.temperature == 0
    assert main(["chat", "--no-stream", "--stop", "l", "hi"]) == 0
    assert capsys.readouterr().out == "he\n"


def test_what_comes_from_a_pipe(
    server: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the text\n"))
    assert main(["chat", "Read this:"]) == 0
    assert last(server)[0] == "Read this:\n\nthe text\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["chat"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_fusion(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-a", "skill=0.7", "-a", "other=0.3", "--stats", "hi"]) == 0
    assert "skill@1 x 0.7, other@1 x 0.3" in capsys.readouterr().err
    assert main(["chat", "-a", "skill", "-m", "other", "hi"]) == 2
    for wrong in ("=1", "skill=", "skill=much"):
        with pytest.raises(SystemExit) as end:
            main(["chat", "-a", wrong, "hi"])
        assert end.value.code == 2
        assert "reverse=0.7" in capsys.readouterr().err
    assert weighted("a") == {"name": "a", "weight": 1.0}


def test_the_whole_answer_as_json(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--json", "-m", "skill@1", "hi"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["loramux"]["adapters"][0]["name"] == "skill"


def test_failures_end_with_a_word(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-m", "nobody", "hi"]) == 1
    assert "nobody" in capsys.readouterr().err
    server.engine.script = lambda request: [[104], RuntimeError("inside")]
    assert main(["chat", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "h\n"
    assert err.startswith("loramux: ")
    assert "Traceback" not in err
    assert main(["chat", "hi", "--url", "http://127.0.0.1:9"]) == 3


def test_control_characters_stay_in_a_pipe_and_never_reach_a_terminal(
    server: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    server.engine.script = saying("\x1b]0;owned\x07red")
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr().out == "\x1b]0;owned\x07red\n"
    console = output()
    console._force_terminal = True
    repl = conversation(server, console, [])
    repl.take("hi")
    assert "\\x1b]0;owned\\x07red" in capsys.readouterr().out


def conversation(bench: Bench, console: Any, lines: list[Any]) -> Repl:
    """A conversation in which these lines are typed; an exception among them is raised."""
    typed: Iterator[Any] = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return Repl(Api(bench.url, None), Conversation(BASE, BASE), console, read=read)


def test_a_conversation(server: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    conversation(
        server, output(),
        ["one", "/model skill", "two \\", "lines", KeyboardInterrupt(), "/undo", "/system Be kind.",
         "/set temperature 0.5", "/fuse skill=0.5 other", "three", f"/save {file}", "/set temperature default",
         "/clear", "/model other", "four", "/quit", "never"],
    ).run()  # fmt: skip
    prompts = [bytes(i for i in r.prompt_token_ids if i < 256).decode() for r in server.engine.requests]
    assert prompts == ["one", "onehellotwo \nlines", "Be kind.onehellothree", "Be kind.four"]
    assert server.engine.requests[2].sampling.temperature == 0.5
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved["messages"]] == ["Be kind.", "one", "hello", "three", "hello"]
    assert saved["adapters"] == [{"name": "skill", "weight": 0.5}, {"name": "other", "weight": 1.0}]
    out = capsys.readouterr().out
    assert out.count("hello\n") == 4
    assert "skill@1 x 0.5, other@1" in out


def test_mistakes_do_not_end_a_conversation(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        "/nope", "/model", "/fuse", "/fuse =1", "/set heat 3", "/set temperature hot", "/retry", "/save",
        "/save /no/such/x", "/model nobody", "hi", '/model "open', "/model skill", "again", "/retry", "/help",
        "/models ski", "/set",
    ]  # fmt: skip
    conversation(server, output(), wrong).run()
    out = capsys.readouterr().out
    assert len(server.engine.requests) == 2
    assert last(server)[0] == "again"
    assert "there is no /nope" in out
    assert "nothing has been asked yet" in out
    assert "does not exist" in out
    assert all(usage in out for _, usage, _ in COMMANDS.values())
    assert f"skill  over {BASE}" in out


def test_an_answer_can_be_stopped(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def script(request: Any) -> Iterator[Any]:
        yield [104]
        yield [105]
        yield 600.0

    server.engine.script = script
    repl = conversation(server, output(), [])
    seen: list[str] = []

    class Stdout(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(text)
            if "".join(seen).endswith("hi"):
                raise KeyboardInterrupt
            return len(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", Stdout())
        repl.take("go")
    assert repl._talk.messages[-1] == {"role": "assistant", "content": "hi"}


def test_a_server_that_streams_nothing_or_nonsense(live: Callable[..., Bench]) -> None:
    import httpx

    from loramux.server.cli_chat import Reply, stream

    def api(content: bytes, kind: str = "text/event-stream") -> Api:
        answer = httpx.Response(200, content=content, headers={"content-type": kind})
        return Api("http://server", None, httpx.MockTransport(lambda request: answer))

    for content, words in (
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "cut off"),
        (b"data: {\n\n", "no chunk"),
        (b'data: {"error": {"message": "broke"}}\n\n', "broke"),
    ):
        with pytest.raises(CommandError, match=words):
            stream(api(content), {}, Reply(), lambda text: None)
    with pytest.raises(CommandError, match="--no-stream"):
        stream(api(b"{}", "application/json"), {}, Reply(), lambda text: None)


def test_a_real_terminal(server: Bench) -> None:
    """Typed at a pseudo-terminal: the prompt, the answer, the end."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "loramux.server.cli", "chat", "-m", "skill"], stdin=follower, stdout=follower,
        stderr=follower, env={**os.environ, "LORAMUX_URL": server.url, "TERM": "dumb", "INPUTRC": "/dev/null"},
    )  # fmt: skip
    os.close(follower)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            piece = os.read(leader, 4096)
            assert piece, seen
            seen += piece

    until(b"skill> ")
    os.write(leader, b"hi\n")
    until(b"skill@1")
    assert b"hello" in seen
    os.write(leader, b"/quit\n")
    assert process.wait(30) == 0
    os.close(leader)
