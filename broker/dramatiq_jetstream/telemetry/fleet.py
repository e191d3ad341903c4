"""Reads the state of the queues and of the connection from the brokers that can tell it.

A reading asks the server, so it is kept for a moment: all gauges of one collection, and whoever else looks at
that moment, share it. A broker that does not answer makes numbers missing, never an error: these are read by
exporters and by the page that monitoring fetches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .conventions import messaging_system

logger = logging.getLogger(__name__)

#: For how many milliseconds a reading is used again.
MAX_AGE = 1_000
#: For how many milliseconds a server that did not answer is left alone.
PATIENCE = 15_000


@dataclass(frozen=True)
class QueueReading:
    """What is in one queue. None is what the broker does not tell."""

    queue: str
    ready: int | None
    in_flight: int | None
    delayed: int | None
    dead: int | None
    #: Milliseconds.
    oldest_ready_age: int | None


@dataclass(frozen=True)
class ConnectionReading:
    """The connection of this process to the server."""

    connected: bool
    reconnects: int
    #: The one that it is, or was, connected to.
    server: str | None


@dataclass(frozen=True)
class BrokerReading:
    """One broker at one moment."""

    system: str
    namespace: str | None
    connection: ConnectionReading | None
    queues: tuple[QueueReading, ...]


@dataclass
class FleetReader:
    """Reads the brokers that `brokers` returns, of which those without queue_stats are left out.

    A broker that is not connected is not asked; it would only keep whoever reads waiting. With `connect`, one
    that never was is asked all the same, which connects it, and again after `patience` if that failed.
    Without, its queues are left out: a gauge should not be what connects a process.
    """

    brokers: Callable[[], Iterable[Any]]
    connect: bool = False
    max_age: int = MAX_AGE
    patience: int = PATIENCE
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _reading: tuple[BrokerReading, ...] = ()
    _read_at: float | None = None
    _failed_at: float | None = None

    def read(self) -> tuple[BrokerReading, ...]:
        """The state now, or a moment ago."""
        with self._lock:
            fresh = self._read_at is not None and (time.monotonic() - self._read_at) * 1000 < self.max_age
            if not fresh:
                self._reading = tuple(self._read(broker) for broker in self.brokers() if can_tell(broker))
                self._read_at = time.monotonic()
            return self._reading

    def _read(self, broker: Any) -> BrokerReading:
        # The queues come first: asking for them may be what opens the connection.
        queues = tuple(self._queues(broker))
        namespace = getattr(getattr(broker, "names", None), "namespace", None)
        return BrokerReading(messaging_system(broker), namespace, _connection(broker), queues)

    def _queues(self, broker: Any) -> Iterable[QueueReading]:
        connection = _connection(broker)
        if connection is not None and not connection.connected and not self._may_connect(connection):
            return
        for queue in sorted(broker.get_declared_queues()):
            try:
                stats = broker.queue_stats(queue)
            except Exception as error:  # noqa: BLE001 - see the module's docstring
                logger.debug("The state of queue %r could not be read: %s", queue, error)
                # Each further queue would wait for the same server for as long.
                self._failed_at = time.monotonic()
                return
            yield QueueReading(
                queue,
                ready=getattr(stats, "ready", None),
                in_flight=getattr(stats, "in_flight", None),
                delayed=getattr(stats, "delayed", None),
                dead=getattr(stats, "dead", None),
                oldest_ready_age=getattr(stats, "oldest_ready_age_ms", None),
            )

    def _may_connect(self, connection: ConnectionReading) -> bool:
        # A connection that was there comes back by itself.
        if not self.connect or connection.server is not None:
            return False
        return self._failed_at is None or (time.monotonic() - self._failed_at) * 1000 >= self.patience


def can_tell(broker: Any) -> bool:
    """Whether a broker can be asked for the state of its queues."""
    # Looked up on the class: an attribute of RabbitMQ's broker opens a connection when it is read.
    return hasattr(type(broker), "queue_stats")


def _connection(broker: Any) -> ConnectionReading | None:
    try:
        state = broker.connection.state
        return ConnectionReading(bool(state.connected), int(state.reconnects), getattr(state, "server", None))
    except Exception as error:  # noqa: BLE001 - see the module's docstring
        logger.debug("The state of the connection could not be read: %s", error)
        return None
