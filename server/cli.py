"""The command line: `loramux serve`, and `loramux adapters ...`, `loramux route ...` against a server that runs."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from loramux import __version__
from loramux.server import cli_route
from loramux.server.cli_client import OK, USAGE, Api, CommandError
from loramux.server.settings import SettingsError, add_arguments, load_settings

DEFAULT_URL = "http://127.0.0.1:8000"
FILES = ("adapter_config.json", "adapter_model.safetensors")
EXAMPLES = """\
examples:
  loramux serve                                     the embedded demo
  loramux serve --model Qwen/Qwen3-0.6B             a model from the hub, or a directory
  loramux adapters push my-skill ./checkpoint-500   upload what peft's save_pretrained wrote
  loramux adapters ls
  loramux route "Spell lamp backwards"              which adapters would answer, and why
"""


@contextmanager
def _upload_files(directory: Path, console: Console) -> Iterator[list[tuple[str, Any]]]:
    """The two files as multipart parts, with a progress bar while they are sent."""
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        hint = "; it has .bin weights: save them with safe_serialization=True" if any(directory.glob("*.bin")) else ""
        raise CommandError(f"{directory} has no {' and no '.join(missing)}{hint}", USAGE)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ExitStack() as stack,
    ):
        parts = []
        for name in FILES:
            file = stack.enter_context(progress.open(directory / name, "rb", description=name))
            parts.append(("files", (name, file, "application/octet-stream")))
        yield parts


def push(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Uploads an adapter's directory."""
    fields: dict[str, str] = {"name": args.name}
    if args.description is not None:
        fields["description"] = args.description
    if args.example:
        fields["examples"] = json.dumps(args.example)
    with _upload_files(Path(args.directory), Console(stderr=True)) as files:
        adapter = api.call("POST", "/v1/adapters", data=fields, files=files)
    if args.json:
        console.print_json(data=adapter)
        return
    console.print(
        f"{adapter['name']}@{adapter['version']} is ready: rank {adapter['rank']}, {decimal(adapter['bytes'])}",
        highlight=False, markup=False,
    )  # fmt: skip
    for warning in adapter["warnings"]:
        console.print(f"warning: {warning}", markup=False)


def ls(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Lists the adapters."""
    adapters = list(api.adapters())
    if args.json:
        console.print_json(data=adapters)
        return
    table = Table("name", "version", "rank", "size", "tier", "description", box=None, pad_edge=False)
    for item in adapters:
        table.add_row(
            item["name"] + (" *" if item["pinned"] else ""), str(item["version"]), str(item["rank"]),
            decimal(item["bytes"]), item["tier"], (item["description"] or "").replace("[", "\\["),
        )  # fmt: skip
    console.print(table)


def show(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Shows one adapter, or one of its versions."""
    adapter = api.call("GET", api.adapter(args.name))
    if args.json:
        console.print_json(data=adapter)
        return
    table = Table("field", "value", box=None, pad_edge=False, show_header=False)
    for key, value in adapter.items():
        if key == "object" or value in (None, []):
            continue
        text = "\n".join(value) if key == "examples" else ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(key, text.replace("[", "\\["))
    console.print(table)


def rm(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Deletes adapters with all their versions."""
    for name in args.names:
        gone = api.call("DELETE", api.adapter(name))
        if args.json:
            console.print_json(data=gone)
        else:
            console.print(f"{name} is deleted", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux", description="One base model, many LoRA adapters, behind the OpenAI API.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"loramux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serving = commands.add_parser(
        "serve", help="start a server", allow_abbrev=False,
        description="Starts a server: the embedded demo, or --model. Each flag has an environment variable.",
    )  # fmt: skip
    add_arguments(serving)

    adapters = commands.add_parser("adapters", help="manage the adapters of a running server", allow_abbrev=False)
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    url = os.environ.get("LORAMUX_URL", DEFAULT_URL)
    common.add_argument("--url", default=url, help=f"the server (default: {url}) [LORAMUX_URL]")
    common.add_argument("--api-key", default=None, help="the key to send [LORAMUX_API_KEY]")
    common.add_argument("--json", action="store_true", help="print JSON")

    action = actions.add_parser("push", parents=[common], help="upload an adapter (a directory in PEFT layout)")
    action.add_argument("name", metavar="NAME", help="lower-case letters, digits and ._-")
    action.add_argument("directory", metavar="DIR", help="has adapter_config.json and adapter_model.safetensors")
    action.add_argument("--description", help="what the adapter is good at")
    action.add_argument("--example", action="append", metavar="PROMPT", help="a prompt it is made for (repeatable)")
    action.set_defaults(run=push)
    action = actions.add_parser("ls", parents=[common], help="list the adapters")
    action.set_defaults(run=ls)
    action = actions.add_parser("show", parents=[common], help="show one adapter")
    action.add_argument("name", metavar="NAME", help="NAME or NAME@VERSION")
    action.set_defaults(run=show)
    action = actions.add_parser("rm", parents=[common], help="delete adapters")
    action.add_argument("names", metavar="NAME", nargs="+")
    action.set_defaults(run=rm)

    cli_route.add_commands(commands, common)
    return parser


def _serve(args: argparse.Namespace) -> int:
    settings = load_settings({key: value for key, value in vars(args).items() if key != "command"})
    from loramux.server.api.serve import (
        ServeError,
        serve,
    )  # torch and transformers take seconds: not for other commands

    try:
        return serve(settings)
    except ServeError as error:
        raise CommandError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 refused, 2 wrong usage, 3 the server cannot be reached."""
    args = _parser().parse_args(cli_route.joined(sys.argv[1:] if argv is None else argv))
    try:
        if args.command == "serve":
            return _serve(args)
        if args.command == cli_route.TRAIN:
            cli_route.train(args, Console())
            return OK
        key = args.api_key or os.environ.get("LORAMUX_API_KEY", "").split(",")[0].strip() or None
        args.run(Api(args.url, key), args, Console())
    except SettingsError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return USAGE
    except CommandError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    return OK


if __name__ == "__main__":
    sys.exit(main())
