"""Progress of long tasks: an actor reports how far it is, and any process can read it.

A report is kept per message, in a bucket with a time to live. An actor may report in every turn of a loop: only reports
at least `INTERVAL_MS` apart are sent, without waiting for a reply, and the last one, when all is done, is always sent.
Progress is information for people; losing it harms nothing, so nothing is sent again.
"""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Middleware

from .broker import ACTOR_OPTIONS, JetStreamBroker
from .errors import BrokerError, InvalidOption
from .jetstream.names import short_key
from .kv import Bucket
from .worker.current import note_said
from .worker.roster import ProgressOf

__all__ = ["Progress", "ProgressOf", "progress", "read_progress"]

#: The least time between two reports that are sent.
INTERVAL_MS = 250

#: How long a report is kept.
TTL_MS = 86_400_000

BUCKET = "progress"

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    broker: Broker
    message_id: str
    ttl: int
    sent: float = 0.0


_running: ContextVar[_Running | None] = ContextVar("dramatiq_jetstream_progress", default=None)


class Progress(Middleware):
    """Middleware that lets actors call `progress`. On Dramatiq's `StubBroker` reports are kept in memory.

    Parameters:
      ttl: Milliseconds that a report is kept; a day by default.

    Raises:
      InvalidOption: For a `ttl` under a second.

    Examples:
      >>> from dramatiq_jetstream.progress import Progress
      >>> broker = JetStreamBroker(namespace="shop")
      >>> broker.add_middleware(Progress(ttl=3_600_000))
    """

    def __init__(self, *, ttl: int = TTL_MS) -> None:
        if ttl < 1_000:
            raise InvalidOption(f"ttl={ttl!r} cannot be used: give milliseconds, 1000 or more.")
        self.ttl = ttl
        self.reports: dict[str, dict[str, Any]] = {}  # on a StubBroker

    @property
    def actor_options(self) -> set[str]:
        return set(ACTOR_OPTIONS)

    def setup_topology(self, broker: JetStreamBroker, *, update: bool = False) -> dict[str, str]:
        """Create the bucket; called by `broker.setup`."""
        return {f"bucket {BUCKET}": _bucket(broker).declare(update=update)}

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        if isinstance(broker, JetStreamBroker) and broker.config.declare:
            _bucket(broker).declare()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if isinstance(broker, (JetStreamBroker, StubBroker)):
            _running.set(_Running(broker, message.message_id, self.ttl))

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        _running.set(None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        _running.set(None)


def progress(done: float, total: float | None = None, note: str = "") -> None:
    """Report how far the running actor is. Outside of actors it does nothing, so actors can be called directly.

    Parameters:
      done: How much is done, in any unit.
      total: How much there is, if that is known; `done == total` is always sent.
      note: What is being done, for people.

    Examples:
      >>> from dramatiq_jetstream.progress import progress
      >>> @dramatiq.actor
      ... def export(rows):
      ...     for row in range(rows):
      ...         progress(row + 1, rows, "exporting")
      >>> export(3)
    """
    running = _running.get()
    if running is None:
        return
    now = time.monotonic()
    if now - running.sent < INTERVAL_MS / 1000 and done != total:
        return
    running.sent = now
    said = {"done": done, "total": total, "note": note, "at": int(time.time() * 1000)}
    note_said(said)
    if not isinstance(running.broker, JetStreamBroker):
        _in_memory(running.broker)[running.message_id] = said
        return
    try:
        _bucket(running.broker).note(
            short_key(running.message_id), json.dumps(said).encode(), ttl=running.ttl
        )
    except BrokerError as error:
        logger.warning("The progress of %s was not stored: %s", running.message_id, error)


def read_progress(message_id: str, broker: Broker | None = None) -> ProgressOf | None:
    """The last report of a message's actor, or None if there was none (in the last day).

    Parameters:
      broker: None takes Dramatiq's global broker.

    Raises:
      BrokerConnectionError: When the server cannot be reached.
      InvalidOption: When the broker is neither a JetStreamBroker nor a StubBroker.

    Examples:
      >>> from dramatiq_jetstream.progress import read_progress
      >>> said = read_progress(message.message_id)
      >>> "nothing" if said is None else f"{said.done} of {said.total}"
      'nothing'
    """
    chosen = broker or dramatiq.get_broker()
    if isinstance(chosen, StubBroker):
        report = _in_memory(chosen).get(message_id)
        return None if report is None else ProgressOf(message_id=message_id, **report)
    if not isinstance(chosen, JetStreamBroker):
        raise InvalidOption(
            "progress is kept by a JetStreamBroker: pass one, or set it as Dramatiq's broker."
        )
    entry = _bucket(chosen).get(short_key(message_id))
    return None if entry is None else ProgressOf(message_id=message_id, **json.loads(entry.value))


def _in_memory(broker: Broker) -> dict[str, dict[str, Any]]:
    return next((one.reports for one in broker.middleware if isinstance(one, Progress)), {})


def _bucket(broker: JetStreamBroker) -> Bucket:
    return broker.bucket(BUCKET)
