"""`loramux keys`: on the store's folder beside a running server, and over its admin API."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.harness import Bench

from loramux.adapters_store.schema import REGISTRY_FILE
from loramux.adapters_store.tenants import Tenants
from loramux.server import cli_keys, cli_registry
from loramux.server.cli_client import USAGE, Api, CommandError, add_server_arguments, server_of
from loramux.server.cli_output import output
from loramux.server.settings import Settings


def loramux(*argv: str) -> None:
    """`loramux ARGV...`, as the command line runs it."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    add_server_arguments(common)
    common.add_argument("--json", action="store_true")
    cli_keys.add_commands(commands, common)
    args = parser.parse_args(argv)
    server = server_of(args)
    args.run(Api(server.url, server.key), args, output())


def status(bench: Bench, key: str) -> int:
    return httpx.get(f"{bench.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code


def test_on_the_folder_of_a_running_server(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(server, "none") == 200
    loramux("keys", "create", "acme", "--label", "[bold]laptop", "--expires", "30d")
    out, err = capsys.readouterr()
    secret = out.strip()
    assert secret.startswith("lm-")
    assert len(out.splitlines()) == 1  # alone on standard output, for KEY=$(loramux keys create ...)
    assert secret not in err
    assert "not shown again" in err
    assert (status(server, secret), status(server, "none")) == (200, 401)
    loramux("keys", "ls")
    shown = capsys.readouterr().out
    assert "[bold]laptop" in shown
    assert "valid to" in shown
    assert secret not in shown
    loramux("keys", "ls", "--json", "--tenant", "acme")
    (key,) = json.loads(capsys.readouterr().out)
    assert abs(key["expires_at"] - time.time() - 30 * 86_400) < 3600
    loramux("keys", "revoke", key["id"])
    assert "is revoked" in capsys.readouterr().out
    assert status(server, secret) == 401
    loramux("keys", "ls")
    assert "revoked" in capsys.readouterr().out


def test_over_the_admin_api(server: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loramux("keys", "create", "ops", "--admin", "--json")
    admin = json.loads(capsys.readouterr().out)
    assert admin["role"] == "admin"

    def unused(settings: Settings) -> Path:
        raise AssertionError("the folder is not asked")

    monkeypatch.setattr(cli_registry, "store_root", unused)
    monkeypatch.setenv("LORAMUX_URL", server.url)
    monkeypatch.setenv("LORAMUX_API_KEY", admin["key"])
    loramux("keys", "create", "acme", "--role", "metrics", "--json")
    made = json.loads(capsys.readouterr().out)
    assert (made["tenant"], made["role"]) == ("acme", "metrics")
    monkeypatch.setattr(cli_keys, "PAGE", 1)
    loramux("keys", "ls", "--json")
    assert [key["id"] for key in json.loads(capsys.readouterr().out)] == [admin["id"], made["id"]]
    loramux("keys", "revoke", made["id"], "--json")
    assert json.loads(capsys.readouterr().out)["revoked_at"] is not None
    with pytest.raises(CommandError, match="admin"):
        loramux("keys", "ls", "--url", server.url, "--api-key", server.state.tenants.create_key("acme")[0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["create", "A b"], "not a tenant's name"), (["create", "a", "--expires", "soon"], "--expires"),
        (["create", "a", "--expires", "2001-01-01"], "future"), (["revoke", "key_0"], "key's id"),
        (["revoke", "lm-" + "x" * 43], "key's id"), (["create", "a", "--label", "x" * 300], "label"),
        (["ls", "--url", "http://127.0.0.1:1", "--store-dir", "/tmp/x"], "not both"),
    ],
)  # fmt: skip
def test_mistakes_are_named(server: Bench, argv: list[str], words: str) -> None:
    with pytest.raises(CommandError, match=words) as caught:
        loramux("keys", *argv)
    assert caught.value.status == USAGE
    assert "lm-x" not in str(caught.value)
    assert not server.state.tenants.has_keys()


def test_an_unknown_id(server: Bench) -> None:
    with pytest.raises(CommandError, match="there is no key"):
        loramux("keys", "revoke", "key_0123456789abcdef")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 1e9 + 5400), ("12h", 1e9 + 43_200), ("2w", 1e9 + 1_209_600), ("2027-01-31", 1_801_353_600),
     ("2027-01-31T12:00:00+02:00", 1_801_389_600)],
)  # fmt: skip
def test_expiry(text: str, seconds: float) -> None:
    assert cli_keys.expiry(text, 1e9) == seconds


def test_the_demos_folder_is_found_before_it_was_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORAMUX_URL", "LORAMUX_MODEL"):
        monkeypatch.delenv(name, raising=False)
    options: dict[str, Any] = {"store_dir": tmp_path}
    loramux("keys", "create", "acme", "--store-dir", str(tmp_path))
    secret = capsys.readouterr().out.strip()
    root = cli_registry.store_root(Settings(**options))
    assert root.parent == tmp_path
    tenants = Tenants(root / REGISTRY_FILE)
    assert tenants.authenticate(secret.encode()) is not None
    tenants.close()
