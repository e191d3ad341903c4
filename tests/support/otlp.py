"""A real OTLP/HTTP receiver: takes what an exporter sends, decodes it, and answers questions about it."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanProto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.polling import eventually


@dataclass(frozen=True)
class Span:
    """One received span."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    #: The exceptions recorded on it, as their attributes.
    exceptions: tuple[dict[str, Any], ...]
    links: tuple[tuple[str, str], ...]
    is_error: bool
    start: int
    end: int
    resource: dict[str, Any]
    #: The package that made it.
    scope: str

    @property
    def service(self) -> str:
        return str(self.resource.get("service.name"))


@dataclass(frozen=True)
class Point:
    """The latest value of one metric for one set of attributes; a histogram's value is its count."""

    metric: str
    unit: str
    attributes: dict[str, Any]
    value: float
    sum: float
    resource: dict[str, Any]


class OtlpReceiver:
    """Listens on a free port. `with OtlpReceiver() as receiver:` starts and stops it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._points: dict[tuple[Any, ...], Point] = {}
        self.requests = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver._take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """The value for OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        """All spans received so far, by the time they began."""
        with self._lock:
            return sorted(self._spans, key=lambda span: span.start)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def wait_for(self, *names: str, timeout: float = 40.0) -> list[Span]:
        """Wait until the received spans have exactly these names, in the order in which they began."""

        def received() -> list[Span]:
            spans = self.spans
            assert sorted(span.name for span in spans) == sorted(names)
            return spans

        return eventually(received, timeout=timeout)

    def wait_until(self, condition: Callable[[list[Span]], Any], timeout: float = 40.0) -> list[Span]:
        eventually(lambda: condition(self.spans), timeout=timeout)
        return self.spans

    def points(self, metric: str, **attributes: Any) -> list[Point]:
        """The latest points of a metric whose attributes contain these (underscores stand for dots)."""
        wanted = {name.replace("__", "."): value for name, value in attributes.items()}
        with self._lock:
            return [
                point
                for point in self._points.values()
                if point.metric == metric and wanted.items() <= point.attributes.items()
            ]

    def metric_names(self) -> set[str]:
        with self._lock:
            return {point.metric for point in self._points.values()}

    def clear(self) -> None:
        with self._lock:
            self._spans.clear()
            self._points.clear()

    def _take(self, path: str, body: bytes) -> None:
        with self._lock:
            self.requests += 1
            if path.endswith("/v1/traces"):
                self._spans.extend(_spans(ExportTraceServiceRequest.FromString(body)))
            elif path.endswith("/v1/metrics"):
                for point in _points(ExportMetricsServiceRequest.FromString(body)):
                    key = (
                        point.metric,
                        tuple(sorted(point.attributes.items())),
                        point.resource.get("service.instance.id"),
                    )
                    self._points[key] = point

    def start(self) -> OtlpReceiver:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> OtlpReceiver:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An endpoint that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(v) for v in value.array_value.values]
    return getattr(value, kind) if kind else None


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _spans(request: ExportTraceServiceRequest) -> Iterable[Span]:
    for resource in request.resource_spans:
        resource_attributes = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    kind=SpanProto.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    attributes=_attributes(span.attributes),
                    exceptions=tuple(_attributes(e.attributes) for e in span.events if e.name == "exception"),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    is_error=span.status.code == Status.STATUS_CODE_ERROR,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    resource=resource_attributes,
                    scope=scope.scope.name,
                )


def _points(request: ExportMetricsServiceRequest) -> Iterable[Point]:
    for resource in request.resource_metrics:
        resource_attributes = _attributes(resource.resource.attributes)
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                data = getattr(metric, metric.WhichOneof("data"))
                for point in data.data_points:
                    if metric.HasField("histogram"):
                        value, total = float(point.count), float(point.sum)
                    else:
                        value = float(getattr(point, point.WhichOneof("value")))
                        total = value
                    yield Point(
                        metric.name,
                        metric.unit,
                        _attributes(point.attributes),
                        value,
                        total,
                        resource_attributes,
                    )
