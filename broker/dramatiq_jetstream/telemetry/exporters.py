"""Makes the exporters that the OTEL_* variables ask for, fit for processes that fork."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from dramatiq_jetstream.errors import InvalidOption

from .environment import exporter_names
from .histograms import HistogramFeed
from .tallies import Tallies

T = TypeVar("T")

#: Spans that may wait, and that one request takes, when no variable says so. The SDK's 2,048 and 512 are little
#: for a worker, which would lose spans whenever a queue is drained at full speed.
QUEUE, BATCH = 8_192, 2_048

_PROTOCOLS: Mapping[str, str] = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def check() -> None:
    """Import what is going to be needed; raises InvalidOption for a variable that cannot work."""
    for signal in ("traces", "metrics"):
        for name in exporter_names(signal):
            _load(signal, name)


def span_processors() -> list[SpanProcessor]:
    """A batching processor for each exporter of traces."""
    # None is what the SDK takes for "as the variables say".
    named = any(os.environ.get(f"OTEL_BSP_MAX_{what}") for what in ("QUEUE_SIZE", "EXPORT_BATCH_SIZE"))
    queue, batch = (None, None) if named else (QUEUE, BATCH)
    return [
        BatchSpanProcessor(
            _ForkSafeSpanExporter(_load("traces", name)), max_queue_size=queue, max_export_batch_size=batch
        )
        for name in exporter_names("traces")
    ]


def metric_readers() -> tuple[list[MetricReader], Tallies | None]:
    """A periodic reader for each exporter of metrics, and the tallies whose histograms they export as well.

    There are no tallies when an exporter fetches the metrics itself, as Prometheus' does: it sees nothing
    but what the SDK has.
    """
    factories: list[Any] = [_load("metrics", name) for name in exporter_names("metrics")]
    fetching = [f for f in factories if isinstance(f, type) and issubclass(f, MetricReader)]
    tallies = None if fetching else Tallies()
    readers: list[MetricReader] = [factory() for factory in fetching]
    readers.extend(
        PeriodicExportingMetricReader(_ForkSafeMetricExporter(factory, tallies))
        for factory in factories
        if factory not in fetching
    )
    return readers, tallies


def _load(signal: str, name: str) -> Callable[[], Any]:
    wanted = _otlp_by_protocol(signal) if name == "otlp" else name
    for entry_point in entry_points(group=f"opentelemetry_{signal}_exporter", name=wanted):
        factory: Callable[[], Any] = entry_point.load()
        return _quicker() if (signal, wanted) == ("traces", "otlp_proto_http") else factory
    raise InvalidOption(
        f"OTEL_{signal.upper()}_EXPORTER asks for {name!r}, but no installed package brings the exporter "
        f"{wanted!r}: install the one that does, or set the variable to otlp, console or none."
    )


def _quicker() -> Callable[[], SpanExporter]:
    from .encoding import QuickSpanExporter

    return QuickSpanExporter


def _otlp_by_protocol(signal: str) -> str:
    for variable in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable, "").strip()
        if protocol and protocol not in _PROTOCOLS:
            raise InvalidOption(f"{variable} is {protocol!r}; it must be {' or '.join(_PROTOCOLS)}.")
        if protocol:
            return _PROTOCOLS[protocol]
    return _PROTOCOLS["http/protobuf"]


class _PerProcess(Generic[T]):
    """An exporter for each process: one that was forked must not write to its parent's connections."""

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._pid = os.getpid()
        self._exporter = factory()

    def get(self) -> T:
        if self._pid != os.getpid():
            self._exporter = self._factory()
            self._pid = os.getpid()
        return self._exporter


class _ForkSafeSpanExporter(SpanExporter):
    def __init__(self, factory: Callable[[], SpanExporter]) -> None:
        self._exporter = _PerProcess(factory)
        self._origin: Any = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        exporter = self._exporter.get()
        if self._origin is not None:
            exporter.origin = self._origin  # type: ignore[attr-defined]  # that of a forked child has not heard of it
        return exporter.export(spans)

    def abridger(self, origin: Any) -> Callable[[Any], Any] | None:
        """As `QuickSpanExporter.abridger`; None for an exporter that has no such thing."""
        asked = getattr(self._exporter.get(), "abridger", None)
        abridge: Callable[[Any], Any] | None = None if asked is None else asked(origin)
        if abridge is not None:
            self._origin = origin
        return abridge

    def shutdown(self) -> None:
        self._exporter.get().shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.get().force_flush(timeout_millis)


class _ForkSafeMetricExporter(MetricExporter):
    def __init__(self, factory: Callable[[], MetricExporter], tallies: Tallies | None) -> None:
        self._exporter = _PerProcess(factory)
        # How to aggregate is the exporter's to say; the SDK reads it from these and offers no other way.
        inner = self._exporter.get()
        super().__init__(inner._preferred_temporality, inner._preferred_aggregation)
        temporality = (inner._preferred_temporality or {}).get(Histogram, AggregationTemporality.CUMULATIVE)
        self._feed = None if tallies is None else HistogramFeed(tallies, temporality)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        if self._feed is not None:
            metrics_data = self._feed.added_to(metrics_data)
        return self._exporter.get().export(metrics_data, timeout_millis, **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._exporter.get().force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        self._exporter.get().shutdown(timeout_millis, **kwargs)


class _OnceAMinute(logging.Filter):
    """Lets a message of a logger pass once a minute: a dead endpoint is worth a line, not a line a second."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._passed.get(record.msg, float("-inf")) < 60:
            return False
        self._passed[record.msg] = now
        return True


def quieten() -> None:
    """Keep an endpoint that is down from filling the logs."""
    for name in (
        "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        "opentelemetry.exporter.otlp.proto.http.metric_exporter",
        "opentelemetry.sdk._shared_internal",
        "opentelemetry.sdk.metrics._internal.export",
    ):
        logger = logging.getLogger(name)
        if not any(isinstance(f, _OnceAMinute) for f in logger.filters):
            logger.addFilter(_OnceAMinute())
