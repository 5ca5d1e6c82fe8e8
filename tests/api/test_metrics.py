"""What is scraped: the gateway's names, histograms, and per-adapter series with a bound."""

import asyncio
import os

import pytest
from api.harness import BASE, END, Bench, in_process, make_bench, saying
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from loramux import __version__
from loramux.server.api.metrics import MAX_DROPPED_LABELS, AdapterLabels, RequestTimes
from loramux.server.engine.protocol import AdapterResidency, EngineError, EngineStats, QueueFullError, StepEvent
from loramux.server.observability.record import RequestRecord, serving
from loramux.server.observability.telemetry import OTHER

pytestmark = pytest.mark.anyio

LABELS = {"model_name": BASE, "engine": "0"}


class Scrape:
    """One scrape, by sample name and labels."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def of(self, name: str, **labels: str) -> float | None:
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) <= 1
        return found[0] if found else None

    def labels(self, name: str) -> list[dict[str, str]]:
        return [s.labels for s in self.samples if s.name == name]


async def scrape(bench: Bench) -> Scrape:
    response = await bench.client.get("/metrics")
    assert response.status_code == 200
    return Scrape(response.text)


async def test_gauges_and_counters_of_the_engine(bench: Bench) -> None:
    bench.engine.stats = EngineStats(
        running=3, waiting=2, waiting_for_adapter=1, blocks_total=64, blocks_used=16, preemptions=5,
        prefix_queried_tokens=100, prefix_hit_tokens=40, adapter_evictions=2, device_adapter_bytes_used=7,
    )  # fmt: skip
    found = await scrape(bench)
    for name, value in {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 2, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 5, "vllm:prefix_cache_queries_total": 100, "vllm:prefix_cache_hits_total": 40,
        "loramux_requests_waiting_for_adapter": 1, "loramux_adapter_evictions_total": 2, "loramux_engine_up": 1,
    }.items():  # fmt: skip
        assert found.of(name, **LABELS) == value, name
    assert found.of("vllm:cache_config_info", block_size="16", num_gpu_blocks="64") == 1
    assert found.of("loramux_adapter_bytes", tier="device") == 7


async def test_all_names_a_dashboard_reads(bench: Bench) -> None:
    await bench.chat()
    families = (await scrape(bench)).families
    for name in (
        "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
        "e2e_request_latency_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens "
        "iteration_tokens_total"
    ).split():
        assert families[f"vllm:{name}"].type == "histogram", name
    for name in ("prompt_tokens", "generation_tokens", "request_success"):
        assert families[f"vllm:{name}"].type == "counter", name


async def test_requests_are_counted(bench: Bench) -> None:
    await bench.chat()
    await bench.chat(stream=True)
    bench.engine.script = saying("hello", end=False)
    await bench.complete(max_tokens=3)
    found = await scrape(bench)
    assert found.of("vllm:request_success_total", finished_reason="stop", **LABELS) == 2
    assert found.of("vllm:request_success_total", finished_reason="length", **LABELS) == 1
    assert found.of("vllm:prompt_tokens_total", **LABELS) == 6 + 6 + 2
    assert found.of("vllm:generation_tokens_total", **LABELS) == 6 + 6 + 3
    assert found.of("vllm:time_to_first_token_seconds_count", **LABELS) == 3
    assert found.of("vllm:e2e_request_latency_seconds_count", **LABELS) == 3
    assert found.of("vllm:inter_token_latency_seconds_count", **LABELS) == 5 + 5 + 2
    assert found.of("vllm:request_prompt_tokens_sum", **LABELS) == 14
    assert found.of("loramux_requests_total", adapter=BASE, status="stop") == 2
    assert found.of("loramux_generation_tokens_total", adapter=BASE) == 15


async def test_overshoot_is_not_counted(bench: Bench) -> None:
    bench.engine.script = saying("ab.cdefgh", per_step=9, end=False)
    await bench.complete(stop=".")
    assert (await scrape(bench)).of("vllm:generation_tokens_total", **LABELS) == 3


async def test_failures_are_counted_apart(bench: Bench) -> None:
    bench.engine.script = lambda request: [QueueFullError("full")]
    await bench.chat()
    bench.engine.script = lambda request: [[97], EngineError("x")]
    await bench.chat()
    found = await scrape(bench)
    assert found.of("loramux_requests_total", adapter=BASE, status="rejected") == 1
    assert found.of("loramux_requests_total", adapter=BASE, status="error") == 1
    assert found.of("vllm:request_success_total", finished_reason="stop") is None
    assert found.of("vllm:prompt_tokens_total", **LABELS) == 6


async def test_adapters_by_name(bench: Bench) -> None:
    bench.put("a", 1)
    bench.put("b", 2)
    await bench.chat(model="a")
    await bench.chat(model="a@1")
    await bench.chat(adapters=[{"name": "a"}, {"name": "b"}])
    found = await scrape(bench)
    assert found.of("loramux_requests_total", adapter="a", status="stop") == 3
    assert found.of("loramux_requests_total", adapter="b", status="stop") == 1
    assert found.of("loramux_prompt_tokens_total", adapter="a") == 18
    assert found.of("loramux_generation_tokens_total", adapter="b") == 6


async def test_label_sets_are_bounded_and_cleaned(make) -> None:
    bench = await make(metrics_max_adapters=2)
    for name in "abc":
        bench.put(name, ord(name))
        await bench.chat(model=name)
    assert {s["adapter"] for s in (await scrape(bench)).labels("loramux_requests_total")} == {"a", "b", "other"}
    await bench.client.delete("/v1/adapters/a")
    await bench.client.delete("/v1/adapters/c")
    found = await scrape(bench)
    for series in ("requests", "prompt_tokens", "generation_tokens"):
        assert {s["adapter"] for s in found.labels(f"loramux_{series}_total")} == {"b", "other"}
    bench.put("d", 4)
    await bench.chat(model="d")
    assert (await scrape(bench)).of("loramux_requests_total", adapter="d", status="stop") == 1


async def test_latency_by_adapter(bench: Bench) -> None:
    bench.put("a", 1)
    bench.put("b", 2)
    await bench.chat(model="a")
    await bench.chat(adapters=[{"name": "a"}, {"name": "b"}])
    await bench.chat()
    found = await scrape(bench)
    for name, count in (("a", 2), ("b", 1), (BASE, 1)):
        for series in ("time_to_first_token", "request_latency"):
            assert found.of(f"loramux_{series}_seconds_count", adapter=name) == count


async def test_a_request_that_outlives_its_adapter_does_not_bring_its_label_back(bench: Bench) -> None:
    bench.put("a", 1)
    go = asyncio.Event()
    bench.engine.script = lambda request: [[97], go.wait(), [END]]
    running = asyncio.create_task(bench.chat(model="a"))
    while not bench.engine.running:
        await asyncio.sleep(0)
    await bench.client.delete("/v1/adapters/a")
    go.set()
    assert (await running).status_code == 200
    found = await scrape(bench)
    assert found.of("loramux_requests_total", adapter="other", status="stop") == 1
    assert not [s for s in found.samples if s.labels.get("adapter") == "a"]
    bench.put("a", 1)
    bench.engine.script = saying("x")
    await bench.chat(model="a")  # a new adapter of that name is shown again
    assert (await scrape(bench)).of("loramux_requests_total", adapter="a", status="stop") == 1


def test_deleted_labels_are_remembered_within_a_bound() -> None:
    labels = AdapterLabels(2)
    for number in range(MAX_DROPPED_LABELS + 1):
        labels.drop(f"n{number}", 5.0)
    assert labels.of("n1", 5.0) == OTHER
    assert labels.of("n0", 5.0) == "n0"  # forgotten: it may be shown
    assert labels.of("n1", 6.0) == "n1"
    assert labels.of("more", 9.0) == OTHER


async def test_http_requests_by_route_and_status(bench: Bench) -> None:
    bench.put("a", 1)
    await bench.chat()
    await bench.chat(model="nope")
    await bench.client.get("/v1/models/a")
    await bench.client.get("/v1/models/none")
    await bench.client.get("/v1/nothing/to/be/found")
    await bench.client.request("BREW", "/v1/models")
    found = await scrape(bench)

    def count(method: str, route: str, status: str) -> float | None:
        return found.of("loramux_http_requests_total", method=method, route=route, status=status)

    assert count("POST", "/v1/chat/completions", "200") == 1
    assert count("POST", "/v1/chat/completions", "404") == 1
    assert count("GET", "/v1/models/{id:path}", "200") == 1
    assert count("GET", "/v1/models/{id:path}", "404") == 1
    assert count("GET", "unmatched", "404") == 1
    methods = {s["method"] for s in found.labels("loramux_http_requests_total")}
    assert methods == {"GET", "POST", "other"}  # a client cannot make labels
    assert not [s for s in found.samples if "/nothing" in str(s.labels)]


async def test_the_record_of_a_request(bench: Bench) -> None:
    times = RequestTimes(1.0, scheduled=1.5, first=2.0, last=4.0)
    with serving(RequestRecord("id", 1.0)) as record:
        for cached in (3, 4):
            bench.state.metrics.finished(
                ["a", "b"], "stop", times, prompt_tokens=10, generated_tokens=5, cached_tokens=cached, model="m"
            )
    assert (record.model, record.served, record.finish_reasons) == ("m", ("a", "b"), ["stop", "stop"])
    assert (record.prompt_tokens, record.cached_tokens, record.generated_tokens) == (20, 7, 10)
    assert (record.queue_seconds, record.prefill_seconds, record.decode_seconds) == (0.5, 0.5, 2.0)
    assert record.token_seconds == [0.5, 0.5]


class Process:
    """An engine's process as the metrics see it."""

    def __init__(self) -> None:
        self.pid: int | None = os.getpid()
        self.restarts = {"died": 2, "stuck": 0}


