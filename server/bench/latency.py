"""The report of a run: latencies, the SLO and fairness, over all requests and per adapter, as values and as tables."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux.server.bench.openai_stream import Call, Outcome
from loramux.server.bench.tables import table

LATE_SECONDS = 0.1


@dataclass(slots=True)
class Run:
    """The calls of a run and, once it is over (or interrupted), all that was measured."""

    calls: list[Call]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile of sorted values, interpolated linearly."""
    position = (len(values) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """count, mean, p50, p90, p99 and max; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    points = {f"p{q}": percentile(ordered, q) for q in (50, 90, 99)}
    return {"count": len(ordered), "mean": math.fsum(ordered) / len(ordered), **points, "max": ordered[-1]}


def jain(values: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything; None without any."""
    squares = math.fsum(x * x for x in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else None


def gaps(outcomes: Iterable[Outcome]) -> list[float]:
    """All inter-token latencies."""
    return [b - a for o in outcomes for a, b in zip(o.times, o.times[1:], strict=False)]


def by_use(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes, in the order of sending, as cold, joined and warm uses of their adapter."""
    answered: dict[str, float] = {}
    for o in outcomes:
        if o.times:
            answered[o.call.adapter] = min(o.times[0], answered.get(o.call.adapter, math.inf))
    uses: dict[str, list[Outcome]] = {"cold": [], "joined": [], "warm": []}
    seen: set[str] = set()
    for o in outcomes:
        if o.call.adapter not in seen:
            uses["cold"].append(o)
        else:
            uses["warm" if o.sent >= answered.get(o.call.adapter, math.inf) else "joined"].append(o)
        seen.add(o.call.adapter)
    return uses


def describe(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One adapter's row: counts, tokens and latencies of its requests; failed ones have a speed of 0."""
    completed = [o for o in outcomes if o.completed]
    speeds = [o.tokens / o.seconds if o.completed and o.seconds > 0 else 0.0 for o in outcomes if o.ended is not None]
    return {
        "requests": len(outcomes), "completed": len(completed), "failed": sum(o.error is not None for o in outcomes),
        "output_tokens": sum(o.tokens for o in completed), "ttft_seconds": spread(ttfts(completed)),
        "itl_seconds": spread(gaps(completed)), "mean_tokens_per_second": math.fsum(speeds) / max(len(speeds), 1),
    }  # fmt: skip


def ttfts(outcomes: Iterable[Outcome]) -> list[float]:
    """The first-token latencies that there are."""
    return [o.ttft for o in outcomes if o.ttft is not None]


def summarise(run: Run, slo_ttft: float) -> dict[str, Any]:
    """Everything that is reported about a run; latencies are of completed requests, interrupted ones count nowhere."""
    ended = [o for o in run.outcomes if o.ended is not None]
    completed = [o for o in ended if o.completed]
    errors: dict[str, dict[str, Any]] = {}
    for o in ended:
        if o.error is not None:
            errors.setdefault(o.error, {"count": 0, "first": o.detail})["count"] += 1
    groups: dict[str, list[Outcome]] = {}
    for o in run.outcomes:
        groups.setdefault(o.call.adapter, []).append(o)
    adapters = {name: describe(group) for name, group in groups.items()}
    spoken = [o for o in completed if o.times and o.tokens > 1]
    seconds = run.seconds or math.inf
    tokens = sum(o.tokens for o in completed)
    attained = sum(o.ttft is not None and o.ttft < slo_ttft for o in completed)
    return {
        "interrupted": run.interrupted, "seconds": run.seconds, "errors": errors, "adapters": adapters,
        "requests": {
            "planned": len(run.calls), "sent": len(run.outcomes), "completed": len(completed),
            "failed": len(ended) - len(completed), "unfinished": len(run.outcomes) - len(ended),
            "without_text": sum(not o.times for o in completed),
            "without_usage": sum(o.usage_tokens is None for o in completed),
        },
        "prompt_tokens": sum(o.prompt_tokens for o in completed), "output_tokens": tokens,
        "requests_per_second": len(completed) / seconds, "output_tokens_per_second": tokens / seconds,
        "ttft_seconds": spread(ttfts(completed)),
        **{f"ttft_{use}_seconds": spread(ttfts(o for o in uses if o.completed))
           for use, uses in by_use(run.outcomes).items()},
        "itl_seconds": spread(gaps(completed)),
        "tpot_seconds": spread((o.times[-1] - o.times[0]) / (o.tokens - 1) for o in spoken),
        "e2e_seconds": spread(o.seconds for o in completed),
        "slo": {"ttft_seconds": slo_ttft, "attained": attained, "attainment": attained / len(ended) if ended else None},
        "fairness": {
            "jain_output_tokens": jain([row["output_tokens"] for row in adapters.values()]),
            "jain_tokens_per_second": jain([row["mean_tokens_per_second"] for row in adapters.values()]),
        },
        "client": {
            "send_lag_seconds": spread(max(o.sent - o.due, 0.0) for o in run.outcomes),
            "cpu_share": run.cpu_seconds / seconds,
        },
    }  # fmt: skip


def milliseconds(value: float | None) -> str:
    """For a table."""
    return "-" if value is None else f"{value * 1000:.1f}"


def tables(result: dict[str, Any], rows: int) -> str:
    """The summary as text: totals, latencies, errors, and the `rows` adapters with the most requests."""
    counts, slo, fairness = result["requests"], result["slo"], result["fairness"]
    attainment = "-" if slo["attainment"] is None else f"{slo['attainment']:.1%}"
    totals = [
        ["run", ""], ["seconds", f"{result['seconds']:.1f}"],
        ["requests completed / sent / planned", f"{counts['completed']} / {counts['sent']} / {counts['planned']}"],
        ["failed, unfinished", f"{counts['failed']}, {counts['unfinished']}"],
        ["requests/s", f"{result['requests_per_second']:.2f}"],
        ["output tokens/s", f"{result['output_tokens_per_second']:.1f}"],
        [f"TTFT below {slo['ttft_seconds']:g} s", attainment],
        *([f"Jain index, {key.removeprefix('jain_').replace('_', ' ')}", "-" if value is None else f"{value:.3f}"]
          for key, value in fairness.items()),
    ]  # fmt: skip
    points = ("mean", "p50", "p90", "p99", "max")
    latencies = [["ms", "count", *points]]
    for label, key in (
        ("TTFT", "ttft_seconds"), ("TTFT, cold", "ttft_cold_seconds"), ("TTFT, joined", "ttft_joined_seconds"),
        ("TTFT, warm", "ttft_warm_seconds"), ("ITL", "itl_seconds"), ("TPOT", "tpot_seconds"), ("E2E", "e2e_seconds"),
    ):  # fmt: skip
        values = result[key]
        latencies.append([label, str(values["count"]), *(milliseconds(values[p]) for p in points)])
    parts = [table(totals), table(latencies)]
    if result["errors"]:
        lines = [["error", "count"], *([kind, str(e["count"])] for kind, e in result["errors"].items())]
        parts.append(table(lines))
    ranked = sorted(result["adapters"].items(), key=lambda item: (-item[1]["requests"], item[0]))
    lines = [["adapter", "requests", "tokens", "TTFT mean ms", "TTFT p99 ms", "ITL mean ms", "errors"]]
    for name, row in ranked[:rows]:
        ttft, itl = row["ttft_seconds"], row["itl_seconds"]
        cells = [milliseconds(ttft["mean"]), milliseconds(ttft["p99"]), milliseconds(itl["mean"]), str(row["failed"])]
        lines.append([name, str(row["requests"]), str(row["output_tokens"]), *cells])
    text = table(lines)
    parts.append(text + (f"\n({len(ranked) - rows} more in the JSON)" if len(ranked) > rows else ""))
    return "\n\n".join(parts) + "\n\n"


def notes(result: dict[str, Any], rate: float) -> list[str]:
    """What a reader must know before believing the numbers of a run at `rate` requests per second (0: no schedule)."""
    counts, client = result["requests"], result["client"]
    late = client["send_lag_seconds"]["p99"] or 0.0
    found = []
    if late > LATE_SECONDS and rate > 0:
        found.append(f"requests left late (p99 {late:.2f} s), held by --concurrency or by a busy client")
    if client["cpu_share"] > 0.8:
        found.append(f"the client used {client['cpu_share']:.0%} of a core: latencies include its own queue")
    if counts["without_text"]:
        found.append(f"{counts['without_text']} answers had no text: TTFT is their end (see --return-token-ids)")
    if counts["without_usage"]:
        found.append(f"{counts['without_usage']} answers came without usage: tokens are arrivals or ids")
    return found
