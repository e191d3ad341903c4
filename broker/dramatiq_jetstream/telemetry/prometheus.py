"""The state of the queues in Prometheus' text format, for a web process to serve at /metrics.

It is read from the server at the moment of the scrape. So every process gives the same answer, it does not
matter which worker of the web server answers, and no OpenTelemetry needs to be set up.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary, ref

from dramatiq import Broker
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .fleet import FleetReader

#: What the text is to be served as.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_registries: WeakKeyDictionary[Broker, CollectorRegistry] = WeakKeyDictionary()


def prometheus_text(broker: Broker) -> str:
    """The metrics of a broker's queues and of this process's connection.

    Never raises for a server that does not answer: the queues are missing then, and `dramatiq_connection_up`
    is 0. How long that takes is bounded by the broker's own timeout.
    """
    registry = _registries.get(broker)
    if registry is None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_FleetCollector(broker))
        _registries[broker] = registry
    return generate_latest(registry).decode()


class _FleetCollector(Collector):
    def __init__(self, broker: Broker) -> None:
        # The registry is forgotten with the broker, so it must not be what keeps it alive.
        reference = ref(broker)

        def brokers() -> Iterable[Broker]:
            alive = reference()
            return () if alive is None else (alive,)

        self._reader = FleetReader(brokers, connect=True)

    def collect(self) -> Iterable[Metric]:
        ready = _queue_gauge("ready", "Messages that wait for a worker.")
        in_flight = _queue_gauge("in_flight", "Messages that were delivered and are not settled yet.")
        delayed = _queue_gauge("delayed", "Messages that are held back until they are due.")
        dead = _queue_gauge("dead", "Dead letters.")
        age = _queue_gauge("oldest_ready_age_seconds", "For how long the oldest ready message has waited.")
        up = GaugeMetricFamily(
            "dramatiq_connection_up", "1 while this process is connected to the server, else 0."
        )
        reconnects = CounterMetricFamily(
            "dramatiq_connection_reconnects", "How often this process has connected anew."
        )
        for broker in self._reader.read():
            for queue in broker.queues:
                for family, value in (
                    (ready, queue.ready),
                    (in_flight, queue.in_flight),
                    (delayed, queue.delayed),
                    (dead, queue.dead),
                    (age, None if queue.oldest_ready_age is None else queue.oldest_ready_age / 1000),
                ):
                    if value is not None:
                        family.add_metric([queue.queue], value)
            if broker.connection is not None:
                up.add_metric([], int(broker.connection.connected))
                reconnects.add_metric([], broker.connection.reconnects)
        return (ready, in_flight, delayed, dead, age, up, reconnects)


def _queue_gauge(name: str, description: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dramatiq_queue_{name}", description, labels=["queue"])
