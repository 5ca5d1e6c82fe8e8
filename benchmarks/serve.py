"""S-LoRA's workload over HTTP against any OpenAI-compatible server, with a report per adapter.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --adapters 'lora-{i}' --num-adapters 100 --alpha 0.3 \\
        --rate 10 --duration 300 --ignore-eos --out result.json

The trace is that of `workload.py` (NumPy); the client is the standard library's. Names for `--adapters`: what the
server lists (vLLM, loramux), 'base:lora-{i}' (SGLang), an adapter id (LoRAX, with `--base "" --done-optional` where its
streams end without [DONE]). Measured per request, in seconds, on a fresh connection each:

    TTFT = first text - send        E2E = [DONE] - send        TPOT = (last text - first text) / (tokens - 1)
    ITL  = gaps between arrivals that carry text (a server that sends several tokens at once has fewer, longer ones)

Tokens are the server's own count (`usage`), else the token ids or the arrivals. A request has failed when its status is
not 200, its stream carries an error, or it ends without a finish_reason or [DONE]. The SLO is S-LoRA's: the share of
all ended requests, failed ones included, whose TTFT is below `--slo-ttft`. Cold requests are the first of their
adapter, joined ones were sent before any of that adapter had an answer, warm ones after. Jain's index over adapters,
(sum x)^2 / (n sum x^2), is given for x = output tokens and for x = mean tokens per second of a request.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from http_client import ServingError, Target, find_target
from latency import Run, notes, summarise, tables
from openai_stream import Call, Outcome, ask, list_models
from report import environment, publish
from workload import MIXES, Request, Workload, generate, prompt_ids, prompt_words

WARMUP_CONCURRENCY = 8


async def drive(
    target: Target,
    run: Run,
    *,
    concurrency: int,
    timeout: float,
    need_done: bool = True,
    stop_after: float = math.inf,
    show: Callable[[Run, float], None] | None = None,
) -> None:
    """Sends the run's calls when they are due, at most `concurrency` at once (0: no bound), and waits for the answers.

    None is sent later than `stop_after` seconds. `show` is called every second. What was measured is in `run` even when
    this is cancelled.
    """
    gate = asyncio.Semaphore(concurrency or max(len(run.calls), 1))
    start, cpu = time.perf_counter(), time.process_time()

    async def report(show: Callable[[Run, float], None]) -> None:
        while True:
            await asyncio.sleep(1)
            show(run, time.perf_counter() - start)

    reporter = asyncio.create_task(report(show)) if show else None
    try:
        async with asyncio.TaskGroup() as group:
            for call in run.calls:
                await asyncio.sleep(max(start + call.at - time.perf_counter(), 0))
                await gate.acquire()
                if time.perf_counter() - start > stop_after:
                    break
                outcome = Outcome(call, due=start + call.at)
                run.outcomes.append(outcome)
                task = group.create_task(ask(target, outcome, timeout=timeout, need_done=need_done))
                task.add_done_callback(lambda _: gate.release())
    finally:
        run.seconds, run.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        if reporter:
            reporter.cancel()


def progress(run: Run, seconds: float) -> None:
    """One line on standard error, rewritten in place on a terminal, every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and round(seconds) % 10:
        return
    done = sum(o.completed for o in run.outcomes)
    failed = sum(o.error is not None for o in run.outcomes)
    sent = len(run.outcomes)
    speed = sum(o.tokens for o in run.outcomes) / seconds
    line = f"{seconds:5.0f} s  sent {sent}/{len(run.calls)}  running {sent - done - failed}  done {done}  "
    line += f"failed {failed}  {speed:.0f} tok/s"
    sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
    sys.stderr.flush()


def bounds(text: str) -> tuple[int, int]:
    """`low:high` as two integers."""
    low, _, high = text.partition(":")
    return int(low), int(high)


def names_in(models: Sequence[dict[str, Any]], base: str | None) -> tuple[str, list[str]]:
    """The base's name and the adapters' in a list of models: adapters have a parent where the server says so.

    Raises ValueError when no base can be told.
    """
    roots = [m["id"] for m in models if m.get("parent") is None]
    if base is None:
        if not roots:
            raise ValueError("the server lists no base model; give it as --base")
        base = roots[0]
    children = [m["id"] for m in models if m.get("parent") is not None]
    return base, children or [name for name in roots if name != base]


