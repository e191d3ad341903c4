"""Puts spans and metrics into Dramatiq, and takes them out again.

Each broker gets a middleware in the first place, and a thin wrapper around its methods that enqueue: Dramatiq
has no signal for a send that failed, and without one its span would never end.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from dramatiq import Broker
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from . import conventions as c
from .brokers import BrokerHook
from .fleet import FleetReader
from .gauges import FleetGauges
from .metrics import Instruments
from .middleware import TelemetryMiddleware
from .tallies import Tallies

if TYPE_CHECKING:
    from .quick_tracer import QuickTracer

#: The methods that send: enqueue_many is JetStreamBroker's.
_SENDING = ("enqueue", "enqueue_many")


class DramatiqInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """OpenTelemetry for any Dramatiq broker.

    `DramatiqInstrumentor().instrument()` covers the brokers that exist and those that are made later.
    Options:

    - `tracer_provider`, `meter_provider`: used instead of the global ones
    - `broker`: one broker, or several, and no other
    - `link_parents` (False): an attempt begins a trace of its own, with a link to the send that created it,
      instead of being its child
    - `tallies`: count in these; whoever gives them exports the histograms, as configure_telemetry does
    - `flush_timeout` (3000): for how many milliseconds a worker that stops may export what it has left

    `uninstrument()` leaves Dramatiq as it was.
    """

    # A meter knows an instrument for ever, so it is made once however often one instruments.
    _instruments: ClassVar[WeakKeyDictionary[MeterProvider, tuple[Instruments, FleetGauges]]] = (
        WeakKeyDictionary()
    )
    # A BaseInstrumentor is one object for the whole process, however often it is constructed.
    _hook: BrokerHook | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("dramatiq >= 2.0, < 3",)

    def _instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        broker: Broker | Iterable[Broker] | None = None,
        link_parents: bool = False,
        flush_timeout: int = 3_000,
        tallies: Tallies | None = None,
        **_: Any,
    ) -> None:
        tracer = trace.get_tracer(c.SCOPE, c.version(), tracer_provider, c.SCHEMA_URL)
        quick_tracer = _quick_tracer(tracer_provider or trace.get_tracer_provider())
        instruments, gauges = self._instruments_of(meter_provider or metrics.get_meter_provider(), tallies)

        def providers() -> tuple[object, ...]:
            # The global ones may be set after this, so they are asked for when they are needed.
            return (
                tracer_provider or trace.get_tracer_provider(),
                meter_provider or metrics.get_meter_provider(),
            )

        def attach(broker: Broker) -> None:
            middleware = TelemetryMiddleware(
                broker,
                tracer,
                instruments,
                quick_tracer=quick_tracer,
                link_parents=link_parents,
                providers=providers,
                flush_timeout=flush_timeout,
            )
            broker.middleware.insert(0, middleware)
            for name in _SENDING:
                if hasattr(type(broker), name):
                    setattr(broker, name, _SendingMethod(broker, name, middleware))

        hook = self._hook = BrokerHook(attach, _detach)
        gauges.reader = FleetReader(lambda: list(hook.brokers))
        hook.install(None if broker is None else [broker] if isinstance(broker, Broker) else list(broker))

    def _uninstrument(self, **_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for _instruments, gauges in self._instruments.values():
            gauges.reader = None

    def _instruments_of(
        self, provider: MeterProvider, tallies: Tallies | None
    ) -> tuple[Instruments, FleetGauges]:
        found = self._instruments.get(provider)
        if found is None:
            meter = provider.get_meter(c.SCOPE, c.version(), c.SCHEMA_URL)
            instruments = Instruments(meter, tallies or Tallies(), own_histograms=tallies is None)
            found = self._instruments[provider] = (instruments, FleetGauges(meter))
        return found


class _SendingMethod:
    """A broker's method that sends, which tells the middleware when it begins and how it ends."""

    def __init__(self, broker: Broker, name: str, middleware: TelemetryMiddleware) -> None:
        functools.update_wrapper(self, getattr(type(broker), name))
        self._broker = broker
        self._name = name
        self._middleware = middleware

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        middleware = self._middleware
        # Looked up at each call, so that whatever else patches the class goes on working.
        method = getattr(type(self._broker), self._name)
        outer = middleware.open_sends()
        error: BaseException | None = None
        try:
            return method(self._broker, *args, **kwargs)
        except BaseException as raised:
            error = raised
            raise
        finally:
            middleware.close_sends(outer, error)
            # An exception that is held by a frame of its own traceback is not freed before the next cycle.
            del error


def _quick_tracer(provider: TracerProvider) -> QuickTracer | None:
    try:
        from .quick_tracer import QuickTracer
    except ImportError:
        # Without the SDK nothing is recorded anyway.
        return None
    return QuickTracer.of(provider)


def _detach(broker: Broker) -> None:
    broker.middleware[:] = [m for m in broker.middleware if not isinstance(m, TelemetryMiddleware)]
    for name in _SENDING:
        if isinstance(vars(broker).get(name), _SendingMethod):
            delattr(broker, name)
