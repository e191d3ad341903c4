"""The fleet's state as OpenTelemetry's observable instruments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from . import conventions as c
from .fleet import BrokerReading, ConnectionReading, FleetReader, QueueReading

Observer = Callable[[CallbackOptions], Iterable[Observation]]


class FleetGauges:
    """Registered once for a meter provider; which reader they read changes with each instrument()."""

    def __init__(self, meter: Meter) -> None:
        self.reader: FleetReader | None = None
        for name, description, value in (
            ("ready", "Messages that wait for a worker.", lambda q: q.ready),
            ("in_flight", "Messages that were delivered and are not settled yet.", lambda q: q.in_flight),
            ("delayed", "Messages that are held back until they are due.", lambda q: q.delayed),
            ("dead", "Dead letters.", lambda q: q.dead),
        ):
            meter.create_observable_gauge(
                f"dramatiq.queue.{name}", [self._of_queues(value)], "{message}", description
            )
        meter.create_observable_gauge(
            "dramatiq.queue.oldest_ready_age",
            [self._of_queues(lambda q: None if q.oldest_ready_age is None else q.oldest_ready_age / 1000)],
            "s",
            "For how long the oldest ready message has waited.",
        )
        meter.create_observable_gauge(
            "dramatiq.connection.up",
            [self._of_connections(lambda r: int(r.connected))],
            "1",
            "1 while this process is connected to the server, else 0.",
        )
        meter.create_observable_counter(
            "dramatiq.connection.reconnects",
            [self._of_connections(lambda r: r.reconnects)],
            "{reconnect}",
            "How often this process has connected anew.",
        )

    def _of_queues(self, value: Callable[[QueueReading], float | None]) -> Observer:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for broker in self._read():
                for queue in broker.queues:
                    observed = value(queue)
                    if observed is not None:
                        yield Observation(observed, _of(broker) | {c.DESTINATION: queue.queue})

        return observe

    def _of_connections(self, value: Callable[[ConnectionReading], int]) -> Observer:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for broker in self._read():
                if broker.connection is not None:
                    yield Observation(value(broker.connection), _of(broker))

        return observe

    def _read(self) -> tuple[BrokerReading, ...]:
        return () if self.reader is None else self.reader.read()


def _of(broker: BrokerReading) -> dict[str, str]:
    attributes = {c.SYSTEM: broker.system}
    if broker.namespace is not None:
        attributes[c.NAMESPACE] = broker.namespace
    return attributes
