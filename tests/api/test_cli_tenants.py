"""`loramux tenants`: on the store's folder beside a running server, and over its admin API."""

import json

import pytest
from api.harness import Bench

from loramux.adapters_store.tenants import TenantLimits
from loramux.server import cli_tenants
from loramux.server.cli import main


@pytest.fixture
def server(server: Bench) -> Bench:
    """With the tenants `acme` and `beta`."""
    for tenant in ("acme", "beta"):
        server.state.tenants.create_key(tenant)
    return server


@pytest.fixture
def remote(server: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The same server, by its admin API."""
    monkeypatch.setenv("LORAMUX_URL", server.url)
    monkeypatch.setenv("LORAMUX_API_KEY", server.state.tenants.create_key("ops", role="admin")[0])
    return server


def limits(server: Bench, tenant: str) -> TenantLimits:
    return server.state.tenants.tenant(tenant).limits


def test_limits_on_the_folder_of_a_running_server(server: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "limit", "acme", "--adapters", "20", "--tokens-per-minute", "60000"]) == 0
    assert capsys.readouterr().out == "acme: adapters 20, tokens per minute 60,000\n"
    assert limits(server, "acme") == TenantLimits(adapters=20, tokens_per_minute=60_000)
    assert main(["tenants", "limit", "acme", "--adapters", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"]["adapters"] is None
    assert limits(server, "acme") == TenantLimits(tokens_per_minute=60_000)  # what is not named stays
    assert main(["tenants", "ls"]) == 0
    out, err = capsys.readouterr()
    assert "60,000" in next(line for line in out.splitlines() if "acme" in line)
    assert "--url" in err  # where the rest is to be had


def test_limits_over_the_admin_api(
    remote: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_tenants, "PAGE", 1)
    assert main(["tenants", "limit", "beta", "--requests", "3", "--adapter-bytes", "1000000"]) == 0
    assert limits(remote, "beta") == TenantLimits(requests=3, adapter_bytes=1_000_000)
    capsys.readouterr()
    assert main(["tenants", "ls", "--json"]) == 0
    found = {tenant["id"]: tenant for tenant in json.loads(capsys.readouterr().out)}
    assert {"acme", "beta", "ops"} <= set(found)  # every page
    assert found["beta"]["usage"]["requests"] == 0
    assert main(["tenants", "ls"]) == 0
    out = capsys.readouterr().out
    assert "0 of 1,000,000" in next(line for line in out.splitlines() if "beta" in line)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["limit", "acme"], "at least one limit: --adapters"), (["limit", "nobody", "--pinned", "1"], "nobody"),
        (["limit", "a/../b", "--pinned", "1"], "a tenant's name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["server", "remote"])
def test_mistakes_are_named(
    where: str, request: pytest.FixtureRequest, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    assert main(["tenants", *argv]) != 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "1.5", "many", "\u0661"])
def test_a_limit_is_a_number_or_none(server: Bench, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tenants", "limit", "acme", f"--adapters={text}"])
    assert "whole number" in capsys.readouterr().err
