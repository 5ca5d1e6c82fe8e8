"""The flags of a run."""

import argparse
import json
import math
from pathlib import Path

from loramux.server.bench.workload import MIXES


def bounds(text: str) -> tuple[int, int]:
    """`low:high` as two integers."""
    low, _, high = text.partition(":")
    return int(low), int(high)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, but for `--url` and `--api-key`."""
    add = parser.add_argument
    add("--allow-remote", action="store_true", help="load a server that is not on this machine's loopback")
    add("--base", help="the base's name (default: the first of GET /v1/models without a parent)")
    add("--adapters", metavar="NAME-{i}|FILE", help="names with {i} from 0, or a file with one name per line")
    add("--adapters-from-models", action="store_true", help="the adapters that GET /v1/models lists")
    add("--num-adapters", type=int, metavar="N", help="how many of them (0: the base alone)")
    add("--mix", choices=MIXES, default="slora", help="who gets the requests (default: slora)")
    add("--alpha", type=float, default=1.0, help="skew of slora's mix: 1 uniform, smaller more skewed")
    add("--rate", type=float, default=2.0, help="requests per second; 0: as soon as --concurrency allows (default: 2)")
    add("--cv", type=float, default=1.0, help="burstiness of the gaps; 1 is Poisson (default)")
    add("--concurrency", type=int, default=0, metavar="N", help="most requests in flight (0: no bound)")
    add("--requests", type=int, metavar="N", help="length of the trace (default: rate x duration)")
    add("--duration", type=float, metavar="SECONDS", help="seconds (default 60); beside --requests, none is sent later")
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
    add("--warmup", type=int, default=3, metavar="N", help="requests to the base before the measured ones")
    add("--slo-ttft", type=float, default=6.0, metavar="SECONDS", help="S-LoRA's bound")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="seconds that a request may take")
    add("--rows", type=int, default=20, metavar="N", help="adapters in the printed table")
    add("--out", type=Path, metavar="FILE", help="also write the JSON here")


def check(args: argparse.Namespace) -> None:
    """Fills in what follows from other flags. Raises ValueError for those that cannot be."""
    args.stop_after = math.inf if args.requests is None or args.duration is None else args.duration
    if args.requests is None:
        expected = args.rate * (60.0 if args.duration is None else args.duration)
        if not 1 <= expected < 2**32:
            raise ValueError("--rate times --duration gives no request; --rate 0 needs --requests")
        args.requests = int(expected)
    if not isinstance(args.extra_body, dict):
        raise ValueError("--extra-body must be a JSON object")
    if min(args.concurrency, args.warmup, args.rows, args.num_adapters or 0) < 0 or args.timeout <= 0:
        raise ValueError("--concurrency, --warmup, --rows and --num-adapters must not be negative, --timeout positive")
    if not 0 <= args.token_ids[0] < args.token_ids[1]:
        raise ValueError("--token-ids must be low:high with 0 <= low < high")
    if args.adapters is not None and args.adapters_from_models:
        raise ValueError("give --adapters or --adapters-from-models, not both")
