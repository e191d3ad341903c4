"""What a broker needs on its server: streams, consumers and buckets, each made when it is first used.

Creating asks for exactly what is declared, so two programs may do it at once. A broker with `declare=False` creates
nothing: the call that needs a missing part raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.wire.connection import Connection

from . import ensuring, topology
from .inventory import queue_names
from .topology import ConsumerConfig, StreamConfig

__all__ = ["Declarations"]


class Declarations:
    """The streams, consumers and buckets of one broker.

    Attributes:
      buckets: Those that were asked for, by name.
    """

    def __init__(self, config: BrokerConfig, connection: Connection) -> None:
        self._config = config
        self._connection = connection
        self._ensured: set[str] = set()
        self.buckets: dict[str, Bucket] = {}

    def check_max_in_flight(self, queues: Iterable[str]) -> None:
        """Raise InvalidOption for a queue in `max_in_flight` that is neither in `queues` nor on the server."""
        declared = set(queues)
        unknown = set(self._config.max_in_flight) - declared
        if not unknown:
            return
        known = sorted(declared.union(queue_names(self._connection, self._config.names)))
        for queue in sorted(unknown.difference(known)):
            meant = "".join(f" Did you mean {name!r}?" for name in get_close_matches(queue, known, 1))
            raise InvalidOption(
                f"max_in_flight names the queue {queue!r}, which does not exist; there are: "
                f"{', '.join(known) or 'none'}.{meant}"
            )

    def setup_queues(self, queues: Iterable[str], *, update: bool) -> dict[str, str]:
        """Create the missing streams and consumers of queues; see `JetStreamBroker.setup`."""
        declared = sorted(queues)
        streams = [
            self._dead_letters(),
            self._audit(),
            self._activity(),
            *self._history(),
            *map(self._queue, declared),
        ]
        consumers = [consumer for queue_name in declared for consumer in self._consumers(queue_name)]
        outcome = ensuring.all_of(
            [
                *(partial(self._setup_stream, stream, update=update) for stream in streams),
                *(partial(self._setup_consumer, consumer, update=update) for consumer in consumers),
            ]
        )
        self._ensured.update(declared)
        return outcome

    def _setup_stream(self, stream: StreamConfig, *, update: bool) -> dict[str, str]:
        return {f"stream {stream.name}": ensuring.ensure_stream(self._connection, stream, update=update)}

    def _setup_consumer(self, consumer: ConsumerConfig, *, update: bool) -> dict[str, str]:
        outcome = ensuring.ensure_consumer(self._connection, consumer, update=update)
        return {f"consumer {consumer.name} of {consumer.stream}": outcome}

    def setup_buckets(self, *, update: bool) -> dict[str, str]:
        """Create the buckets that are missing, with `update` change those that differ."""
        return ensuring.all_of(
            [partial(self._setup_bucket, bucket, update=update) for bucket in list(self.buckets.values())]
        )

    def _setup_bucket(self, bucket: Bucket, *, update: bool) -> dict[str, str]:
        return {f"bucket {bucket.name}": bucket.declare(update=update)}

    def ensure_queue(self, queue_name: str, *, again: bool = False) -> None:
        """Make a queue's stream and consumers; `again` when they may have disappeared."""
        if queue_name in self._ensured and not again:
            return
        if self._config.declare:
            ensuring.ensure_stream(self._connection, self._queue(queue_name))
            for consumer in self._consumers(queue_name):
                ensuring.ensure_consumer(self._connection, consumer)
        self._ensured.add(queue_name)

    def ensure_worker(self, queue_name: str, priority: int | None) -> None:
        """Make a queue's stream and one of its consumers if they are missing."""
        ensuring.ensure_stream(self._connection, self._queue(queue_name))
        ensuring.ensure_consumer(self._connection, self._consumer(queue_name, priority))

    def ensure_dead_letters(self, again: bool = False) -> None:
        """Make the stream of dead letters; `again` when it may have disappeared."""
        stream = self._config.names.dead_stream
        if (again or stream not in self._ensured) and self._config.declare:
            ensuring.ensure_stream(self._connection, self._dead_letters())
        self._ensured.add(stream)

    def ensure_history(self) -> bool:
        """Make the stream of the history if it is missing; False when it may not be made."""
        if self._config.declare:
            for stream in self._history():
                ensuring.ensure_stream(self._connection, stream)
        return self._config.declare

    def ensure_activity(self) -> None:
        """Make the stream of the counters if it is missing and may be made."""
        if self._config.declare:
            ensuring.ensure_stream(self._connection, self._activity())

    def ensure_audit(self) -> None:
        """Make the stream of audit records, whatever `declare` says."""
        ensuring.ensure_stream(self._connection, self._audit())

    def bucket(
        self, name: str, *, history: int = 1, ttl: int | None = None, max_value_bytes: int | None = None
    ) -> Bucket:
        """The bucket of that name, which declares itself when it is first used."""
        if name not in self.buckets:
            config = topology.bucket(
                self._config.names,
                name,
                history=history,
                ttl=ttl,
                max_value_bytes=max_value_bytes,
                storage=self._config.storage,
            )
            self.buckets[name] = Bucket(self._connection, config, declare=self._config.declare)
        return self.buckets[name]

    def memory_bucket(self, name: str) -> Bucket:
        """A bucket that the server keeps in memory only, for values that are written again anyway."""
        config = topology.memory_bucket(self._config.names, name, storage=self._config.storage)
        bucket = Bucket(self._connection, config, declare=self._config.declare)
        return self.buckets.setdefault(name, bucket)

    def announcing_bucket(self, name: str) -> Bucket:
        """The bucket of that name, which announces every key that is stored in it (see `wakeups`)."""
        config = topology.announcing_bucket(self._config.names, name, storage=self._config.storage)
        bucket = Bucket(self._connection, config, declare=self._config.declare)
        return self.buckets.setdefault(name, bucket)

    def _dead_letters(self) -> StreamConfig:
        config = self._config
        return topology.dead_letters(config.names, ttl=config.dead_message_ttl, storage=config.storage)

    def _history(self) -> list[StreamConfig]:
        """The stream of the history; none when none is kept."""
        config = self._config
        if config.history is None:
            return []
        return [
            topology.history(
                config.names, ttl=config.history_ttl, room=config.history_bytes, storage=config.storage
            )
        ]

    def _activity(self) -> StreamConfig:
        return topology.activity(self._config.names, storage=self._config.storage)

    def _audit(self) -> StreamConfig:
        return topology.audit(self._config.names, storage=self._config.storage)

    def _queue(self, queue_name: str) -> StreamConfig:
        return topology.queue(self._config.names, queue_name, storage=self._config.storage)

    def _consumers(self, queue_name: str) -> list[ConsumerConfig]:
        return [self._consumer(queue_name, priority) for priority in self._config.priorities]

    def _consumer(self, queue_name: str, priority: int | None) -> ConsumerConfig:
        return topology.worker(
            self._config.names,
            queue_name,
            priority=priority,
            ack_wait=self._config.ack_wait,
            max_in_flight=self._config.max_in_flight.get(queue_name),
            replicas=self._config.replicas,
        )
