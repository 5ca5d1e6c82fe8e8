"""`loramux adapters`: upload, list, look at, pin and delete the adapters of a running server."""

import argparse
import fnmatch
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from loramux.server.cli_client import STATUSES, USAGE, Api, CommandError
from loramux.server.cli_output import cell, output, plain, print_json, table, transfer

FILES = ("adapter_config.json", "adapter_model.safetensors")
EXAMPLES = f"""\
examples:
  loramux adapters push my-skill ./checkpoint-500 --description "Writes SQL" --example "List all users"
  loramux adapters ls 'sql-*' --sort bytes
  loramux adapters show my-skill@2
  loramux adapters pin my-skill                     keep it on the device
  loramux adapters ls --json | jq -r '.[].name'
  loramux adapters rm old-skill older-skill

{STATUSES}
"""
SORTS = ("name", "bytes", "rank", "version", "created", "tier")
_TIERS = {"device": 0, "host": 1, "disk": 2}


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds `adapters` and its actions; `common` are the flags of commands that talk to a server."""
    raw = argparse.RawDescriptionHelpFormatter
    adapters = commands.add_parser(
        "adapters", help="manage the adapters of a running server", allow_abbrev=False, epilog=EXAMPLES,
        formatter_class=raw,
    )  # fmt: skip
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help: str, run: Any) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name, parents=[common], help=help, allow_abbrev=False, epilog=EXAMPLES, formatter_class=raw
        )
        action.set_defaults(run=run)
        return action

    action = add("push", "upload an adapter (a directory in PEFT layout)", push)
    action.add_argument("name", metavar="NAME", help="lower-case letters, digits and ._-; an old name gets a version")
    action.add_argument("directory", metavar="DIR", type=Path, help="has adapter_config.json and the safetensors")
    action.add_argument("--description", help="what the adapter is good at")
    action.add_argument("--example", action="append", metavar="PROMPT", help="a prompt it is made for (repeatable)")
    action.add_argument("--pin", action="store_true", help="keep it on the device from now on")
    action = add("ls", "list the adapters", ls)
    action.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="names to list, as 'sql-*'")
    action.add_argument("--sort", choices=SORTS, default="name", help="column to sort by (default: name)")
    action = add("show", "show one adapter", show)
    action.add_argument("name", metavar="NAME", help="NAME or NAME@VERSION")
    for name, help, run in (
        ("rm", "delete adapters with all their versions", rm),
        ("pin", "keep adapters on the device", pin),
        ("unpin", "let adapters leave the device", unpin),
    ):
        add(name, help, run).add_argument("names", metavar="NAME", nargs="+")


@contextmanager
def _upload_files(directory: Path, console: Console) -> Iterator[list[tuple[str, Any]]]:
    """The two files as multipart parts, with a progress bar while they are sent. Raises for those that are missing."""
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory: give the one that save_pretrained wrote", USAGE)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        hint = "; it has .bin weights: save them with safe_serialization=True" if any(directory.glob("*.bin")) else ""
        raise CommandError(f"{directory} has no {' and no '.join(missing)}{hint}", USAGE)
    with transfer(console) as progress, ExitStack() as stack:
        parts = []
        for name in FILES:
            file = stack.enter_context(progress.open(directory / name, "rb", description=name))
            parts.append(("files", (name, file, "application/octet-stream")))
        yield parts


def push(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Uploads an adapter's directory. Sending the same content twice is one version, so a broken upload is repeated."""
    fields: dict[str, str] = {"name": args.name}
    if args.description is not None:
        fields["description"] = args.description
    if args.example:
        fields["examples"] = json.dumps(args.example)
    try:
        with _upload_files(args.directory, output(stderr=True)) as files:
            adapter = api.call("POST", "/v1/adapters", data=fields, files=files, resend=True)
    except OSError as error:
        raise CommandError(f"{error.filename or args.directory}: {error.strerror}", USAGE) from None
    if args.pin:
        adapter = api.call("PATCH", api.adapter(adapter["name"]), json={"pinned": True})
    if args.json:
        print_json(adapter)
        return
    pinned = ", pinned" if adapter["pinned"] else ""
    console.print(
        f"{adapter['name']}@{adapter['version']} is ready: rank {adapter['rank']}, {decimal(adapter['bytes'])}{pinned}",
        markup=False,
    )
    for warning in adapter["warnings"]:
        console.print(f"warning: {plain(warning)}", markup=False)


def ls(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Lists the adapters."""
    adapters = [item for item in api.adapters() if fnmatch.fnmatchcase(item["name"], args.pattern)]
    if args.sort == "tier":
        adapters.sort(key=lambda item: _TIERS[item["tier"]])
    elif args.sort != "name":
        field = {"created": "created_at"}.get(args.sort, args.sort)
        adapters.sort(key=lambda item: item[field], reverse=True)
    if args.json:
        print_json(adapters)
        return
    made = table("name", "version", "rank", "size", "tier", "description", right=("version", "rank", "size"))
    for item in adapters:
        made.add_row(
            cell(item["name"] + (" *" if item["pinned"] else "")), str(item["version"]), str(item["rank"]),
            decimal(item["bytes"]), item["tier"], cell(item["description"] or ""),
        )  # fmt: skip
    console.print(made)
    if any(item["pinned"] for item in adapters) and console.is_terminal:
        console.print("* pinned to the device", style="dim")


def show(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Shows one adapter, or one of its versions."""
    adapter = api.call("GET", api.adapter(args.name))
    if args.json:
        print_json(adapter)
        return
    made = table("field", "value")
    made.show_header = False
    for key, value in adapter.items():
        if key == "object" or value in (None, []):
            continue
        several = value if isinstance(value, list) else [str(value)]
        lines = several if key in ("examples", "warnings") else [", ".join(several)]
        for number, line in enumerate(lines):
            made.add_row("" if number else key, cell(line))
    console.print(made)


def rm(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Deletes adapters with all their versions."""
    gone = []
    for name in args.names:
        gone.append(api.call("DELETE", api.adapter(name)))
        if not args.json:
            console.print(f"{name} is deleted", markup=False)
    if args.json:
        print_json(gone)


def pin(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Keeps the newest versions on the device."""
    _set_pinned(api, args, console, pinned=True)


def unpin(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Lets adapters leave the device when room is needed."""
    _set_pinned(api, args, console, pinned=False)


def _set_pinned(api: Api, args: argparse.Namespace, console: Console, *, pinned: bool) -> None:
    changed = []
    for name in args.names:
        adapter = api.call("PATCH", api.adapter(name), json={"pinned": pinned})
        changed.append(adapter)
        if not args.json:
            word = "is pinned" if adapter["pinned"] else "is not pinned"
            console.print(f"{adapter['name']}@{adapter['version']} {word}", markup=False)
    if args.json:
        print_json(changed)
