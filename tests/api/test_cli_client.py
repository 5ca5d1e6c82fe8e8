"""How the commands find a server, wait for a busy one, and repeat what broke."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.harness import adapter_files

from loramux.server.cli_adapters import push
from loramux.server.cli_client import (
    DEFAULT_URL,
    TRIES,
    UNREACHABLE,
    USAGE,
    Api,
    CommandError,
    Server,
    add_server_arguments,
    server_of,
)
from loramux.server.cli_output import output

ENVELOPE = {"error": {"message": "busy", "type": "server_error", "param": None, "code": "queue_full"}}


def found(environment: dict[str, str], *flags: str) -> Server:
    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    return server_of(parser.parse_args(flags), environment)


OWN = {"LORAMUX_URL": "http://own", "LORAMUX_API_KEY": "mine, other"}
FOREIGN = {"OPENAI_BASE_URL": "http://foreign/v1", "OPENAI_API_KEY": "theirs"}


@pytest.mark.parametrize(
    ("environment", "flags", "url", "key"),
    [
        ({}, [], DEFAULT_URL, None),
        (OWN, [], "http://own", "mine"),
        (FOREIGN, [], "http://foreign/v1", "theirs"),
        (OWN | FOREIGN, [], "http://own", "mine"),
        (OWN | FOREIGN, ["--url", "http://flag"], "http://flag", "mine"),
        (FOREIGN, ["--url", "http://flag"], "http://flag", None),
        (FOREIGN | {"LORAMUX_API_KEY": "mine"}, [], "http://foreign/v1", "theirs"),
        ({"LORAMUX_URL": "", "OPENAI_BASE_URL": ""}, [], DEFAULT_URL, None),
        (OWN, ["--api-key", "flag"], "http://own", "flag"),
        (FOREIGN, ["--api-key", "flag"], "http://foreign/v1", "flag"),
    ],
)
def test_which_server_and_which_key(environment: dict[str, str], flags: list[str], url: str, key: str | None) -> None:
    assert found(environment, *flags) == Server(url, key)


class Fake:
    """A server that answers from a list, and what it was sent."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []
        self.slept: list[float] = []
        self.said: list[str] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.read())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def api(self, key: str | None = None) -> Api:
        return Api(
            "http://server", key, httpx.MockTransport(self.handle), say=self.said.append, sleep=self.slept.append
        )


def busy(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=ENVELOPE, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_a_busy_server_is_asked_again_when_it_says_so() -> None:
    fake = Fake(busy(retry_after="3"), busy(429), httpx.Response(200, json={"ok": True}))
    assert fake.api().call("POST", "/x", json={"a": 1}) == {"ok": True}
    assert fake.slept == [3.0, 1.0]
    assert fake.bodies == [b'{"a":1}'] * 3
    assert "trying again in 3 s" in fake.said[0]


@pytest.mark.parametrize(
    "answers",
    [
        [busy(retry_after="1") for _ in range(TRIES)],
        [busy(retry_after="3600")],
        [busy(retry_after="-1")],
        [busy(429, retry_after="1", x_should_retry="false")],
        [busy(409)],
    ],
    ids=["always", "too long", "the past", "no use", "not busy"],
)
def test_waiting_has_an_end(answers: list[httpx.Response]) -> None:
    fake = Fake(*answers)
    with pytest.raises(CommandError, match="busy") as caught:
        fake.api().call("GET", "/x")
    assert caught.value.status == 1
    assert fake.answers == []


def test_a_broken_connection_is_tried_anew_only_where_that_is_safe() -> None:
    fake = Fake(httpx.ReadError("reset"), httpx.WriteError("pipe"), httpx.Response(200, json={}))
    assert fake.api().call("POST", "/x", resend=True) == {}
    assert len(fake.slept) == 2
    fake = Fake(httpx.ReadError("reset"))
    with pytest.raises(CommandError, match="reset") as caught:
        fake.api().call("POST", "/x")
    assert caught.value.status == UNREACHABLE
    fake = Fake(httpx.ConnectError("refused"))
    with pytest.raises(CommandError, match="loramux serve"):
        fake.api().call("POST", "/x", resend=True)


def test_words_for_a_missing_key() -> None:
    refused = httpx.Response(401, json={"error": {"message": "No API key provided."}})
    with pytest.raises(CommandError, match="LORAMUX_API_KEY"):
        Fake(refused).api().call("GET", "/x")
    with pytest.raises(CommandError) as caught:
        Fake(refused).api("wrong").call("GET", "/x")
    assert "LORAMUX_API_KEY" not in str(caught.value)


def test_what_is_no_loramux() -> None:
    with pytest.raises(CommandError, match="does not answer like"):
        Fake(httpx.Response(502, text="<html>")).api().call("GET", "/x")
    with pytest.raises(CommandError) as caught:
        Api("http://host:port", None).call("GET", "/x")
    assert caught.value.status == USAGE


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    for name, data in adapter_files().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_an_upload_is_sent_whole_again(adapter: Path, capsys: Any) -> None:
    """The files are rewound: every try has the same bytes."""
    ready = {"name": "skill", "version": 1, "rank": 2, "bytes": 9, "pinned": False, "warnings": ["watch \x1b[31mout"]}
    fake = Fake(busy(retry_after="1"), httpx.WriteError("pipe"), httpx.Response(201, json=ready))
    args = argparse.Namespace(name="skill", directory=adapter, description=None, example=None, pin=False, json=False)
    push(fake.api(), args, output())
    plain = [body.partition(b"\r\n")[2] for body in fake.bodies]  # the first line is a boundary, drawn anew
    weights = adapter_files()["adapter_model.safetensors"]
    assert [weights in body for body in plain] == [True] * 3
    out = capsys.readouterr().out
    assert "skill@1 is ready" in out
    assert "\x1b" not in out


def test_a_large_upload_is_never_in_memory(adapter: Path) -> None:
    """The body is an iterator over pieces, not one block."""
    sizes: list[int] = []

    class Reader(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            pieces: Iterator[bytes] = iter(request.stream)  # type: ignore[arg-type]
            sizes.extend(len(piece) for piece in pieces)
            return httpx.Response(400, json=ENVELOPE)

    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(5 << 20)
    api = Api("http://server", None, Reader())
    args = argparse.Namespace(name="skill", directory=adapter, description=None, example=None, pin=False, json=False)
    with pytest.raises(CommandError):
        push(api, args, output())
    assert sum(sizes) > 5 << 20
    assert max(sizes) <= 1 << 20
