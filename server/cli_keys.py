"""`loramux keys`: who may use a server. On the store's folder, while a server runs or not; or over the admin API."""

import argparse
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol, get_args

from rich.console import Console

from loramux.adapters_store.tenants import Key, Role, Tenants
from loramux.server.cli_client import USAGE, Api, CommandError
from loramux.server.cli_output import cell, output, print_json, table
from loramux.server.cli_registry import registry_of, store_parser

KEYS = "keys"
PAGE = 500
_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class KeyBook(Protocol):
    """Where keys are kept, as the commands use it. Raises `CommandError` with the reason."""

    def create(self, tenant: str, role: Role, label: str | None, expires_at: int | None) -> dict[str, Any]:
        """Makes a key; the answer holds it."""

    def keys(self, tenant: str | None) -> Iterator[dict[str, Any]]:
        """All keys, oldest first."""

    def revoke(self, id: str) -> dict[str, Any]:
        """Ends a key."""


class RemoteKeys:
    """A running server's keys, over its admin API."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(self, tenant: str, role: Role, label: str | None, expires_at: int | None) -> dict[str, Any]:
        """See `KeyBook.create`."""
        body = {"tenant": tenant, "role": role, "label": label, "expires_at": expires_at}
        made: dict[str, Any] = self._api.call("POST", "/v1/admin/keys", json=body)
        return made

    def keys(self, tenant: str | None) -> Iterator[dict[str, Any]]:
        """See `KeyBook.keys`."""
        return self._api.pages("/v1/admin/keys", PAGE, **({"tenant": tenant} if tenant else {}))

    def revoke(self, id: str) -> dict[str, Any]:
        """See `KeyBook.revoke`."""
        gone: dict[str, Any] = self._api.call("DELETE", f"/v1/admin/keys/{_checked_id(id)}")
        return gone


class LocalKeys:
    """The keys in a store's folder. A server that runs on it hears of changes with its next request."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def create(self, tenant: str, role: Role, label: str | None, expires_at: int | None) -> dict[str, Any]:
        """See `KeyBook.create`."""
        secret, key = self._tenants.create_key(tenant, role=role, label=label, expires_at=expires_at)
        return {**_shown(key), "key": secret}

    def keys(self, tenant: str | None) -> Iterator[dict[str, Any]]:
        """See `KeyBook.keys`."""
        after: str | None = None
        while True:
            page = self._tenants.keys(PAGE, after, tenant)
            yield from map(_shown, page.data)
            if not page.has_more:
                return
            after = page.data[-1].id

    def revoke(self, id: str) -> dict[str, Any]:
        """See `KeyBook.revoke`."""
        return _shown(self._tenants.revoke_key(_checked_id(id)))


def _shown(key: Key) -> dict[str, Any]:
    return {"object": "api_key", **asdict(key)}


def _checked_id(id: str) -> str:
    """A key's id. Somebody who pastes the key itself should not find it in a server's log."""
    if re.fullmatch(r"key_[0-9a-f]{16}", id) is None:
        raise CommandError("ID is a key's id, such as key_0123456789abcdef (`loramux keys ls` shows them)", USAGE)
    return id


@contextmanager
def _book(api: Api, args: argparse.Namespace) -> Iterator[KeyBook]:
    """The keys of the server or the folder that the flags name."""
    with registry_of(api, args) as found:
        yield RemoteKeys(found) if isinstance(found, Api) else LocalKeys(found)


def expiry(text: str, now: float) -> int:
    """Unix seconds of `30d`, `12h`, `90m`, `2w` from now, or of a day or time in ISO 8601 (UTC unless it says so).

    Raises `CommandError`.
    """
    if (match := re.fullmatch(r"([0-9]{1,6})([mhdw])", text)) is not None:
        return int(now) + int(match.group(1)) * _UNITS[match.group(2)]
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"--expires {text}: write it as 12h, 30d or 2027-01-31", USAGE) from None
    return int((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp())


def create(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Makes a key and shows it, this once."""
    expires_at = None if args.expires is None else expiry(args.expires, time.time())
    with _book(api, args) as book:
        made = book.create(args.tenant, args.role, args.label, expires_at)
    if args.json:
        print_json(made)
        return
    console.print(made["key"], markup=False, soft_wrap=True)
    output(stderr=True).print(
        f"{made['id']}: a key of {made['tenant']} ({made['role']}), not shown again. A server with keys serves nobody "
        "without one.",
        markup=False,
    )  # fmt: skip


def ls(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Lists the keys, without the keys themselves."""
    with _book(api, args) as book:
        keys = list(book.keys(args.tenant))
    if args.json:
        print_json(keys)
        return
    shown = table("id", "tenant", "role", "label", "made", "last used", "state")
    for key in keys:
        shown.add_row(
            key["id"], cell(key["tenant"]), key["role"], cell(key["label"] or ""), _day(key["created_at"]),
            _day(key["last_used_at"]), _state(key, time.time()),
        )  # fmt: skip
    console.print(shown)


def revoke(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Ends keys: the next request with one is refused."""
    with _book(api, args) as book:
        for id in args.ids:
            gone = book.revoke(id)
            if args.json:
                print_json(gone)
            else:
                console.print(f"{gone['id']} of {gone['tenant']} is revoked", markup=False)


def _day(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _state(key: dict[str, Any], now: float) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {_day(key['revoked_at'])}"
    if key["expires_at"] is None:
        return "valid"
    return f"expired {_day(key['expires_at'])}" if key["expires_at"] <= now else f"valid to {_day(key['expires_at'])}"


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds `keys create`, `keys ls` and `keys revoke`; `common` are the flags of commands that talk to a server."""
    both = [common, store_parser()]
    group = commands.add_parser(
        KEYS, help="manage who may use a server", allow_abbrev=False,
        description="Manages keys in the store of the server that these settings are of (one that runs hears of it at\n"
        "once), or, with --url or LORAMUX_URL and an admin key, over that server's admin API.",
        epilog="examples:\n  loramux keys create acme --label laptop --expires 90d\n"
        "  loramux keys create ops --admin --model Qwen/Qwen3-0.6B\n  loramux keys ls --tenant acme\n"
        "  loramux keys revoke key_0123456789abcdef --url http://127.0.0.1:8000 --api-key lm-...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("create", parents=both, help="make a key and show it, once", allow_abbrev=False)
    action.add_argument("tenant", metavar="TENANT", help="whose key it is: lower-case letters, digits and ._-")
    action.add_argument("--label", help="what the key is for")
    action.add_argument("--expires", metavar="WHEN", help="30d, 12h, or a day or time such as 2027-01-31")
    roles = action.add_mutually_exclusive_group()
    roles.add_argument("--role", choices=get_args(Role), default="user", help="what it may do (default: user)")
    roles.add_argument("--admin", dest="role", action="store_const", const="admin", help="short for --role admin")
    action.set_defaults(run=create)
    action = actions.add_parser("ls", parents=both, help="list the keys", allow_abbrev=False)
    action.add_argument("--tenant", help="of this tenant only")
    action.set_defaults(run=ls)
    action = actions.add_parser("revoke", parents=both, help="end keys", allow_abbrev=False)
    action.add_argument("ids", metavar="ID", nargs="+")
    action.set_defaults(run=revoke)
