"""OpenTelemetry for Dramatiq: spans and metrics of sends and attempts, on any broker.

    from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor

    DramatiqInstrumentor().instrument()

Each message has a `send {queue}` span where it is enqueued and a `process {queue}` span for each attempt; the trace
goes with it in the message option CARRIER_OPTION. Nothing is added to a program that is not instrumented.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dramatiq import Broker
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from . import conventions
from .brokers import Brokers
from .carrier import CARRIER_OPTION
from .instruments import Instruments
from .methods import SendingMethod
from .middleware import TelemetryMiddleware
from .package import _instruments
from .sending import Sender
from .version import __version__

__all__ = ["CARRIER_OPTION", "DramatiqInstrumentor", "__version__"]

#: The methods that send. Every broker has `enqueue`; the others are wrapped as JetStreamBroker has them.
_SENDING = ("enqueue",)
_SENDING_ON_NATS = ("enqueue", "enqueue_many", "publish")


class DramatiqInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Instruments every broker of the process: those that exist, and those that are made later.

    Options of `instrument`:
      tracer_provider, meter_provider: Used instead of the global ones.
      link_parents: An attempt begins a trace of its own, with a link to the send that created its message, instead of
        being a child of it. Default False.

    `uninstrument()` leaves Dramatiq as it was.

    Examples:
      >>> from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
      >>> DramatiqInstrumentor().instrument(link_parents=True)
      >>> DramatiqInstrumentor().uninstrument()
    """

    _brokers: Brokers | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        return _instruments

    def _instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        link_parents: bool = False,
        **_: Any,
    ) -> None:
        scope = (__name__, __version__)
        tracer = trace.get_tracer(*scope, tracer_provider, conventions.SCHEMA_URL)
        instruments = Instruments(metrics.get_meter(*scope, meter_provider, conventions.SCHEMA_URL))

        def providers() -> tuple[object, object]:
            # The global ones may be set later than this.
            return (
                tracer_provider or trace.get_tracer_provider(),
                meter_provider or metrics.get_meter_provider(),
            )

        def attach(broker: Broker) -> None:
            system = conventions.messaging_system(broker)
            sender = Sender(system, tracer, instruments, link_parents=link_parents)
            middleware = TelemetryMiddleware(
                system, tracer, instruments, sender, link_parents=link_parents, providers=providers
            )
            broker.middleware.insert(0, middleware)
            for name in _SENDING_ON_NATS if system == "nats" else _SENDING:
                setattr(broker, name, SendingMethod(broker, name, getattr(sender, name)))

        self._brokers = Brokers(attach, _detach)
        self._brokers.install()

    def _uninstrument(self, **_: Any) -> None:
        if self._brokers is not None:
            self._brokers.remove()
            self._brokers = None


def _detach(broker: Broker) -> None:
    broker.middleware[:] = [one for one in broker.middleware if not isinstance(one, TelemetryMiddleware)]
    for name in _SENDING_ON_NATS:
        if isinstance(vars(broker).get(name), SendingMethod):
            delattr(broker, name)
