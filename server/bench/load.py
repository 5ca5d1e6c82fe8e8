"""Draws the requests of a run, sends them when they are due, and sums up what came of them.

Measured per request, in seconds, on a fresh connection each:

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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loramux.server.bench.http_client import Target, find_target
from loramux.server.bench.latency import Run, summarise
from loramux.server.bench.openai_stream import Call, Outcome, ask, list_models
from loramux.server.bench.workload import Request, Workload, generate, prompt_ids, prompt_words

WARMUP_CONCURRENCY = 8
NOT_SHOWN = frozenset({"api_key", "out", "rows", "stop_after", "json", "run", "command"})

Show = Callable[[Run, float], None]


class WarmUpError(Exception):
    """Every request of the warm-up failed: there is nothing to measure."""


async def drive(
    target: Target,
    run: Run,
    *,
    concurrency: int,
    timeout: float,
    need_done: bool = True,
    stop_after: float = math.inf,
    show: Show | None = None,
) -> None:
    """Sends the run's calls when they are due, at most `concurrency` at once (0: no bound), and waits for the answers.

    None is sent later than `stop_after` seconds. `show` is called every second. What was measured is in `run` even when
    this is cancelled.
    """
    gate = asyncio.Semaphore(concurrency or max(len(run.calls), 1))
    start, cpu = time.perf_counter(), time.process_time()

    async def report(show: Show) -> None:
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


def measure(args: argparse.Namespace, *, show: Show, warn: Callable[[str], None]) -> dict[str, Any]:
    """One run: {"options", "base", "measured"}. Ctrl-C ends it early, and what was measured counts.

    `show` sees the measured part every second; `warn` gets what is wrong but no reason to stop. Raises ValueError for
    options that do not fit, ServingError for a server that lists no models, WarmUpError when no warm-up request works.
    """
    target, base, warmup, calls = plan(args)
    with contextlib.suppress(ValueError, OSError):  # a connection per request in flight
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options: dict[str, Any] = {"timeout": args.timeout, "need_done": not args.done_optional}
    first, run = Run(warmup), Run(calls)
    try:
        asyncio.run(drive(target, first, concurrency=args.concurrency or WARMUP_CONCURRENCY, **options))
        wrong = [o for o in first.outcomes if o.error is not None]
        if wrong:
            text = f"warm-up: {len(wrong)} of {len(warmup)} failed: {wrong[0].error} {wrong[0].detail}"
            if len(wrong) == len(warmup):
                raise WarmUpError(text)
            warn(text)
        gc.collect()
        gc.freeze()
        options |= {"concurrency": args.concurrency, "stop_after": args.stop_after, "show": show}
        asyncio.run(drive(target, run, **options))
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        gc.unfreeze()
    shown = {key: value for key, value in vars(args).items() if key not in NOT_SHOWN}
    return {"benchmark": "serve", "options": shown, "base": base, "measured": summarise(run, args.slo_ttft)}


def status_of(result: dict[str, Any]) -> int:
    """The exit status of a run: 0 without failed requests, 1 with, 130 after Ctrl-C."""
    measured = result["measured"]
    return 130 if measured["interrupted"] else int(measured["requests"]["failed"] > 0)


def line_of(run: Run, seconds: float) -> str:
    """Where a run is, in one line."""
    done = sum(o.completed for o in run.outcomes)
    failed = sum(o.error is not None for o in run.outcomes)
    sent = len(run.outcomes)
    speed = sum(o.tokens for o in run.outcomes) / seconds
    return (
        f"{seconds:5.0f} s  sent {sent}/{len(run.calls)}  running {sent - done - failed}  done {done}  "
        f"failed {failed}  {speed:.0f} tok/s"
    )
