"""The command line: `loramux serve`, and commands that talk to a server that runs."""

import argparse
import os
import sys
from collections.abc import Sequence

from loramux import __version__
from loramux.server import cli_adapters, cli_bench, cli_chat, cli_keys, cli_route, cli_tenants
from loramux.server.cli_client import (
    INTERRUPTED,
    OK,
    PIPE_CLOSED,
    STATUSES,
    USAGE,
    Api,
    CommandError,
    add_server_arguments,
    server_of,
)
from loramux.server.cli_output import output
from loramux.server.settings import SettingsError, add_arguments, load_settings

EXAMPLES = f"""\
examples:
  loramux serve                                     the embedded demo
  loramux serve --model Qwen/Qwen3-0.6B             a model from the hub, or a directory
  loramux adapters push my-skill ./checkpoint-500   upload what peft's save_pretrained wrote
  loramux adapters ls
  loramux chat -m my-skill                          talk to it
  loramux route "Spell lamp backwards"              which adapters would answer, and why
  loramux bench --adapters-from-models --rate 4     measure a server under load
  loramux keys create my-team                       from now on the server asks for keys
  loramux tenants limit my-team --adapters 20

Commands talk to --url, else LORAMUX_URL (with LORAMUX_API_KEY), else OPENAI_BASE_URL (with OPENAI_API_KEY).
{STATUSES}
"""


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

    common = argparse.ArgumentParser(add_help=False)
    add_server_arguments(common)
    common.add_argument("--json", action="store_true", help="print JSON")
    for module in (cli_adapters, cli_keys, cli_tenants, cli_route):
        module.add_commands(commands, common)
    for command in (cli_chat, cli_bench):
        command.add_command(commands, common)
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


def _run(args: argparse.Namespace) -> int:
    """One command; its exit status. Raises `SettingsError` and `CommandError`."""
    if args.command == "serve":
        return _serve(args)
    if args.command == cli_bench.BENCH:
        return cli_bench.bench(args)
    if args.command == cli_route.TRAIN:
        cli_route.train(args, output())
        return OK
    server = server_of(args)
    errors = output(stderr=True)
    api = Api(server.url, server.key, say=lambda text: errors.print(text, style="dim", markup=False))
    args.run(api, args, output())
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status (`cli_client.STATUSES`)."""
    args = _parser().parse_args(cli_route.joined(sys.argv[1:] if argv is None else argv))
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except SettingsError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return USAGE
    except CommandError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end: to nowhere
        return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
