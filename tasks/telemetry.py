"""Traces and metrics of one process of the service: OpenTelemetry's SDK, set up from the OTEL_* variables.

Nothing is set up until a variable asks for it. The SDK's exporters have threads and connections, which do not survive
a fork, so each process calls `configure` for itself: a worker when it has booted, a process of the front end when it
makes its application. Both export what is left when they end, for which an endpoint that is down gets a few seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

from opentelemetry import metrics, trace
from opentelemetry.distro import OpenTelemetryConfigurator
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.gauges import GAUGES, Gauge, Gauges

from .settings import InvalidSetting

__all__ = ["configure", "enabled"]

_SIGNALS = ("TRACES", "METRICS")

#: For one request to the endpoint, in seconds. The SDK's 10 would hold up the end of a process for too long.
_EXPORT_TIMEOUT_SECONDS = "3"


def enabled() -> bool:
    """Tell whether the OTEL_* variables ask for anything to be exported."""
    if _variable("OTEL_SDK_DISABLED").lower() == "true":
        return False
    return any(_exporter(signal) != "none" for signal in _SIGNALS)


@cache
def configure(service_name: str, broker: JetStreamBroker) -> bool:
    """Set up this process, once; return whether anything is going to be exported.

    Parameters:
      service_name: What it is called, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES says.

    Raises:
      InvalidSetting: When a variable asks for what is not installed.
    """
    if not enabled():
        return False
    # Under opentelemetry-instrument there are providers already; a second set would export everything twice.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _set_defaults(service_name)
        try:
            OpenTelemetryConfigurator().configure()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise InvalidSetting(
                f"OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER or OTEL_EXPORTER_OTLP_PROTOCOL: {error}."
            ) from error
    # The SDK prepares each measurement for readers, also when there are none.
    meters = metrics.get_meter_provider() if _exporter("METRICS") != "none" else metrics.NoOpMeterProvider()
    for instrumentor in (DramatiqInstrumentor(), RequestsInstrumentor()):
        if not instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.instrument(meter_provider=meters)
    _observe(meters.get_meter("tasks"), broker)
    return True


def _set_defaults(service_name: str) -> None:
    """Give the variables that are not set the values that the service wants, as a distribution of the SDK does."""
    defaults = {f"OTEL_{signal}_EXPORTER": _exporter(signal) for signal in _SIGNALS}
    defaults["OTEL_EXPORTER_OTLP_PROTOCOL"] = "http/protobuf"
    defaults["OTEL_EXPORTER_OTLP_TIMEOUT"] = _EXPORT_TIMEOUT_SECONDS
    if SERVICE_NAME not in OTELResourceDetector().detect().attributes:
        defaults["OTEL_SERVICE_NAME"] = service_name
    os.environ.update({name: value for name, value in defaults.items() if not _variable(name)})


def _exporter(signal: str) -> str:
    """Return the exporters of a signal: by default OTLP if there is an endpoint, where the SDK's goes to localhost."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return _variable(f"OTEL_{signal}_EXPORTER") or ("otlp" if any(map(_variable, endpoints)) else "none")


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _observe(meter: Meter, broker: JetStreamBroker) -> None:
    """Export the gauges of the fleet."""
    gauges = Gauges(broker)
    attributes = {"messaging.system": "nats", "dramatiq.namespace": broker.config.namespace}

    def observe(gauge: Gauge) -> Iterable[Observation]:
        for sample in dict(gauges.read())[gauge]:
            of_queue = {} if sample.queue is None else {"messaging.destination.name": sample.queue}
            yield Observation(sample.value, attributes | of_queue)

    for gauge in GAUGES:

        def callback(_: CallbackOptions, gauge: Gauge = gauge) -> Iterable[Observation]:
            return observe(gauge)

        make = meter.create_observable_counter if gauge.only_grows else meter.create_observable_gauge
        make(f"dramatiq.{gauge.name}", [callback], gauge.unit, gauge.description)