def choose_names(args: argparse.Namespace, listed: Sequence[str]) -> list[str]:
    """The adapters of the run, as many as asked for. Raises ValueError when there are not as many."""
    pattern, wanted = args.adapters, args.num_adapters
    if pattern is not None and "{i}" in pattern:
        if wanted is None:
            raise ValueError("--adapters with {i} needs --num-adapters")
        return [pattern.replace("{i}", str(i)) for i in range(wanted)]
    if pattern is not None:
        try:
            found = [line.strip() for line in Path(pattern).read_text().splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f"--adapters is a pattern with {{i}} or a file of names: {error}") from None
    else:
        found = list(listed) if args.adapters_from_models else []
    if wanted is not None and wanted > len(found):
        raise ValueError(f"--num-adapters is {wanted}, but there are {len(found)} names (of --adapters or the server)")
    return found[:wanted]


def make_calls(args: argparse.Namespace, trace: Sequence[Request], base: str, names: Sequence[str]) -> list[Call]:
    """The trace's requests as bytes to send."""
    calls = []
    for request in trace:
        model = base if request.adapter is None else names[request.adapter]
        fields: dict[str, Any] = {
            "model": model, "max_tokens": request.output_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if args.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt_words(args.seed, request)}]
        elif args.prompt_tokens == "words":
            fields["prompt"] = prompt_words(args.seed, request)
        else:
            fields["prompt"] = prompt_ids(args.seed, request, *args.token_ids)
        if args.ignore_eos:
            fields["ignore_eos"] = True
        if args.return_token_ids:
            fields["return_token_ids"] = True
        fields.update(args.extra_body)
        body = json.dumps({key: value for key, value in fields.items() if value is not None}).encode()
        path = "/v1/chat/completions" if args.endpoint == "chat" else "/v1/completions"
        calls.append(Call(request.at, model, path, body))
    return calls


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with 2 and a message for those that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--api-key")
    add("--allow-remote", action="store_true", help="load a server that is not on this machine's loopback")
    add("--base", help="the base's name (default: the first of GET /v1/models without a parent)")
    add("--adapters", metavar="NAME-{i}|FILE", help="names with {i} from 0, or a file with one name per line")
    add("--adapters-from-models", action="store_true", help="the adapters that GET /v1/models lists")
    add("--num-adapters", type=int, help="how many of them (0: the base alone)")
    add("--mix", choices=MIXES, default="slora", help="who gets the requests (workload.py)")
    add("--alpha", type=float, default=1.0, help="skew of slora's mix: 1 uniform, smaller more skewed")
    add("--rate", type=float, default=2.0, help="requests per second; 0: as soon as --concurrency allows")
    add("--cv", type=float, default=1.0, help="burstiness of the gaps; 1 is Poisson")
    add("--concurrency", type=int, default=0, help="most requests in flight (0: no bound)")
    add("--requests", type=int, help="length of the trace (default: rate x duration)")
    add("--duration", type=float, help="seconds (default 60); beside --requests, none is sent later")
    add("--input", type=bounds, default=(8, 512), metavar="LOW:HIGH", help="prompt tokens, high excluded")
    add("--output", type=bounds, default=(8, 512), metavar="LOW:HIGH", help="answer tokens, high excluded")
    add("--seed", type=int, default=42)
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--prompt-tokens", choices=("ids", "words"), default="ids", help="chat always sends words")
    add("--token-ids", type=bounds, default=(100, 10000), metavar="LOW:HIGH", help="ids that prompts are made of")
    add("--ignore-eos", action="store_true", help="answers of exactly the drawn length, where the server knows how")
    add("--return-token-ids", action="store_true", help="exact arrivals even of tokens without text (vLLM, loramux)")
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields; null takes one away")
    add("--done-optional", action="store_true", help="a stream with a finish_reason is whole without [DONE]")
    add("--warmup", type=int, default=3, help="requests to the base before the measured ones")
    add("--slo-ttft", type=float, default=6.0, metavar="SECONDS", help="S-LoRA's bound")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take")
    add("--rows", type=int, default=20, help="adapters in the printed table")
    add("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    args.stop_after = math.inf if args.requests is None or args.duration is None else args.duration
    if args.requests is None:
        expected = args.rate * (60.0 if args.duration is None else args.duration)
        if not 1 <= expected < 2**32:
            parser.error("--rate times --duration gives no request; --rate 0 needs --requests")
        args.requests = int(expected)
    if not isinstance(args.extra_body, dict):
        parser.error("--extra-body must be a JSON object")
    if min(args.concurrency, args.warmup, args.rows, args.num_adapters or 0) < 0 or args.timeout <= 0:
        parser.error("--concurrency, --warmup, --rows and --num-adapters must not be negative, --timeout positive")
    if not 0 <= args.token_ids[0] < args.token_ids[1]:
        parser.error("--token-ids must be low:high with 0 <= low < high")
    if args.adapters is not None and args.adapters_from_models:
        parser.error("give --adapters or --adapters-from-models, not both")
    return args


def plan(args: argparse.Namespace) -> tuple[Target, str, list[Call], list[Call]]:
    """The server, the base's name, the warm-up's calls and the measured ones. Raises ValueError and ServingError."""
    shape = {"rate": args.rate, "cv": args.cv, "alpha": args.alpha, "input": args.input, "output": args.output}
    Workload(args.requests, 0, mix=args.mix, seed=args.seed, **shape)  # refused before anything is asked of the server
    target = find_target(args.url, api_key=args.api_key, allow_remote=args.allow_remote)
    base: str | None = args.base
    listed: list[str] = []
    if base is None or args.adapters_from_models:
        base, listed = names_in(asyncio.run(list_models(target, args.timeout)), base)
    names = choose_names(args, listed)
    calls = make_calls(
        args, generate(Workload(args.requests, len(names), mix=args.mix, seed=args.seed, **shape)), base, names
    )
    warmup: list[Call] = []
    if args.warmup:
        other = Workload(args.warmup, 0, seed=args.seed + 1, **{**shape, "rate": 0.0})
        options = argparse.Namespace(**{**vars(args), "seed": args.seed + 1})  # prompts that the run does not repeat
        warmup = make_calls(options, generate(other), base, names)
    return target, base, warmup, calls


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the workload and prints the report; 0 without failed requests, 1 with, 2 for options, 130 after Ctrl-C."""
    args = parse(argv)
    try:
        target, base, warmup, calls = plan(args)
    except (ValueError, ServingError) as error:
        sys.stderr.write(f"serve.py: {error}\n")
        return 2
    with contextlib.suppress(ValueError, OSError):  # a connection per request in flight
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options: dict[str, Any] = {"timeout": args.timeout, "need_done": not args.done_optional}
    first, run = Run(warmup), Run(calls)
    try:
        asyncio.run(drive(target, first, concurrency=args.concurrency or WARMUP_CONCURRENCY, **options))
        wrong = [o for o in first.outcomes if o.error is not None]
        if wrong:
            sys.stderr.write(f"warm-up: {len(wrong)} of {len(warmup)} failed: {wrong[0].error} {wrong[0].detail}\n")
            if len(wrong) == len(warmup):
                return 1
        gc.collect()
        gc.freeze()
        options |= {"concurrency": args.concurrency, "stop_after": args.stop_after, "show": progress}
        asyncio.run(drive(target, run, **options))
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        gc.unfreeze()
    result = summarise(run, args.slo_ttft)
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    sys.stdout.write(tables(result, args.rows))
    for note in notes(result, args.rate):
        sys.stderr.write(f"note: {note}\n")
    shown = {key: value for key, value in vars(args).items() if key not in ("api_key", "out", "rows", "stop_after")}
    publish(
        {"benchmark": "serve", "environment": environment(), "options": shown, "base": base, "measured": result},
        args.out,
    )
    return 130 if run.interrupted else int(result["requests"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
