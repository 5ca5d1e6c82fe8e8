"""OpenTelemetry by option: a span per request and the GenAI server metrics, sent over OTLP/HTTP.

Names follow OpenTelemetry's semantic conventions for generative AI (gen_ai.*), with `loramux.*` for what they lack.
Nothing of what was asked or answered is sent. The packages are an extra: they are imported when the option is set.
"""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loramux import __version__
from loramux.server.observability.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

INSTALL = "pip install 'loramux[otel]'"
PROVIDER = "loramux"
EXPORT_SECONDS = 5
METRICS_SECONDS = 15
OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
OTHER = "other"
_MODELS = frozenset({"gen_ai.request.model", "gen_ai.response.model"})
# the boundaries that the conventions ask for, in seconds
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class TelemetryUnavailableError(Exception):
    """The option is set and cannot be followed; the message says what is missing and how to get it."""


def _ns(moment: float, offset: int) -> int:
    """A reading of `time.monotonic` as nanoseconds since the epoch."""
    return int(moment * 1e9) + offset


class RequestSpan:
    """One request's span, from its arrival to its end."""

    def __init__(self, telemetry: "Telemetry", span: "Span", offset: int) -> None:
        self._telemetry = telemetry
        self._span = span
        self._offset = offset

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, for the log line."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, record: RequestRecord, *, method: str, route: str, status: int) -> None:
        """Writes what is known of the request into the span and the metrics, and ends the span.

        Status 499 is a client that left; 5xx, and a sequence that ended in `error` after the status was sent, are
        failures.
        """
        from opentelemetry.trace import StatusCode

        operation = OPERATIONS.get(route)
        error = _error_of(record, status)
        shared: dict[str, Any] = {}
        if operation is not None:
            shared = {"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER}
            if record.served:
                shared["gen_ai.response.model"] = record.served[0]
            if record.model is not None:
                shared["gen_ai.request.model"] = record.model
        if error is not None:
            shared["error.type"] = error
        span, offset = self._span, self._offset
        name = f"{method} {route}"
        if operation is not None:
            name = " ".join(filter(None, (operation, record.model or next(iter(record.served), None))))
        span.update_name(name)
        span.set_attributes(
            {
                **shared,
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "loramux.request_id": record.id,
                "loramux.tenant": record.tenant,
            }
        )
        if record.finish_reasons:
            span.set_attributes(
                {
                    "gen_ai.response.finish_reasons": record.finish_reasons,
                    "gen_ai.usage.input_tokens": record.prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                    "gen_ai.usage.output_tokens": record.generated_tokens,
                    "loramux.served": record.served,
                }
            )
            span.add_event("queued", timestamp=_ns(record.arrived, offset))
            for event, moment in (("prefill", record.scheduled), ("decode", record.first_token)):
                if moment is not None:
                    span.add_event(event, timestamp=_ns(moment, offset))
        if error is not None and (status >= 500 or status < 400):
            span.set_status(StatusCode.ERROR, error)
        now = time.monotonic()
        span.end(_ns(now, offset))
        if operation is not None:
            self._telemetry.measure(record, now - record.arrived, shared)


def _error_of(record: RequestRecord, status: int) -> str | None:
    """`error.type`: the status, or `error` for a stream that failed after its 200; None for a success."""
    if status >= 400:
        return str(status)
    return "error" if "error" in record.finish_reasons else None


class Telemetry:
    """The tracer and the instruments of one server.

    Spans name models as they were asked for. Metrics name the first `max_models` of them, without their versions: all
    others share `other`, since a collector keeps a series for every name that it has ever seen.
    """

    def __init__(self, traces: "TracerProvider", metrics: "MeterProvider", *, max_models: int) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._traces, self._metrics = traces, metrics
        self._max_models = max_models
        self._named: set[str] = set()
        self._tracer = traces.get_tracer("loramux", __version__)
        self._propagator = TraceContextTextMapPropagator()
        meter = metrics.get_meter("loramux", __version__)

        def histogram(name: str, text: str, bounds: Iterable[float]) -> Any:
            return meter.create_histogram(
                name, unit="s", description=text, explicit_bucket_boundaries_advisory=list(bounds)
            )

        self._duration = histogram("gen_ai.server.request.duration", "Arrival to end of the answer.", _DURATION)
        self._ttft = histogram("gen_ai.server.time_to_first_token", "Arrival to first token.", _TTFT)
        self._tpot = histogram("gen_ai.server.time_per_output_token", "Per token after the first.", _TPOT)

    @classmethod
    def to(cls, endpoint: str, *, service: str, max_models: int) -> "Telemetry":
        """Sends to an OTLP/HTTP collector: `endpoint` is its base URL, as `http://collector:4318`.

        The SDK's own variables are honoured besides (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, ...). Raises
        `TelemetryUnavailableError` when the packages are not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TelemetryUnavailableError(
                f"--otlp-endpoint needs OpenTelemetry, and {error.name} is not installed: {INSTALL}"
            ) from None
        resource = Resource.create({"service.name": service, "service.version": __version__})
        base = endpoint.rstrip("/")
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        traces.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=EXPORT_SECONDS))
        )
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=EXPORT_SECONDS),
            export_interval_millis=METRICS_SECONDS * 1000,
        )
        provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        return cls(traces, provider, max_models=max_models)

    def start(self, headers: Iterable[tuple[bytes, bytes]], arrived: float) -> RequestSpan:
        """The span of a request that arrived at `arrived` (`time.monotonic`); it continues the client's `traceparent`,
        where there is a valid one."""
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode(): value.decode("latin-1") for name, value in headers if name in (b"traceparent", b"tracestate")
        }
        offset = time.time_ns() - int(time.monotonic() * 1e9)
        span = self._tracer.start_span(
            "request", self._propagator.extract(carrier), kind=SpanKind.SERVER, start_time=_ns(arrived, offset)
        )
        return RequestSpan(self, span, offset)

    def measure(self, record: RequestRecord, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Adds a generation to the metrics."""
        attributes = {k: self._label(v) if k in _MODELS else v for k, v in attributes.items()}
        self._duration.record(seconds, attributes)
        if "error.type" in attributes:
            return
        if record.first_token is not None:
            self._ttft.record(record.first_token - record.arrived, attributes)
        for mean in record.token_seconds:
            self._tpot.record(mean, attributes)

    def _label(self, model: str) -> str:
        name = model.split("@", 1)[0]
        if name not in self._named and len(self._named) >= self._max_models:
            return OTHER
        self._named.add(name)
        return name

    def shutdown(self) -> None:
        """Sends what is left and ends the SDK's threads. Blocks, for a few seconds if the collector does not answer."""
        self._traces.shutdown()
        self._metrics.shutdown()
