"""S-LoRA's workload over HTTP against any OpenAI-compatible server, with a report per adapter.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --adapters 'lora-{i}' --num-adapters 100 --alpha 0.3 \\
        --rate 10 --duration 300 --ignore-eos --out result.json

`loramux bench` as a script that needs no more than NumPy (from a checkout: `PYTHONPATH=src`), and that keeps this
machine's versions beside the result. The trace is that of `server/bench/workload.py`, what is measured is said in
`server/bench/load.py`. Names for `--adapters`: what the server lists (vLLM, loramux), 'base:lora-{i}' (SGLang), an
adapter id (LoRAX, with `--base "" --done-optional` where its streams end without [DONE]).
"""

import argparse
import sys
from collections.abc import Sequence

from report import environment, publish

from loramux.server.bench import load, options
from loramux.server.bench.http_client import ServingError
from loramux.server.bench.latency import Run, notes, tables


def progress(run: Run, seconds: float) -> None:
    """One line on standard error, rewritten in place on a terminal, every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    if terminal or round(seconds) % 10 == 0:
        line = load.line_of(run, seconds)
        sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
        sys.stderr.flush()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with 2 and a message for those that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    options.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        options.check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the workload and prints the report; 0 without failed requests, 1 with, 2 for options, 130 after Ctrl-C."""
    args = parse(argv)
    try:
        result = load.measure(args, show=progress, warn=lambda text: print(text, file=sys.stderr))
    except (ValueError, ServingError) as error:
        sys.stderr.write(f"serve.py: {error}\n")
        return 2
    except load.WarmUpError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    sys.stdout.write(tables(result["measured"], args.rows))
    for note in notes(result["measured"], args.rate):
        sys.stderr.write(f"note: {note}\n")
    publish({**result, "environment": environment()}, args.out)
    return load.status_of(result)


if __name__ == "__main__":
    sys.exit(main())
