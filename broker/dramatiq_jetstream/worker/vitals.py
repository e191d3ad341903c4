"""Ends a process whose worker has lost a thread.

Dramatiq does not notice a dead thread: the process keeps taking messages, and those that the thread would have run wait
for ever. A thread dies of errors that nothing handles, such as a lack of memory or a middleware that ends it. The
process then requeues what it holds and exits with status 1, for its supervisor to start another.

The actors of other threads get `GRACE_SECONDS` to end. If the process dies before it has requeued what it holds, that
is delivered again after its `ack_wait`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any

from dramatiq.worker import Worker

from dramatiq_jetstream.wire.connection import Connection

from .in_flight import InFlight

__all__ = ["Vitals"]

#: How often the threads are looked at, in seconds.
INTERVAL_SECONDS = 1.0

#: How long the actors of other threads may take once one thread is dead.
GRACE_SECONDS = 30.0

#: How long the server may take to receive what is requeued.
FLUSH_SECONDS = 2.0

#: The status with which the process ends.
EXIT_STATUS = 1

logger = logging.getLogger(__name__)


class Vitals:
    """Looks after the threads of this process's worker."""

    def __init__(self, connection: Connection, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._worker: Worker | None = None
        self._looked = 0.0
        connection.on_tick(self._look)

    def watch(self, worker: Worker | None) -> None:
        """Look after the threads of `worker` from now on; None looks after none."""
        self._worker = worker

    def _look(self) -> None:
        now = time.monotonic()
        worker = self._worker
        if worker is None or now - self._looked < INTERVAL_SECONDS:
            return
        self._looked = now
        threads: list[Any] = [*list(worker.workers), *list(worker.consumers.values())]
        dead = [thread for thread in threads if thread.running and not thread.is_alive()]
        if dead:
            self._worker = None
            # Not on this thread, the connection's own, which sends everything that is requeued.
            threading.Thread(
                target=self._end, args=(worker, dead), name="end-of-process", daemon=True
            ).start()

    def _end(self, worker: Worker, dead: list[Any]) -> None:
        kinds = ", ".join(f"{type(thread).__name__} {thread.name}" for thread in dead)
        logger.critical(
            "%s died. Requeueing what this process holds; it ends with status %d.", kinds, EXIT_STATUS
        )
        try:
            worker.stop(timeout=int(GRACE_SECONDS * 1000))
            self._in_flight.requeue_all()
            self._in_flight.flush(FLUSH_SECONDS)
        except BaseException:
            logger.critical(
                "Not everything could be requeued; the rest is delivered again after its ack_wait.",
                exc_info=True,
            )
        finally:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(EXIT_STATUS)
