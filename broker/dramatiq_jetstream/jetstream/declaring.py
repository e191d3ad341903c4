"""What a broker needs on its server: streams, consumers and buckets, each made when it is first used.

Everything is made by asking for exactly what is declared, so that two programs may do it at once. A broker with
`declare=False` makes nothing: what is missing shows as an error of what is done with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dramatiq_jetstream.kv import Bucket

from . import topology
from .topology import ConsumerConfig, StreamConfig

if TYPE_CHECKING:
    from dramatiq_jetstream.broker import JetStreamBroker

__all__ = ["Declarations"]


class Declarations:
    """The streams, consumers and buckets of one broker.

    Attributes:
      buckets: Those that were asked for, by name.
    """

    def __init__(self, broker: JetStreamBroker) -> None:
        self._broker = broker
        self._ensured: set[str] = set()
        self.buckets: dict[str, Bucket] = {}

    @property
    def priorities(self) -> list[int | None]:
        """The priorities of a queue, highest first; None is 0."""
        return [*range(self._broker.max_priority or 0, 0, -1), None]

    def setup(self, *, update: bool) -> dict[str, str]:
        """Create what is declared and missing; see `JetStreamBroker.setup`."""
        broker, connection = self._broker, self._broker.connection
        outcome = {}
        for stream in [self._dead_letters(), *map(self._queue, sorted(broker.queues))]:
            outcome[f"stream {stream.name}"] = topology.ensure_stream(connection, stream, update=update)
        for queue_name in sorted(broker.queues):
            for consumer in self._consumers(queue_name):
                outcome[f"consumer {consumer.name} of {consumer.stream}"] = topology.ensure_consumer(
                    connection, consumer, update=update
                )
            self._ensured.add(queue_name)
        for middleware in broker.middleware:
            setup = getattr(middleware, "setup_topology", None)
            if setup is not None:
                outcome.update(setup(broker, update=update))
        broker.bucket("unique")
        for bucket in self.buckets.values():
            outcome.setdefault(f"bucket {bucket.name}", bucket.declare())
        return outcome

    def ensure_queue(self, queue_name: str, *, again: bool = False) -> None:
        """Make a queue's stream and consumers; `again` when they may have disappeared."""
        if queue_name in self._ensured and not again:
            return
        if self._broker.declare:
            topology.ensure_stream(self._broker.connection, self._queue(queue_name))
            for consumer in self._consumers(queue_name):
                topology.ensure_consumer(self._broker.connection, consumer)
        self._ensured.add(queue_name)

    def ensure_dead_letters(self, again: bool = False) -> None:
        """Make the stream of dead letters; `again` when it may have disappeared."""
        stream = self._broker.names.dead_stream
        if (again or stream not in self._ensured) and self._broker.declare:
            topology.ensure_stream(self._broker.connection, self._dead_letters())
        self._ensured.add(stream)

    def bucket(self, name: str, *, history: int, ttl: int | None, max_value_bytes: int | None) -> Bucket:
        """The bucket of that name, which declares itself when it is first used."""
        if name not in self.buckets:
            config = topology.bucket(
                self._broker.names,
                name,
                history=history,
                ttl=ttl,
                max_value_bytes=max_value_bytes,
                replicas=self._broker.replicas,
            )
            self.buckets[name] = Bucket(self._broker.connection, config, declare=self._broker.declare)
        return self.buckets[name]

    def ack_wait_of(self, stream: str, durable: str) -> int:
        """The time after which the server redelivers, which for an older durable may not be what was declared.

        In-progress signals must come in time for it. Without the permission to ask, the declared one must do.
        """
        if not self._broker.declare:
            return self._broker.ack_wait
        return min(self._broker.ack_wait, topology.ack_wait(self._broker.connection, stream, durable))

    def _dead_letters(self) -> StreamConfig:
        broker = self._broker
        return topology.dead_letters(broker.names, ttl=broker.dead_message_ttl, replicas=broker.replicas)

    def _queue(self, queue_name: str) -> StreamConfig:
        return topology.queue(self._broker.names, queue_name, replicas=self._broker.replicas)

    def _consumers(self, queue_name: str) -> list[ConsumerConfig]:
        return [
            topology.worker(
                self._broker.names,
                queue_name,
                priority=priority,
                ack_wait=self._broker.ack_wait,
                max_in_flight=self._broker.max_in_flight.get(queue_name),
                replicas=self._broker.replicas,
            )
            for priority in self.priorities
        ]
