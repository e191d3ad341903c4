"""The actor option `hard_time_limit`: how long an attempt may take before its process is killed for it.

Dramatiq's `time_limit` raises an exception in the thread. A thread that never comes back to Python (C code, a call
that blocks) does not notice. Nothing inside the process can end such a thread, so the supervisor of `fleet work` kills
the process (see `fleet.supervisor`) and names the message to a living worker, which settles it here: as an attempt
that ended with `HardTimeLimitExceeded`. So its retry, its result, its callbacks and its dead letter are stored like
those of any failure.

If this process dies while it does that, the supervisor asks the next worker. Without the permission to read the
message from its stream, it goes back to its queue as a message that was begun.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from queue import PriorityQueue
from typing import Any, Final

from dramatiq.worker import Worker, WorkerThread

from dramatiq_jetstream.errors import HardTimeLimitExceeded, InvalidOption
from dramatiq_jetstream.jetstream.reading import message_at
from dramatiq_jetstream.wire.ack_subjects import ack_tokens
from dramatiq_jetstream.wire.connection import Connection, Msg
from dramatiq_jetstream.wire.headers import encode_headers, sendable

from .consumer import JetStreamConsumer
from .delivery import Delivery, Source
from .in_flight import InFlight
from .message import JetStreamMessage

__all__ = [
    "HARD_TIME_LIMIT",
    "KilledAttempts",
    "check_hard_time_limit",
    "hard_time_limits",
    "limit_of",
    "warn_of_unkept_limits",
]

#: The name of the option; milliseconds.
HARD_TIME_LIMIT: Final = "hard_time_limit"

#: The longest limit that a message may ask for, in milliseconds: a year.
LONGEST_MS: Final = 365 * 86_400_000

#: How long to wait for a source that cannot be read, in seconds.
SOURCE_SECONDS: Final = 30.0

#: How long the loop thread may take to note a delivery, in seconds.
NOTE_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)


def check_hard_time_limit(actor: Any) -> None:
    """Raise InvalidOption for an actor whose limit can never work."""
    limit = actor.options.get(HARD_TIME_LIMIT)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidOption(
            f"{HARD_TIME_LIMIT}={limit!r} of actor {actor.actor_name!r} cannot be used: give whole milliseconds, from "
            "1 up."
        )


def hard_time_limits(actors: Mapping[str, Any]) -> dict[str, int]:
    """The limit of each actor that has one, in milliseconds."""
    return {
        name: actor.options[HARD_TIME_LIMIT]
        for name, actor in actors.items()
        if actor.options.get(HARD_TIME_LIMIT)
    }


def limit_of(options: Mapping[str, Any], default: int | None) -> int | None:
    """The limit that a message asks for, in milliseconds; its actor's when that is none."""
    limit = options.get(HARD_TIME_LIMIT)
    usable = isinstance(limit, int) and not isinstance(limit, bool) and 0 < limit <= LONGEST_MS
    return limit if usable else default


def warn_of_unkept_limits(actors: Mapping[str, Any]) -> None:
    """Say whose limits nothing keeps in a process without a supervisor."""
    names = sorted(hard_time_limits(actors))
    if names:
        logger.warning(
            "%s of %s is not kept here, because only `fleet work` can kill a process for it.",
            HARD_TIME_LIMIT,
            ", ".join(names),
        )


class KilledAttempts:
    """Settles, in this process, messages whose attempt ended with another process.

    Parameters:
      take_over: Has a worker thread run messages our way; called on the thread that runs them.
    """

    def __init__(
        self, connection: Connection, in_flight: InFlight, take_over: Callable[[WorkerThread], None]
    ) -> None:
        self._connection = connection
        self._in_flight = in_flight
        self._take_over = take_over

    def settle(self, worker: Worker, ack_subject: str, error: HardTimeLimitExceeded) -> bool:
        """Settle a message as one whose attempt ended with `error`; False when it is to go back to its queue."""
        try:
            message = self._read(worker, ack_subject)
        except Exception as failure:  # noqa: BLE001 - whatever is wrong, the message must not wait for its `ack_wait`
            logger.warning("A message that was killed after its time limit begins again: %s", failure)
            return False
        if message is not None:
            message.killed = error
            self._run(worker, message)
        return True

    def _read(self, worker: Worker, ack_subject: str) -> JetStreamMessage | None:
        """The message, held by this process from now on; None when it is settled, or here, already."""
        source = self._wait_for_source(worker, ack_subject)
        stored = message_at(self._connection, source.stream, int(ack_tokens(ack_subject)[3]))
        if stored is None:
            return None
        headers = encode_headers(sendable(stored.headers)) if stored.headers else None
        delivery = Delivery(Msg(stored.subject, ack_subject, stored.data, headers), source, _Owner())
        message, arguments = source.decode(delivery)
        return JetStreamMessage(message, delivery, arguments) if self._hold(delivery) else None

    def _wait_for_source(self, worker: Worker, ack_subject: str) -> Source:
        """Where the message came from, once this process reads from there: it may just have started."""
        deadline = time.monotonic() + SOURCE_SECONDS
        while True:
            source = self._source(worker, ack_subject)
            if source is not None and source.durable.certain:
                return source
            if time.monotonic() > deadline:
                raise LookupError(f"this process does not read from where {ack_subject} was delivered")
            time.sleep(0.05)

    def _source(self, worker: Worker, ack_subject: str) -> Source | None:
        for thread in list(worker.consumers.values()):
            if isinstance(thread.consumer, JetStreamConsumer):
                for source in thread.consumer.sources:
                    if ack_tokens(ack_subject)[:2] == [source.stream, source.durable.name]:
                        return source
        return None

    def _hold(self, delivery: Delivery) -> bool:
        held: list[bool] = []
        noted = threading.Event()

        def note() -> None:
            held.append(self._in_flight.receive(delivery))
            noted.set()

        self._connection.post(note)
        noted.wait(NOTE_SECONDS)
        return held == [True]

    def _run(self, worker: Worker, message: JetStreamMessage) -> None:
        # Not one of the worker's threads: each may be busy for as long as its own time limit.
        work_queue: PriorityQueue[Any] = PriorityQueue()
        work_queue.put(message)
        thread = WorkerThread(
            broker=worker.broker, consumers=worker.consumers, work_queue=work_queue, worker_timeout=1_000
        )
        self._take_over(thread)
        thread.process_message(message)


class _Owner:
    """What no consumer asked for takes no room in one."""

    lookahead = False

    def released(self, delivery: Delivery, *, done: bool) -> None:
        """Nothing."""
