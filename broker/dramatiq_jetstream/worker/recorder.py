"""Leaves a record of attempts on the stream of the history (see `history`).

The worker thread makes the record when the middleware is done with the message, puts it into a buffer and goes on. A
thread of this module sends what is in the buffer, again after an outage, and is started by the first record. A buffer
that is full drops further records and says so once. A worker that stops waits up to `FLUSH_SECONDS` for the rest.

If the process dies, what is in the buffer is lost: the records of about the last second, or since an outage began. A
record that was sent twice is stored once, by its `Nats-Msg-Id`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from dramatiq.worker import Worker

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.dead_letters import worker_name
from dramatiq_jetstream.errors import BrokerConnectionError, BrokerError
from dramatiq_jetstream.history import ABORTED, DONE, FAILED, RETRIED, SKIPPED, Record
from dramatiq_jetstream.jetstream.names import (
    HEADER_MSG_ID,
    HEADER_TICK,
    OPTION_TRACE_CONTEXT,
    trace_headers,
)
from dramatiq_jetstream.sending import batches
from dramatiq_jetstream.sending.envelope import HISTORY_OPTION
from dramatiq_jetstream.wire.connection import Connection, Publication
from dramatiq_jetstream.wire.ids import new_id

from .arguments import Describe, shown_arguments
from .current import is_abort
from .delivery import Delivery
from .log_lines import LogLines, lines_of
from .message import Ended, JetStreamMessage
from .tracebacks import text_of, traceback_of

__all__ = ["Recorder"]

#: The most records that wait to be sent, and how many are sent at once.
BUFFER = 5_000
BATCH = 1_000

#: Records are gathered for GATHER_SECONDS and sent. What the server has not stored in STORE_SECONDS is sent again after
#: RETRY_SECONDS. Without another record for IDLE_SECONDS the thread ends.
GATHER_SECONDS = 0.2
IDLE_SECONDS = 10.0
STORE_SECONDS = 5.0
RETRY_SECONDS = 1.0

#: How long a worker that stops waits for its last records.
FLUSH_SECONDS = 2.0

#: Characters of a traceback, and of the name of an error's class.
MAX_TRACEBACK = 4_000
_MAX_NAME = 200

logger = logging.getLogger(__name__)


class Recorder:
    """Records the attempts of one worker process.

    Parameters:
      ensure: Makes the stream if it is missing; False when it may not be made.
      describe: Makes the text of a message's arguments.
      actor_options: The options of the actor with that name.

    Attributes:
      is_on: Whether there is a history.
      keeps_successes: Whether an attempt that succeeded may leave a record.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        ensure: Callable[[], bool],
        describe: Describe,
        actor_options: Callable[[str], Mapping[str, Any]],
    ) -> None:
        self._log_lines = LogLines(actor_options)
        self._names = config.names
        self._share = config.recorded_successes
        self._connection = connection
        self._ensure = ensure
        self._describe = describe
        self.is_on = config.history is not None
        self.keeps_successes = self._share > 0
        self._warned: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Start with nothing: at creation, and in the child of a fork."""
        self._buffer: SimpleQueue[Record | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._is_ready = False
        self._worker = worker_name()
        logging.getLogger().removeHandler(self._log_lines)

    # Around a worker

    def begin(self, worker: Worker) -> None:
        """Keep the log lines of a program's actors that want it; called before its worker boots."""
        actors = worker.broker.actors.values()
        if self.is_on and any(actor.options.get("log_history") for actor in actors):
            self.keeps_successes = True
            logging.getLogger().addHandler(self._log_lines)

    def end(self) -> None:
        """Store what was recorded; called when the worker has shut down."""
        logging.getLogger().removeHandler(self._log_lines)
        self.flush()

    # On a worker thread

    def record(self, message: JetStreamMessage, ended: Ended) -> None:
        """Record how the attempt of a settled message ended, if the setting wants it; nothing is raised."""
        try:
            outcome = _outcome(message, ended)
            if outcome == DONE and not self._wants_success(message):
                return
            self._put(self._record(message, outcome, ended))
        except Exception:
            logger.exception("How message %s ended is not recorded.", message.message_id)

    def record_unstarted(self, delivery: Delivery, error: str) -> None:
        """Record that a message which was not begun here is a dead letter: its workers died, or none has its actor."""
        if not self.is_on:
            return
        try:
            message, _ = delivery.source.decode(delivery)
            now = int(time.time() * 1000)
            retries = message.options.get("retries", 0)
            record = Record(
                message_id=message.message_id,
                queue=message.queue_name,
                actor=message.actor_name,
                outcome=FAILED,
                began=now,
                ended=now,
                attempt=retries + 1 if isinstance(retries, int) else 1,
                deliveries=delivery.deliveries,
                worker=self._worker,
                error=error,
                letter=delivery.origin,
            )
            self._put(record)
        except Exception:
            logger.exception("How %s ended is not recorded.", delivery)

    def _wants_success(self, message: JetStreamMessage) -> bool:
        # Who saw a message fail wants to see that it succeeded.
        return (
            "retries" in message.options
            or HISTORY_OPTION in message.options
            or bool(lines_of(message))
            or self._share >= 1
            or random.random() < self._share
        )

    def _record(self, message: JetStreamMessage, outcome: str, ended: Ended) -> Record:
        error = message._exception or message.follow_up_error
        retries = message.options.get("retries", 0)
        retries = retries if isinstance(retries, int) else 0
        return Record(
            message_id=message.message_id,
            queue=message.queue_name,
            actor=message.actor_name,
            outcome=outcome,
            began=int(ended.began * 1000),
            ended=int(ended.ended * 1000),
            attempt=retries if _is_counted(message, ended) else retries + 1,
            deliveries=message.delivery_count,
            worker=self._worker,
            error_type="" if error is None else type(error).__name__[:_MAX_NAME],
            error="" if error is None else text_of(error),
            traceback="" if error is None else traceback_of(error, MAX_TRACEBACK),
            trace_id=_trace_id(message),
            arguments=shown_arguments(message, self._describe),
            logs=lines_of(message),
            letter=message._delivery.origin if outcome == FAILED else "",
        )

    def _put(self, record: Record) -> None:
        if self._buffer.qsize() >= BUFFER:
            self._warn("more attempts end than the server stores records of: some are left out")
            return
        self._buffer.put(record)
        self._need_thread()

    def _need_thread(self) -> None:
        if self._thread is None:  # two that start at once share the buffer
            self._thread = threading.Thread(target=self._run, name="history", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Wait until what was recorded so far is stored; not without a connection, and not for long."""
        if self._buffer.empty() and self._thread is None:
            return
        stored = threading.Event()
        self._buffer.put(stored)
        self._hurry.set()
        self._need_thread()
        if self._connection.is_connected:
            stored.wait(FLUSH_SECONDS)

    # The thread of the history

    def _run(self) -> None:
        while not self._connection.is_closed:
            try:
                first = self._buffer.get(timeout=IDLE_SECONDS)
            except Empty:
                self._thread = None
                if self._buffer.empty():
                    return
                self._thread = threading.current_thread()
                continue
            self._hurry.wait(GATHER_SECONDS)
            self._hurry.clear()
            entries = [first]
            with contextlib.suppress(Empty):
                while len(entries) < BATCH:
                    entries.append(self._buffer.get_nowait())
            try:
                self._store([self._publication(entry) for entry in entries if isinstance(entry, Record)])
            except Exception:
                logger.exception("Some records of the history are lost.")
            for entry in entries:
                if isinstance(entry, threading.Event):
                    entry.set()
        self._thread = None

    def _publication(self, record: Record) -> Publication:
        subject = self._names.history(record.queue, record.actor, record.message_id)
        return Publication(subject, record.encode(), {HEADER_MSG_ID: new_id()})

    def _store(self, publications: list[Publication]) -> None:
        """Store records, after an outage if need be; what is refused is dropped."""
        while publications:
            if not self._is_ready:  # a missing stream would take a while to be noticed
                self._is_ready = self._make()
            outcomes = batches.store(
                self._connection,
                [(self._names.history_stream, publication) for publication in publications],
                deadline=time.monotonic() + STORE_SECONDS,
                timeout=STORE_SECONDS,
                make_again=lambda _: self._make(),
            )
            for outcome in outcomes:
                if isinstance(outcome, Exception) and not isinstance(outcome, BrokerConnectionError):
                    self._warn(str(outcome), type(outcome).__name__)
            publications = [
                publication
                for publication, outcome in zip(publications, outcomes, strict=True)
                if isinstance(outcome, BrokerConnectionError)
            ]
            if publications and self._connection.is_closed:
                return
            if publications:
                time.sleep(RETRY_SECONDS)

    def _make(self) -> bool:
        """Make the stream; False when that is not allowed, or does not work now."""
        try:
            return self._ensure()
        except BrokerConnectionError:
            return False
        except BrokerError as error:
            self._warn(str(error), type(error).__name__)
            return False

    def _warn(self, what: str, kind: str = "") -> None:
        """Say once for each kind of reason why records are missing."""
        if (kind or what) not in self._warned:
            self._warned.add(kind or what)
            logger.warning("The history lacks records: %s", what)


def _outcome(message: JetStreamMessage, ended: Ended) -> str:
    error = message._exception
    if is_abort(error) or message.is_cancelled:
        return ABORTED
    if ended.skipped and (not message.failed or HEADER_TICK in message.headers):
        return SKIPPED
    if message.failed:
        return FAILED
    if error is None and message.follow_up_error is None:
        return DONE
    # What follows it could not be stored, so it runs again; without Dramatiq's Retries, a failure is the end of it.
    return RETRIED if ended.retried or message.follow_up_error is not None else FAILED


def _is_counted(message: JetStreamMessage, ended: Ended) -> bool:
    """Whether Dramatiq has counted this attempt as a retry; it does so even after the last one."""
    counted = message.options.get("requeue_timestamp")
    return isinstance(counted, (int, float)) and counted >= int(ended.began * 1000)


def _trace_id(message: JetStreamMessage) -> str:
    """The id of the trace in a W3C `traceparent`."""
    context = message.options.get(OPTION_TRACE_CONTEXT)
    parent = trace_headers(context).get("traceparent", "") if context is not None else ""
    if not parent:
        parent = message.headers.get("traceparent", "")
    tokens = parent.split("-")
    return tokens[1] if len(tokens) == 4 and len(tokens[1]) == 32 else ""
