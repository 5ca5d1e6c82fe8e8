"""What a collector gets: an OTLP/HTTP server in this process, real exporters, real spans."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, END, Bench, in_process, make_bench
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loramux import __version__
from loramux.adapters_store.names import LOCAL_TENANT
from loramux.server.engine.protocol import EngineDeadError, EngineOutput, QueueFullError
from loramux.server.observability.telemetry import OTHER, Telemetry

pytestmark = pytest.mark.anyio

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the-secret-of-the-prompt"


class Collector:
    """An OTLP/HTTP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.bodies.append((self.path, body))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def spans(self) -> list[Any]:
        found = []
        for path, body in self.bodies:
            if path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    assert attributes(resource.resource)["service.name"] == "loramux"
                    found += [span for scope in resource.scope_spans for span in scope.spans]
        return found

    def metrics(self) -> dict[str, Any]:
        found = {}
        for path, body in self.bodies:
            if path == "/v1/metrics":
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    found |= {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
        return found


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes(item: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in item.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


@pytest.fixture
def traced(tmp_path: Path, collector: Collector) -> Callable[..., Any]:
    """A server that sends to the collector; what it has sent is complete when the context ends."""

    @asynccontextmanager
    async def build() -> Any:
        telemetry = Telemetry.to(collector.url, service="loramux", max_models=8)
        async with AsyncExitStack() as stack:
            yield await stack.enter_async_context(in_process(make_bench(tmp_path, telemetry=telemetry)))

    return build


async def test_a_span_per_request(traced: Any, collector: Collector) -> None:
    async with traced() as bench:
        bench.put("skill")
        first = EngineOutput("", (97,), scheduled_at=0.0)
        bench.engine.script = lambda request: [first, [98], [END]]
        response = await bench.client.post(
            "/v1/chat/completions",
            json={"model": "skill", "messages": [{"role": "user", "content": SECRET}], "user": SECRET, "stream": True},
            headers={"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": "r1"},
        )
        assert response.status_code == 200
        await bench.client.get("/health")
        await bench.client.get("/v1/models")
    chat, models = collector.spans()
    assert chat.trace_id.hex() == PARENT.split("-")[1]
    assert chat.parent_span_id.hex() == PARENT.split("-")[2]
    assert chat.trace_state == "vendor=1"
    assert chat.name == "chat skill"
    assert chat.kind == 2  # a server's
    found = attributes(chat)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "loramux"
    assert found["gen_ai.response.model"] == "skill"
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (len(SECRET) + 4, 3)
    assert found["gen_ai.usage.cache_read.input_tokens"] == 0
    assert found["loramux.request_id"] == "r1"
    assert found["loramux.tenant"] == LOCAL_TENANT
    assert found["loramux.served"] == ["skill"]
    assert found["http.response.status_code"] == 200
    assert {event.name for event in chat.events} >= {"queued", "decode"}
    assert chat.start_time_unix_nano <= chat.events[-1].time_unix_nano <= chat.end_time_unix_nano
    assert chat.status.code == 0
    assert models.name == "GET /v1/models"
    assert not models.parent_span_id
    assert "gen_ai.operation.name" not in attributes(models)
    assert not any(SECRET.encode() in body for _, body in collector.bodies)


@pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "x" * 5000])
async def test_a_wrong_traceparent_starts_a_trace(traced: Any, collector: Collector, parent: str) -> None:
    async with traced() as bench:
        assert (await bench.client.get("/version", headers={"traceparent": parent})).status_code == 200
    (span,) = collector.spans()
    assert len(span.trace_id) == 16
    assert not span.parent_span_id


async def test_failures(traced: Any, collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with traced() as bench:
        bench.engine.script = lambda request: [QueueFullError("full")]
        await bench.chat()
        bench.engine.script = lambda request: [[97], EngineDeadError("died")]
        await bench.chat(stream=True)
        await bench.chat(model="nope")
    spans = collector.spans()
    assert [attributes(span)["error.type"] for span in spans] == ["503", "error", "404"]
    assert [span.status.code for span in spans] == [2, 2, 0]  # what a client did wrong is no failure of the server
    logged = [r.fields["trace_id"] for r in caplog.records if r.name == "loramux.access"]
    assert logged == [span.trace_id.hex() for span in spans]
    points = collector.metrics()["gen_ai.server.request.duration"].histogram.data_points
    assert {attributes(point).get("error.type"): point.count for point in points} == {"503": 1, "error": 1, "404": 1}
    assert "gen_ai.server.time_to_first_token" not in collector.metrics()


async def test_metrics(traced: Any, collector: Collector) -> None:
    async with traced() as bench:
        await bench.chat()
        await bench.complete(prompt=["a", "b"])
        await bench.client.get("/v1/models")
    found = collector.metrics()
    counts = {}
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        metric = found[f"gen_ai.server.{name}"]
        assert metric.unit == "s"
        for point in metric.histogram.data_points:
            shared = attributes(point)
            assert shared["gen_ai.provider.name"] == "loramux"
            assert shared["gen_ai.response.model"] == BASE
            counts[name, shared["gen_ai.operation.name"]] = point.count
    assert counts == {
        ("request.duration", "chat"): 1, ("request.duration", "text_completion"): 1,
        ("time_to_first_token", "chat"): 1, ("time_to_first_token", "text_completion"): 1,
        ("time_per_output_token", "chat"): 1, ("time_per_output_token", "text_completion"): 2,
    }  # fmt: skip
    assert found["gen_ai.server.request.duration"].histogram.data_points[0].explicit_bounds[:2] == [0.01, 0.02]


async def test_metrics_name_a_bounded_number_of_models(traced: Any, collector: Collector) -> None:
    async with traced() as bench:
        for number in range(10):
            await bench.upload(f"skill{number}")
            await bench.chat(model=f"skill{number}@1")
    points = collector.metrics()["gen_ai.server.request.duration"].histogram.data_points
    assert {attributes(point)["gen_ai.request.model"] for point in points} == {*(f"skill{n}" for n in range(8)), OTHER}
    assert sum(point.count for point in points) == 10
    asked = {attributes(span).get("gen_ai.request.model") for span in collector.spans()}
    assert asked >= {f"skill{number}@1" for number in range(10)}


async def test_a_collector_that_is_down_harms_no_request(bench: Bench, tmp_path: Path) -> None:
    telemetry = Telemetry.to("http://127.0.0.1:9", service="loramux", max_models=8)
    async with in_process(make_bench(tmp_path / "other", telemetry=telemetry)) as traced:
        assert (await traced.chat()).status_code == 200


def test_without_the_packages_the_option_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('opentelemetry.exporter'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from loramux.server.cli import main\n"
        f"sys.exit(main(['serve', '--port', '0', '--store-dir', {str(tmp_path)!r}, '--otlp-endpoint', 'http://x:1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--otlp-endpoint" in done.stderr
    assert "pip install 'loramux[otel]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_sent(collector: Collector) -> None:
    telemetry = Telemetry.to(collector.url + "/", service="loramux", max_models=8)
    telemetry.start([], 0.0)._span.end()
    telemetry.shutdown()
    (body,) = [body for path, body in collector.bodies if path == "/v1/traces"]
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert attributes(resource.resource)["service.version"] == __version__