async def test_processes_and_connections(bench: Bench) -> None:
    process = Process()
    bench.state.metrics.watch_process(process)
    bench.state.metrics.watch_connections(lambda: 7, 9)
    found = await scrape(bench)
    for prefix in ("process", "loramux_engine_process"):
        assert found.of(f"{prefix}_resident_memory_bytes") > 1 << 20
        assert found.of(f"{prefix}_cpu_seconds_total") > 0
        assert found.of(f"{prefix}_open_fds") > 0
    assert found.of("loramux_engine_restarts_total", reason="died") == 2
    assert found.of("loramux_engine_restarts_total", reason="stuck") == 0
    assert (found.of("loramux_http_connections"), found.of("loramux_http_connections_limit")) == (7, 9)
    assert found.of("loramux_build_info", version=__version__) == 1
    process.pid = None
    found = await scrape(bench)
    assert found.of("loramux_engine_process_resident_memory_bytes") is None
    assert found.of("process_resident_memory_bytes") is not None


async def lora_info(bench: Bench) -> tuple[list[str], list[str]]:
    (labels,) = (await scrape(bench)).labels("vllm:lora_requests_info")
    assert labels["max_lora"] == "8"
    split = [
        labels[key].split(",") if labels[key] else [] for key in ("running_lora_adapters", "waiting_lora_adapters")
    ]
    return split[0], split[1]


