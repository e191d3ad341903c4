"""The consumers that Dramatiq's consumer threads have opened in this process."""

from __future__ import annotations

import contextlib

from dramatiq.worker import QUEUE_PREFETCH

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.wire.connection import Connection

from .attachment import Attachment
from .consumer import JetStreamConsumer
from .in_flight import InFlight
from .rerouting import Rerouter
from .sources import Sources
from .suspects import Suspects

__all__ = ["Consumers"]

#: How long a new consumer waits for the server, in milliseconds.
CONFIRM_MS = 2_000


class Consumers:
    """Opens consumers, and closes those that are open."""

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        in_flight: InFlight,
        sources: Sources,
        suspects: Suspects,
        rerouter: Rerouter,
        attachment: Attachment,
    ) -> None:
        self._config = config
        self._connection = connection
        self._in_flight = in_flight
        self._sources = sources
        self._suspects = suspects
        self._rerouter = rerouter
        self._attachment = attachment
        self._open: list[JetStreamConsumer] = []

    def open(self, queue_name: str, *, prefetch: int, timeout: int) -> JetStreamConsumer:
        """Open a consumer of a queue. Several threads call this at once, so every step is a single one.

        Raises:
          BrokerConnectionError: When the server cannot be reached; soon, so that the worker can stop meanwhile.
        """
        self._connection.connect()
        self._connection.confirm(timeout=min(self._connection.timeout, CONFIRM_MS))
        consumer = JetStreamConsumer(
            self._connection,
            self._in_flight,
            queue_name,
            self._sources,
            prefetch=max(1, prefetch),
            timeout=timeout,
            lookahead=queue_name not in self._config.max_in_flight and not QUEUE_PREFETCH,
            suspects=self._suspects,
            rerouter=self._rerouter,
            return_unstarted=self._attachment.return_unstarted,
        )
        for other in list(self._open):
            if other.stopping:
                with contextlib.suppress(ValueError):
                    self._open.remove(other)
        self._open.append(consumer)
        if self._attachment.is_quiet:
            consumer.stop_pulling()
        return consumer

    @property
    def opened(self) -> list[JetStreamConsumer]:
        """Those that are open."""
        return list(self._open)

    def close(self) -> None:
        """Close all that are open."""
        for consumer in self._open:
            consumer.close()
        self.reset()

    def reset(self) -> None:
        """Drop all: in the child of a fork, they are the parent's."""
        self._open = []
