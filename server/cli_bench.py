"""`loramux bench`: a load for any OpenAI-compatible server, with a report per adapter."""

import argparse
import json
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loramux.server.bench import load, options
from loramux.server.bench.http_client import NotListeningError, ServingError
from loramux.server.bench.latency import Run, notes, tables
from loramux.server.cli_client import STATUSES, UNREACHABLE, USAGE, CommandError, server_of
from loramux.server.cli_output import output, print_json

BENCH = "bench"
PLAIN_EVERY = 10
DESCRIPTION = """\
Sends S-LoRA's workload to an OpenAI-compatible server: adapters drawn with a skew, gaps with a burstiness, lengths
between bounds; then reports latencies, the share of answers that began in time, and fairness, per adapter, too.
The trace depends on the seed alone. Servers beyond this machine need --allow-remote.
"""
EXAMPLES = f"""\
examples:
  loramux bench --adapters-from-models --rate 4 --duration 30
  loramux bench --adapters 'lora-{{i}}' --num-adapters 100 --alpha 0.3 --rate 10 --ignore-eos --out result.json
  loramux bench --rate 0 --requests 64 --concurrency 16 --input 64:65 --output 64:65 --ignore-eos
  loramux bench --url https://llm.example.org --allow-remote --endpoint chat --json | jq .measured.ttft_seconds

{STATUSES}
With requests that failed the status is 1.
"""


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds `bench`; `common` are the flags of commands that talk to a server."""
    parser = commands.add_parser(
        BENCH, parents=[common], help="measure a server under load", allow_abbrev=False, description=DESCRIPTION,
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_arguments(parser)


class Bar:
    """Where the run is, on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("warming up", total=None, state="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, run: Run, seconds: float) -> None:
        """See `load.Show`."""
        if not self._console.is_terminal:
            if round(seconds) % PLAIN_EVERY == 0:
                self._console.print(load.line_of(run, seconds), markup=False)
            return
        ended = sum(outcome.ended is not None for outcome in run.outcomes)
        failed = sum(outcome.error is not None for outcome in run.outcomes)
        speed = sum(outcome.tokens for outcome in run.outcomes) / seconds
        state = f"{len(run.outcomes) - ended} running, {failed} failed, {speed:.0f} tok/s"
        self._progress.update(
            self._task, description="requests", total=len(run.calls), completed=ended, state=state
        )  # fmt: skip


def bench(args: argparse.Namespace) -> int:
    """Runs the load and prints the report; returns the exit status."""
    server = server_of(args)
    args.url, args.api_key = server.url, server.key
    errors = output(stderr=True)
    try:
        options.check(args)
        with Bar(errors) as bar:
            result = load.measure(args, show=bar.show, warn=lambda text: errors.print(text, markup=False))
    except NotListeningError as error:
        raise CommandError(f"{error}; is the server running? (loramux serve, or --url)", UNREACHABLE) from None
    except ValueError as error:
        raise CommandError(str(error), USAGE) from None
    except ServingError as error:
        raise CommandError(f"{args.url}: {error}", UNREACHABLE) from None
    except load.WarmUpError as error:
        ids = args.endpoint == "completions" and args.prompt_tokens == "ids"
        hint = "; prompts are token ids (--token-ids LOW:HIGH), or texts with --prompt-tokens words" if ids else ""
        raise CommandError(f"{error}{hint}") from None
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise CommandError(f"--out {args.out}: {error.strerror}", USAGE) from None
    if args.json:
        print_json(result)
    else:
        sys.stdout.write(tables(result["measured"], args.rows).rstrip() + "\n")
    for note in notes(result["measured"], args.rate):
        errors.print(f"note: {note}", markup=False)
    return load.status_of(result)
