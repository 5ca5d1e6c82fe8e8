"""What Prometheus scrapes: the `vllm:` series that gateways and dashboards read, and `loramux_` series per adapter.

Gauges and the engine's counters are read from its latest snapshot when somebody scrapes; histograms are filled as
requests go by. Each application has a registry of its own. Adapters are shown by name, never by digest, and only a
bounded number of them have a label of their own.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from loramux import __version__
from loramux.router.policy import Decision
from loramux.server.engine.protocol import EngineClient, EngineDeadError, EngineStats
from loramux.server.observability.record import current
from loramux.server.observability.telemetry import OTHER

ShadowResult = Literal["agree", "disagree", "failed", "dropped"]
Status = Literal["stop", "length", "abort", "error", "rejected"]

MAX_DROPPED_LABELS = 4096
_OPENMETRICS = "application/openmetrics-text"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LABELS = ("model_name", "engine")
_TTFT = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_GAP = (
    .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_LATENCY = (
    .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_LOAD = (
    .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
_ADAPTER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # few: each adapter has a set
_ROUTING = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What the store holds, refreshed now and then: registered adapters and their bytes on disk."""

    adapters: int = 0
    bytes: int = 0


class EngineProcess(Protocol):
    """What is to be seen of the engine from outside: its process's id while there is one, and how often it was started
    again, by the reason (`died`, `stuck`)."""

    @property
    def pid(self) -> int | None:
        """The process's id."""

    @property
    def restarts(self) -> Mapping[str, int]:
        """Restarts so far."""


class AdapterLabels:
    """Which adapters have a label of their own: the first `limit` that were asked for and not deleted since.

    A request that outlives its adapter must not bring the label back: it counts as `other`. A new adapter of that name
    has a label again, for the requests that arrive after the deletion.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._statuses: dict[str, set[str]] = {}
        self._dropped: OrderedDict[str, float] = OrderedDict()

    def of(self, name: str, since: float) -> str:
        """The label for a request that arrived at `since` (`time.monotonic`): the name, or `other` for lack of room."""
        if name in self._statuses:
            return name
        if len(self._statuses) >= self._limit or self._dropped.get(name, since - 1) >= since:
            return OTHER
        self._statuses[name] = set()
        return name

    def used(self, label: str, status: str) -> None:
        """Remembers that a series with this status exists."""
        if label in self._statuses:
            self._statuses[label].add(status)

    def drop(self, name: str, now: float) -> set[str]:
        """Frees the adapter's place; returns the statuses of its series."""
        self._dropped[name] = now
        self._dropped.move_to_end(name)
        while len(self._dropped) > MAX_DROPPED_LABELS:
            self._dropped.popitem(last=False)
        return self._statuses.pop(name, set())

    def __contains__(self, name: object) -> bool:
        return name in self._statuses


@dataclass(slots=True)
class RequestTimes:
    """When one sequence's tokens arrived, in seconds of `time.monotonic`; `start` is the HTTP request's arrival,
    `scheduled` the engine's own reading of when it left the queue."""

    start: float
    scheduled: float | None = None
    first: float | None = None
    last: float | None = None

    def token(self, now: float) -> float | None:
        """Notes tokens that arrive together at `now`; seconds since those before them, None for the first."""
        gap = None if self.last is None else now - self.last
        if self.first is None:
            self.first = now
        self.last = now
        return gap


