"""The state of the fleet as numbers for monitoring: what is in the queues, and this process's connection.

    gauges = Gauges(broker)
    for gauge, samples in gauges.read():
        for sample in samples:
            print(gauge.name, sample.queue, sample.value)

The numbers are read from the server, so every process says the same of the queues. A reading is used again for a
second: all gauges of one collection share it. A server that does not answer makes numbers missing, never an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import ref

from dramatiq.errors import BrokerError

from .broker import JetStreamBroker
from .queues import QueueStats
from .wire.link import ConnectionState

__all__ = ["GAUGES", "PROMETHEUS_CONTENT_TYPE", "Gauge", "Gauges", "Sample"]

logger = logging.getLogger(__name__)

#: What `Gauges.prometheus_text` is served as.
PROMETHEUS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_MAX_AGE_SECONDS = 1.0

#: How long a server that did not answer is left alone before a process that never was connected asks it again.
_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True)
class Gauge:
    """What a number is about.

    Attributes:
      name: Its name, such as `queue.ready`.
      unit: In UCUM, as OpenTelemetry writes units: `s`, `1`, `{message}`.
      only_grows: Whether it counts what has happened, instead of saying how things are.

    Examples:
      >>> from dramatiq_jetstream.gauges import GAUGES
      >>> [gauge.name for gauge in GAUGES if gauge.unit == "s"]
      ['queue.oldest_ready_age']
    """

    name: str
    unit: str
    description: str
    only_grows: bool = False


@dataclass(frozen=True)
class Sample:
    """One number; `queue` is None for the connection's.

    Examples:
      >>> from dramatiq_jetstream.gauges import Sample
      >>> Sample(3, queue="mail").queue
      'mail'
    """

    value: float
    queue: str | None = None


def _labels(sample: Sample) -> str:
    if sample.queue is None:
        return ""
    escaped = sample.queue.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{queue="{escaped}"}}'


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


_OF_QUEUES: dict[Gauge, Callable[[QueueStats], float | None]] = {
    Gauge("queue.ready", "{message}", "Messages that wait for a worker."): lambda stats: stats.ready,
    Gauge("queue.in_flight", "{message}", "Messages that were delivered and are not settled yet."): (
        lambda stats: stats.in_flight
    ),
    Gauge("queue.delayed", "{message}", "Messages that are held back until they are due."): (
        lambda stats: stats.delayed
    ),
    Gauge("queue.dead", "{message}", "Dead letters."): lambda stats: stats.dead,
    Gauge("queue.oldest_ready_age", "s", "For how long the oldest ready message has waited."): (
        lambda stats: _seconds(stats.oldest_ready_age)
    ),
}
_OF_CONNECTIONS: dict[Gauge, Callable[[ConnectionState], float]] = {
    Gauge("connection.up", "1", "1 while this process is connected to the server, else 0."): (
        lambda state: int(state.connected)
    ),
    Gauge("connection.reconnects", "{reconnect}", "Reconnects of this process.", only_grows=True): (
        lambda state: state.reconnects
    ),
}

#: Every gauge there is, in the order in which they are read.
GAUGES: Final = (*_OF_QUEUES, *_OF_CONNECTIONS)

Reading = list[tuple[Gauge, list[Sample]]]


class Gauges:
    """Reads the gauges of one broker, and keeps no broker alive.

    Parameters:
      connect: Whether reading may connect a process that has not used its broker yet. Without it, such a process has no
        numbers of queues: a gauge must not be what connects it.

    Examples:
      >>> from dramatiq_jetstream.gauges import Gauges
      >>> gauges = Gauges(broker, connect=True)
      >>> for gauge, samples in gauges.read():
      ...     for sample in samples:
      ...         if gauge.name == "queue.ready" and sample.queue == "default":
      ...             print(gauge.unit, sample.value)
      {message} 0
      >>> "queue_ready" in gauges.prometheus_text()
      True
    """

    def __init__(self, broker: JetStreamBroker, *, connect: bool = False) -> None:
        self._broker = ref(broker)
        self._connect = connect
        self._lock = threading.Lock()
        self._reading: Reading = []
        self._read_at = float("-inf")
        self._failed_at = float("-inf")

    def read(self) -> Reading:
        """All gauges with their samples, of now or of a moment ago; it waits as long as the broker's timeout."""
        with self._lock:
            broker = self._broker()
            if broker is not None and time.monotonic() - self._read_at >= _MAX_AGE_SECONDS:
                self._reading = self._ask(broker)
                self._read_at = time.monotonic()
            return self._reading

    def prometheus_text(self) -> str:
        """The gauges in Prometheus' text format; for a page served as PROMETHEUS_CONTENT_TYPE."""
        lines: list[str] = []
        for gauge, samples in self.read():
            name = "dramatiq_" + gauge.name.replace(".", "_")
            name += ("_seconds" if gauge.unit == "s" else "") + ("_total" if gauge.only_grows else "")
            lines.append(f"# HELP {name} {gauge.description}")
            lines.append(f"# TYPE {name} {'counter' if gauge.only_grows else 'gauge'}")
            lines += [f"{name}{_labels(sample)} {float(sample.value)}" for sample in samples]
        return "\n".join([*lines, ""])

    def _ask(self, broker: JetStreamBroker) -> Reading:
        # The queues come first: asking for them may be what opens the connection.
        queues = self._queues(broker)
        state = broker.connection.state
        reading: Reading = []
        for gauge, of_queue in _OF_QUEUES.items():
            values = [(stats.queue, of_queue(stats)) for stats in queues]
            reading.append((gauge, [Sample(value, queue) for queue, value in values if value is not None]))
        for gauge, of_connection in _OF_CONNECTIONS.items():
            reading.append((gauge, [Sample(of_connection(state))]))
        return reading

    def _queues(self, broker: JetStreamBroker) -> list[QueueStats]:
        state = broker.connection.state
        if not state.connected and not self._may_connect(state):
            return []
        found: list[QueueStats] = []
        try:
            found.extend(broker.queue_stats_of(sorted(broker.get_declared_queues())))
        except BrokerError as error:
            logger.debug("The state of the queues after %d of them could not be read: %s", len(found), error)
            # Each further queue would wait for the same server for as long.
            self._failed_at = time.monotonic()
        return found

    def _may_connect(self, state: ConnectionState) -> bool:
        # A connection that was there comes back by itself.
        if not self._connect or state.server is not None:
            return False
        return time.monotonic() - self._failed_at >= _PATIENCE_SECONDS