async def test_lora_requests_info(bench: Bench) -> None:
    assert await lora_info(bench) == ([], [])
    digests = {}
    for name in "abcd":
        digests[name] = bench.put(name, ord(name)).digest
        await bench.chat(model=name)

    def place(name: str, *, device: bool, users: int = 0) -> AdapterResidency:
        return AdapterResidency(digests[name], device, True, False, users, 10)

    bench.engine.stats = EngineStats(
        adapters=(place("a", device=True), place("b", device=True, users=1), place("c", device=False)),
        running_adapters=(digests["b"],),
        waiting_adapters=(digests["c"], digests["b"], digests["d"], "sha256:unknown"),
    )
    running, waiting = await lora_info(bench)
    assert running == ["b", "a"]  # resident, those in use first
    assert waiting == ["c", "d"]  # disjoint, and no digest
    found = await scrape(bench)
    value = found.of("vllm:lora_requests_info")
    assert value is not None
    assert value > 1.7e9
    assert {tier: found.of("loramux_adapters", tier=tier) for tier in ("device", "host", "disk")} == {
        "device": 2, "host": 3, "disk": 0,
    }  # fmt: skip


async def test_the_disk_tier_follows_uploads(bench: Bench) -> None:
    await bench.upload("a", 1)
    await bench.upload("b", 1)
    await bench.upload("b", 2)
    assert (await scrape(bench)).of("loramux_adapters", tier="disk") == 2
    await bench.client.delete("/v1/adapters/b")
    found = await scrape(bench)
    assert found.of("loramux_adapters", tier="disk") == 1
    assert found.of("loramux_adapter_bytes", tier="disk") > 0


async def test_step_events(bench: Bench) -> None:
    bench.engine.events = [StepEvent(5), StepEvent(0, (("d", 0.02),)), StepEvent(7, (("e", 0.5), ("f", 1.0)))]
    found = await scrape(bench)
    assert found.of("vllm:iteration_tokens_total_count", **LABELS) == 2
    assert found.of("vllm:iteration_tokens_total_sum", **LABELS) == 12
    assert found.of("loramux_adapter_load_seconds_count") == 3
    assert found.of("vllm:iteration_tokens_total_count", **LABELS) == 2


async def test_content_negotiation(bench: Bench) -> None:
    plain = await bench.client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = await bench.client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
    assert any(family.name == "vllm:num_requests_running" for family in parse_openmetrics(response.text))
    assert "_created" not in plain.text


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",  # Prometheus 2
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.4",  # 3
        "application/openmetrics-text", "text/plain;version=1.0.0;escaping=underscores", "text/plain;version=0.0.4",
        "application/vnd.google.protobuf;q=0.7,text/plain;version=0.0.4;q=0.3", "*/*", "",
    ],
)  # fmt: skip
async def test_every_scraper_gets_the_names_as_they_are(bench: Bench, accept: str) -> None:
    await bench.chat()
    response = await bench.client.get("/metrics", headers={"accept": accept})
    is_open = "openmetrics" in response.headers["content-type"]
    parse = parse_openmetrics if is_open else text_string_to_metric_families
    assert is_open == ("openmetrics" in accept)
    samples = {sample.name for family in parse(response.text) for sample in family.samples}
    assert {"vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:iteration_tokens_total_count"} <= samples
    assert "loramux_http_requests_total" in samples


async def test_registries_are_apart(make, tmp_path) -> None:
    bench = await make()
    await bench.chat()
    async with in_process(make_bench(tmp_path / "second")) as other:
        assert (await scrape(other)).of("vllm:request_success_total", finished_reason="stop") is None


async def test_before_the_first_ready(make) -> None:
    bench = await make()
    bench.engine.info_value, bench.engine.state = None, "starting"
    found = await scrape(bench)
    assert found.of("loramux_engine_up", **LABELS) == 0
    assert found.of("vllm:num_requests_running", **LABELS) == 0