class Metrics:
    """All series of one server."""

    def __init__(
        self, engine: EngineClient, *, model_name: str, max_adapters: int, name_of: Callable[[str], str | None]
    ) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}
        self._adapters = AdapterLabels(max_adapters)
        self.store = StoreCounts()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineCollector(engine, self._labels, name_of, lambda: self.store))
        requests = CollectorRegistry(auto_describe=False)
        self.registry.register(_WithoutCreated(requests))

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(name, text, _LABELS, buckets=tuple(buckets), registry=requests)
            return made.labels(**self._labels)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_LABELS, *labels), registry=requests)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between tokens of one answer.", _GAP)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean per token after the first.", _GAP)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to first scheduled.", _LATENCY)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "First scheduled to first token.", _LATENCY)
        self._decode = histogram("vllm:request_decode_time_seconds", "First to last token.", _LATENCY)
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_sizes = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKENS)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens.").labels(**self._labels)
        self._generated = counter("vllm:generation_tokens", "Generated tokens.").labels(**self._labels)
        self._success = counter("vllm:request_success", "Requests by how they ended.", "finished_reason")
        self._load = Histogram(
            "loramux_adapter_load_seconds", "Disk or host to device.", buckets=_LOAD, registry=requests
        )
        self._requests = Counter(
            "loramux_requests", "Requests by adapter and end.", ("adapter", "status"), registry=requests
        )
        self._adapter_prompt = Counter(
            "loramux_prompt_tokens", "Prompt tokens by adapter.", ("adapter",), registry=requests
        )
        self._adapter_generated = Counter(
            "loramux_generation_tokens", "Generated tokens by adapter.", ("adapter",), registry=requests
        )
        self._adapter_ttft = Histogram(
            "loramux_time_to_first_token_seconds", "Arrival to first token by adapter.", ("adapter",),
            buckets=_ADAPTER_SECONDS, registry=requests,
        )  # fmt: skip
        self._adapter_latency = Histogram(
            "loramux_request_latency_seconds", "Arrival to last token by adapter.", ("adapter",),
            buckets=_ADAPTER_SECONDS, registry=requests,
        )  # fmt: skip
        self._http = Counter(
            "loramux_http_requests", "HTTP requests by route and status.", ("method", "route", "status"),
            registry=requests,
        )  # fmt: skip
        self._refused = Counter(
            "loramux_http_refusals", "Connections and request heads that were refused.", ("status",), registry=requests
        )
        self._routed = Counter(
            "loramux_router_decisions", "`auto` requests by what was chosen.", ("adapter",), registry=requests
        )
        self._rungs = Counter(
            "loramux_router_rung", "`auto` requests by the rung that decided.", ("rung",), registry=requests
        )
        self._abstained = Counter(
            "loramux_router_abstentions",
            "`auto` requests that no candidate fitted.",
            registry=requests,
        )
        self._routing = Histogram(
            "loramux_router_seconds", "Deciding an `auto` request.", buckets=_ROUTING, registry=requests
        )
        self._shadow = Counter(
            "loramux_router_shadow",
            "Named requests by whether the router agrees.",
            ("result",),
            registry=requests,
        )

    def watch_process(self, engine: EngineProcess) -> None:
        """Adds what the system says of the API's process and of the engine's, and the engine's restarts."""
        ProcessCollector(registry=self.registry)
        # 0 is no process: its folder is missing, and so are the engine's series while there is no engine
        ProcessCollector("loramux_engine", pid=lambda: engine.pid or 0, registry=self.registry)
        self.registry.register(_RestartCollector(engine, self._labels))

    def watch_connections(self, count: Callable[[], int], limit: int) -> None:
        """Adds how many connections are open, and how many may be."""
        self.registry.register(_ConnectionCollector(count, limit))

    def answered(self, method: str, route: str, status: int) -> None:
        """One HTTP request has ended; `route` is the path's pattern, never the path."""
        self._http.labels(method if method in METHODS else "other", route, str(status)).inc()

    def refused(self, status: int) -> None:
        """A connection or a request's head was refused, before the application saw a request."""
        self._refused.labels(str(status)).inc()

    def arrived(self, times: RequestTimes) -> None:
        """Tokens of one sequence have arrived just now."""
        gap = times.token(time.monotonic())
        if gap is not None:
            self._itl.observe(gap)

    def finished(
        self,
        names: Iterable[str],
        status: Status,
        times: RequestTimes,
        *,
        prompt_tokens: int,
        generated_tokens: int,
        cached_tokens: int = 0,
        model: str | None = None,
    ) -> None:
        """One sequence ended. `names` are its adapters, or the base's name; a fused set counts for each member.

        It goes into the record of the request that is being served, too; `model` is what the client asked for.
        """
        names = list(names)
        if times.first is not None and times.last is not None:
            self._ttft.observe(times.first - times.start)
            self._decode.observe(times.last - times.first)
            if times.scheduled is not None:
                self._queue.observe(times.scheduled - times.start)
                self._prefill.observe(times.first - times.scheduled)
            if generated_tokens > 1:
                self._tpot.observe((times.last - times.first) / (generated_tokens - 1))
            self._prompt.inc(prompt_tokens)
            self._generated.inc(generated_tokens)
            self._prompt_sizes.observe(prompt_tokens)
            self._answer_sizes.observe(generated_tokens)
        seconds = time.monotonic() - times.start
        if status != "rejected":
            self._e2e.observe(seconds)
            self._success.labels(**self._labels, finished_reason=status).inc()
        for name in names:
            label = self._adapters.of(name, times.start)
            self._adapters.used(label, status)
            self._requests.labels(label, status).inc()
            if times.first is not None:
                self._adapter_prompt.labels(label).inc(prompt_tokens)
                self._adapter_generated.labels(label).inc(generated_tokens)
                self._adapter_ttft.labels(label).observe(times.first - times.start)
                self._adapter_latency.labels(label).observe(seconds)
        record = current()
        if record is not None:
            record.model = model or record.model
            record.add_sequence(
                names, status, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens,
                generated_tokens=generated_tokens, scheduled=times.scheduled, first_token=times.first,
                last_token=times.last,
            )  # fmt: skip

    def routed(self, decision: Decision, base_name: str) -> None:
        """One `auto` request was decided; a set counts for each member, no member for the base."""
        record = current()
        since = time.monotonic() if record is None else record.arrived
        for name in [name for name, _ in decision.chosen] or [base_name]:
            self._routed.labels(self._adapters.of(name, since)).inc()
        self._rungs.labels(decision.rung).inc()
        if decision.abstained:
            self._abstained.inc()
        self._routing.observe(decision.milliseconds / 1e3)

    def shadowed(self, result: ShadowResult) -> None:
        """One named request was compared with what the router would have done, or could not be."""
        self._shadow.labels(result).inc()

    def take_events(self) -> None:
        """Moves what happened in the engine's steps into the histograms."""
        for event in self._engine.drain_events():
            if event.scheduled_tokens:
                self._step_tokens.observe(event.scheduled_tokens)
            for _, seconds in event.adapter_loads:
                self._load.observe(seconds)

    def forget_adapter(self, name: str) -> None:
        """Removes the series of an adapter that was deleted."""
        known = name in self._adapters
        statuses = self._adapters.drop(name, time.monotonic())
        if not known:
            return
        for status in statuses:
            self._requests.remove(name, status)
        for series in (
            self._adapter_prompt, self._adapter_generated, self._adapter_ttft, self._adapter_latency, self._routed,
        ):  # fmt: skip
            series.remove(name)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text that is scraped and its content type: OpenMetrics for those who accept it, else Prometheus' text.

        Names are written as they are. The library's own negotiation turns their colons into underscores for every
        scraper that does not ask for UTF-8 names, although colons were always allowed.
        """
        self.take_events()
        _, content_type = choose_encoder(accept)
        if content_type.startswith(_OPENMETRICS):
            encode: Callable[..., bytes] = openmetrics.generate_latest
            return encode(self.registry, ALLOWUTF8), f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"
        return generate_latest(self.registry, ALLOWUTF8), CONTENT_TYPE_PLAIN_0_0_4


class _WithoutCreated(Collector):
    """Another registry's series without their creation times, which nobody reads and which double a scrape's cost."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The families, filtered."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _RestartCollector(Collector):
    """How often the engine was started again."""

    def __init__(self, engine: EngineProcess, labels: Mapping[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """One counter by reason."""
        restarts = CounterMetricFamily(
            "loramux_engine_restarts", "Engine processes that were replaced.", labels=[*self._labels, "reason"]
        )
        for reason, count in self._engine.restarts.items():
            restarts.add_metric([*self._labels.values(), reason], count)
        yield restarts


class _ConnectionCollector(Collector):
    """Open connections and their limit."""

    def __init__(self, count: Callable[[], int], limit: int) -> None:
        self._count = count
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        """Two gauges."""
        yield GaugeMetricFamily("loramux_http_connections", "Open connections.", value=self._count())
        yield GaugeMetricFamily("loramux_http_connections_limit", "Connections that are served.", value=self._limit)


class _EngineCollector(Collector):
    """Series made from the engine's snapshot at the moment of the scrape."""

    def __init__(
        self,
        engine: EngineClient,
        labels: Mapping[str, str],
        name_of: Callable[[str], str | None],
        counts: Callable[[], StoreCounts],
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._name_of = name_of
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """All gauges and counters that the engine knows."""
        stats = self._engine.stats
        keys, values = list(self._labels), list(self._labels.values())

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, text, labels=keys)
            family.add_metric(values, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(name, text, labels=keys)
            family.add_metric(values, value)
            return family

        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield gauge("vllm:num_requests_running", "Requests in the running batch.", stats.running)
        yield gauge("vllm:num_requests_waiting", "Requests that wait.", stats.waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", used)
        yield counter("vllm:num_preemptions", "Sequences put back for lack of blocks.", stats.preemptions)
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queried_tokens)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hit_tokens)
        yield from self._from_info(stats)
        yield gauge("loramux_requests_waiting_for_adapter", "Requests whose adapter loads.", stats.waiting_for_adapter)
        yield gauge("loramux_engine_up", "1 while the engine serves.", float(self._engine.state == "ready"))
        yield counter("loramux_adapter_evictions", "Adapters dropped from the device.", stats.adapter_evictions)
        yield from self._tiers(stats)
        build = GaugeMetricFamily("loramux_build_info", "The server's version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _from_info(self, stats: EngineStats) -> Iterator[Metric]:
        """What needs the engine to have been ready once: the cache's shape, and the adapters' whereabouts."""
        try:
            info = self._engine.info
        except EngineDeadError:
            return
        cache = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=["block_size", "num_gpu_blocks"])
        cache.add_metric([str(info.block_size), str(info.num_blocks)], 1)
        yield cache
        running = self._names(stats.running_adapters)
        resident = self._names(item.digest for item in stats.adapters if item.device)
        on_device = list(dict.fromkeys([name for name in running if name in set(resident)] + resident))
        on_device = on_device[: max(info.max_num_seqs, len(running))]
        waiting = [name for name in self._names(stats.waiting_adapters) if name not in set(on_device)]
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device (in use first) and adapters that requests wait for; the value is the unix time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric([str(info.max_num_seqs), ",".join(on_device), ",".join(waiting)], time.time())
        yield lora

    def _names(self, digests: Iterable[str]) -> list[str]:
        """The adapters' names, without those that are unknown by now."""
        names = (self._name_of(digest) for digest in digests)
        return list(dict.fromkeys(name for name in names if name is not None))

    def _tiers(self, stats: EngineStats) -> Iterator[Metric]:
        """How many adapters, and bytes of them, lie on the device, in host memory and on disk."""
        counts = self._counts()
        adapters = GaugeMetricFamily("loramux_adapters", "Adapters by tier.", labels=["tier"])
        adapters.add_metric(["device"], sum(item.device for item in stats.adapters))
        adapters.add_metric(["host"], sum(item.host for item in stats.adapters))
        adapters.add_metric(["disk"], counts.adapters)
        yield adapters
        used = GaugeMetricFamily("loramux_adapter_bytes", "Bytes of adapters by tier.", labels=["tier"])
        used.add_metric(["device"], stats.device_adapter_bytes_used)
        used.add_metric(["host"], stats.host_adapter_bytes_used)
        used.add_metric(["disk"], counts.bytes)
        yield used
