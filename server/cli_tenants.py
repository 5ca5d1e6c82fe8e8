"""`loramux tenants`: who there is, and how much each may have. In the store's folder, or over the admin API."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from loramux.adapters_store.names import NAME_PATTERN
from loramux.adapters_store.tenants import LIMITS, Tenant, Tenants
from loramux.server.cli_client import USAGE, Api, CommandError
from loramux.server.cli_output import cell, output, print_json, table
from loramux.server.cli_registry import registry_of, store_parser

PAGE = 100
SERVERS = "none"
MEANINGS = {
    "adapters": "adapters on disk",
    "adapter_bytes": "bytes of adapters on disk",
    "pinned": "adapters pinned to the device",
    "requests": "requests under way",
    "tokens_per_minute": "tokens of prompts and answers per minute",
}


def _all(found: Api | Tenants) -> Iterator[dict[str, Any]]:
    """Every tenant by name, as the admin API shows it; from a folder without what only a server knows."""
    if isinstance(found, Api):
        yield from found.pages("/v1/admin/tenants", PAGE)
        return
    after: str | None = None
    while True:
        page = found.tenants(PAGE, after)
        yield from map(_shown, page.data)
        if not page.has_more:
            return
        after = page.data[-1].name


def _shown(tenant: Tenant) -> dict[str, Any]:
    return {"id": tenant.name, "object": "tenant", "created_at": tenant.created_at, "limits": asdict(tenant.limits)}


def limit_of(text: str) -> int | None:
    """A limit as it is written on the command line; None for "none". Raises `argparse.ArgumentTypeError`."""
    if text == SERVERS:
        return None
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {SERVERS!r}")
    return int(text)


def ls(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Lists the tenants: what each has of what it may have."""
    with registry_of(api, args) as found:
        tenants = list(_all(found))
    if args.json:
        print_json(tenants)
        return
    shown = table("tenant", *(name.replace("_", " ") for name in LIMITS))
    for tenant in tenants:
        shown.add_row(cell(tenant["id"]), *(_used(tenant, name) for name in LIMITS))
    console.print(shown)
    if tenants and "usage" not in tenants[0]:
        output(stderr=True).print("Limits of a tenant's own; what is used and the server's own limits: with --url.")


def _used(tenant: dict[str, Any], name: str) -> str:
    """`3 of 10` where a server tells what there is, else the limit."""
    most = tenant.get("limits_in_force", tenant["limits"])[name]
    end = "-" if most is None else f"{most:,}"
    if "usage" not in tenant:
        return end
    if name != "tokens_per_minute":
        return f"{tenant['usage'][name]:,} of {end}"
    left = tenant["usage"]["tokens_left"]
    return end if left is None else f"{left:,} left of {end}"


def limit(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Sets or lifts limits of one tenant; the others stay."""
    changes = {name: getattr(args, name) for name in LIMITS if hasattr(args, name)}
    if not changes:
        flags = ", ".join(_flag(name) for name in LIMITS)
        raise CommandError(f"give at least one limit: {flags}", USAGE)
    if NAME_PATTERN.fullmatch(args.tenant) is None:
        raise CommandError(f"{args.tenant!r} is not a tenant's name (`loramux tenants ls` shows them)", USAGE)
    with registry_of(api, args) as found:
        if isinstance(found, Api):
            tenant = found.call("PATCH", f"/v1/admin/tenants/{args.tenant}", json=changes)
        else:
            tenant = _shown(found.set_limits(args.tenant, changes))
    if args.json:
        print_json(tenant)
        return
    parts = [f"{name.replace('_', ' ')} {_words(tenant['limits'][name])}" for name in changes]
    console.print(f"{tenant['id']}: {', '.join(parts)}", markup=False)


def _words(most: int | None) -> str:
    return "as the server's settings say" if most is None else f"{most:,}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds `tenants ls` and `tenants limit`; `common` are the flags of commands that talk to a server."""
    both = [common, store_parser()]
    group = commands.add_parser(
        "tenants", help="show tenants, and limit what each may have", allow_abbrev=False,
        description="Shows and limits tenants in the store of the server that these settings are of (one that runs\n"
        "hears of it at once), or, with --url or LORAMUX_URL and an admin key, over that server's admin API.\n"
        "A tenant comes to be with its first key (`loramux keys create`).",
        epilog="examples:\n  loramux tenants ls --url http://127.0.0.1:8000 --api-key lm-...\n"
        "  loramux tenants limit acme --adapters 20 --tokens-per-minute 60000\n"
        "  loramux tenants limit acme --requests none",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("ls", parents=both, help="list the tenants", allow_abbrev=False)
    action.set_defaults(run=ls)
    action = actions.add_parser("limit", parents=both, help="limit what a tenant may have", allow_abbrev=False)
    action.add_argument("tenant", metavar="TENANT")
    for name in LIMITS:
        action.add_argument(
            _flag(name), type=limit_of, default=argparse.SUPPRESS, metavar="N",
            help=f"{MEANINGS[name]} ({SERVERS}: as the server's settings say)",
        )  # fmt: skip
    action.set_defaults(run=limit)
