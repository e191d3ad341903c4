"""The state of one message: waiting, delayed, running, retrying, done, failed, dead, aborted.

    status = broker.status(message_id)
    print(status.state, status.error)

It is put together from what the server has, each part found by its subject or key: the schedule of a delay or retry,
the presence of workers, the history, the dead letter, the result. What is told depends on what is kept: `done` needs a
result, or a record of the success (the broker's setting `history`); without either, a message that succeeded is
`unknown`, as is one that never was.

A message that waits has no subject of its own. Given the message itself, it is looked for where its time puts it;
given its id alone, among the oldest and the newest that wait on each queue. `LOOKED_AT` messages of a queue are read at
most, so in a long queue a message that waits may be `unknown`. Workers tell within about a second what they run and how
it ended; until then a message that has begun waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Literal, Protocol, runtime_checkable

import dramatiq
from dramatiq.common import q_name
from dramatiq.encoder import PickleEncoder
from dramatiq.errors import DecodeError
from dramatiq.message import Message, get_encoder
from dramatiq.middleware import Middleware
from dramatiq.results import ResultFailure, ResultMissing, Results

from .dead_letters import DeadLetter, DeadLetters
from .errors import InvalidOption, NotFound
from .history import ABORTED, DONE, FAILED, SKIPPED, History, Record
from .jetstream.inventory import consumers
from .jetstream.listing import Listing
from .jetstream.names import HEADER_TICK, Names
from .jetstream.reading import StoredMessage, first_message_since, last_message
from .sending import delays, envelope
from .sending.fitting import unfolded
from .wire.connection import Connection
from .worker.roster import ProgressOf, WorkerInfo

__all__ = ["LOOKED_AT", "MessageStatus", "message_status"]

State = Literal[
    "waiting", "delayed", "running", "retrying", "done", "failed", "dead", "aborted", "skipped", "unknown"
]

#: How many waiting messages of a queue one status reads at most, and how many bytes.
LOOKED_AT: Final = 5_000
_BYTES_LOOKED_AT = 16 * 1024 * 1024

#: How much sooner than its sender says a message may have been stored, as clocks differ; milliseconds.
_SKEW_MS = 1_000

#: How many messages are asked for at once.
_PAGE = 1_000

#: How many of the newest dead letters are searched for a message without a record.
_LETTERS_LOOKED_AT = 100


@dataclass(frozen=True)
class MessageStatus:
    """What is known of one message. Times are milliseconds since 1970; what is not known is None.

    Attributes:
      state: `waiting` (ready, or a worker has it and has not begun), `delayed`, `running`, `retrying` (it failed and
        waits for its next try), `done`, `failed` (for good, and it has no dead letter), `dead` (it has one), `aborted`,
        `skipped` (by a middleware, or a periodic task's tick that came too late), `unknown`.
      attempt: The attempt that runs or comes next, 1 for the first; of a message that is over, the last one.
      since: When this state began: stored, begun or ended.
      due: Of `delayed` and `retrying`: when it runs.
      worker: Of `running` the process that runs it, of the others the one that ran it last, as `host:pid`.
      error: What the last attempt raised, as `Class: text`.
      progress: Of `running`: what its actor said last.
      letter: Of `dead`: the id of its dead letter.

    Examples:
      >>> status = broker.status(refused)
      >>> status.state, status.error
      ('dead', 'ValueError: -1 is no amount')
      >>> status.as_dict()["attempt"]
      1
    """

    message_id: str
    state: State
    queue: str | None = None
    actor: str | None = None
    attempt: int | None = None
    since: int | None = None
    due: int | None = None
    worker: str | None = None
    error: str | None = None
    progress: ProgressOf | None = None
    letter: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@runtime_checkable
class HasStatus(Protocol):
    """A broker that knows the state of messages."""

    def status(self, message: str | Message[Any]) -> MessageStatus:
        """See `JetStreamBroker.status`."""


def message_status(message: Message[Any], broker: dramatiq.Broker | None = None) -> MessageStatus:
    """The state of a message that this program sent.

    Parameters:
      broker: None takes Dramatiq's global broker.

    Raises:
      InvalidOption: When the broker is no JetStreamBroker.
      BrokerConnectionError: When the server does not answer in time.

    Examples:
      >>> from dramatiq_jetstream.status import message_status
      >>> message_status(message).state
      'done'
    """
    chosen = dramatiq.get_broker() if broker is None else broker
    if not isinstance(chosen, HasStatus):
        raise InvalidOption("status is known by a JetStreamBroker: pass one, or set it as Dramatiq's broker.")
    return chosen.status(message)


def result_of(middleware: Iterable[Middleware], message: Message[Any]) -> object:
    """Return the stored result of a message; raises as `Message.get_result` does, also where there is no `Results`."""
    for each in middleware:
        if isinstance(each, Results):
            return each.backend.get_result(message)
    raise ResultMissing(message)


class StatusReader:
    """Puts the state of messages together.

    Parameters:
      queues: Returns the queues to look at.
      workers: Returns the workers that are alive.
      result: Returns the stored result of a message; raises `ResultFailure` or `ResultMissing`.
      actors: Returns the queue and name of each actor of the program.
    """

    def __init__(
        self,
        connection: Connection,
        names: Names,
        history: History,
        dead_letters: DeadLetters,
        *,
        queues: Callable[[], Iterable[str]],
        workers: Callable[[], list[WorkerInfo]],
        result: Callable[[Message[Any]], object],
        actors: Callable[[], Iterable[tuple[str, str]]],
    ) -> None:
        self._connection = connection
        self._names = names
        self._history = history
        self._dead_letters = dead_letters
        self._queues = queues
        self._workers = workers
        self._result = result
        self._actors = actors
        self._listings: dict[str, Listing] = {}

    def read(self, message: str | Message[Any]) -> MessageStatus:
        """See `JetStreamBroker.status`."""
        message_id = message if isinstance(message, str) else message.message_id
        records = self._history.of(message_id)
        last = records[-1] if records else None
        return (
            self._running(message_id, records)
            or self._scheduled(message_id, message, last)
            or self._ended(last)
            or self._waiting(message_id, message, last)
            or self._failed(last)
            or self._with_result(message_id, message)
            or self._buried(message_id)
            or MessageStatus(message_id, "unknown")
        )

    def _queues_of(self, message: str | Message[Any], last: Record | None) -> list[str]:
        """Where the message can be: on its queue, if that is known."""
        if isinstance(message, Message):
            return [q_name(message.queue_name)]
        return [last.queue] if last is not None else sorted(self._queues())

    def _running(self, message_id: str, records: list[Record]) -> MessageStatus | None:
        for worker in self._workers():
            for running in worker.running:
                # What has ended since its worker said so is in the history.
                if running.message_id == message_id and running.since not in [r.began for r in records]:
                    return MessageStatus(
                        message_id,
                        "running",
                        running.queue,
                        running.actor,
                        attempt=running.attempt,
                        since=running.since,
                        worker=f"{worker.host}:{worker.pid}",
                        error=_error(records[-1]) if records else None,
                        progress=running.progress,
                    )
        return None

    def _scheduled(
        self, message_id: str, message: str | Message[Any], last: Record | None
    ) -> MessageStatus | None:
        for queue in self._queues_of(message, last):
            stored = delays.waiting(self._connection, self._names, queue, message_id)
            if stored is None:
                continue
            found = _decoded(stored)
            retries = _retries(found)
            return MessageStatus(
                message_id,
                "retrying" if retries else "delayed",
                queue,
                None if found is None else found.actor_name,
                attempt=retries + 1,
                since=stored.time,
                due=delays.eta_of(stored),
                worker=last.worker if last is not None else None,
                error=_error(last) or _raised(found),
            )
        return None

    def _ended(self, last: Record | None) -> MessageStatus | None:
        if last is None:
            return None
        if last.outcome == FAILED:
            letter = self._dead_letters.at(last.letter) if last.letter else None
            return None if letter is None else self._dead(last.message_id, letter, last)
        states: dict[str, State] = {DONE: "done", ABORTED: "aborted", SKIPPED: "skipped"}
        return _over(last, states[last.outcome]) if last.outcome in states else None

    def _waiting(
        self, message_id: str, message: str | Message[Any], last: Record | None
    ) -> MessageStatus | None:
        for queue in self._queues_of(message, last):
            for stored in self._ready(queue, message):
                found = _decoded(stored)
                if found is not None and _id_of(stored, found) == message_id:
                    return MessageStatus(
                        message_id,
                        "waiting",
                        queue,
                        found.actor_name,
                        attempt=_retries(found) + 1,
                        since=stored.time,
                        worker=last.worker if last is not None else None,
                        error=_error(last),
                    )
        return None

    def _ready(self, queue: str, message: str | Message[Any]) -> Iterator[StoredMessage]:
        """Messages of a queue that wait for a worker, or were taken by one: those that may be the one wanted."""
        stream = self._names.queue_stream(queue)
        for subject, floor in self._floors(queue, stream):
            if isinstance(message, Message):
                since = int(message.options.get("eta") or message.message_timestamp) - _SKEW_MS
                moment = datetime.fromtimestamp(since / 1000, UTC)
                first = first_message_since(self._connection, stream, subject, moment)
                if first is not None:
                    yield from self._look(stream, subject, max(first.sequence, floor + 1), LOOKED_AT)
                continue
            last = last_message(self._connection, stream, subject)
            if last is None or last.sequence <= floor:
                continue
            newest = last.sequence - LOOKED_AT // 2 + 1
            yield from self._look(
                stream, subject, floor + 1, LOOKED_AT if newest <= floor else LOOKED_AT // 2
            )
            if newest > floor:
                yield from self._look(stream, subject, newest, LOOKED_AT // 2)

    def _floors(self, queue: str, stream: str) -> list[tuple[str, int]]:
        """The subjects of a queue, and up to where each is done: what is done may be there for a moment longer."""
        try:
            feeding = list(consumers(self._connection, stream))
        except NotFound:
            return []
        floors = [
            (info["config"]["filter_subject"], int(info["ack_floor"]["stream_seq"])) for info in feeding
        ]
        return floors or [(self._names.task(queue), 0), (self._names.tasks(queue), 0)]

    def _look(self, stream: str, subject: str, start: int, most: int) -> Iterator[StoredMessage]:
        if stream not in self._listings:
            self._listings[stream] = Listing(self._connection, stream)
        room = _BYTES_LOOKED_AT
        for stored in islice(self._listings[stream].read(subject, start=start, page=_PAGE), most):
            yield stored
            room -= len(stored.data)
            if room < 0:
                return

    def _failed(self, last: Record | None) -> MessageStatus | None:
        if last is None:
            return None
        if last.outcome == FAILED:
            return _over(last, "failed")
        # Its retry was due: it waits beyond what was looked at, or was cancelled.
        status = _over(last, "waiting" if self._is_long(last.queue) else "unknown")
        return replace(status, attempt=last.attempt + 1, since=None)

    def _is_long(self, queue: str) -> bool:
        """Whether a queue holds more than one status looks at."""
        feeding = consumers(self._connection, self._names.queue_stream(queue))
        return sum(int(info["num_pending"] + info["num_ack_pending"]) for info in feeding) > LOOKED_AT

    def _with_result(self, message_id: str, message: str | Message[Any]) -> MessageStatus | None:
        """What a result says, of the actor of the message, or of any actor of this program."""
        if isinstance(message, Message):
            candidates = [message]
        else:
            candidates = [Message(queue, actor, (), {}, {}, message_id) for queue, actor in self._actors()]
        for candidate in candidates:
            state: State = "done"
            error = None
            try:
                self._result(candidate)
            except ResultMissing:
                continue
            except ResultFailure as failure:
                state, error = "failed", str(failure)
            return MessageStatus(message_id, state, candidate.queue_name, candidate.actor_name, error=error)
        return None

    def _buried(self, message_id: str) -> MessageStatus | None:
        letter = self._dead_letters.newest_of(message_id, look_at=_LETTERS_LOOKED_AT)
        return None if letter is None else self._dead(message_id, letter, None)

    @staticmethod
    def _dead(message_id: str, letter: DeadLetter, last: Record | None) -> MessageStatus:
        return MessageStatus(
            message_id,
            "dead",
            letter.queue,
            letter.actor,
            attempt=None if last is None else last.attempt,
            since=letter.time,
            worker=letter.worker,
            error=letter.error,
            letter=letter.id,
        )


def _over(last: Record, state: State) -> MessageStatus:
    return MessageStatus(
        last.message_id,
        state,
        last.queue,
        last.actor,
        attempt=last.attempt,
        since=last.ended,
        worker=last.worker,
        error=_error(last),
    )


def _error(record: Record | None) -> str | None:
    """What an attempt raised, if it did."""
    return f"{record.error_type}: {record.error}" if record is not None and record.error_type else None


def _decoded(stored: StoredMessage) -> Message[Any] | None:
    if isinstance(get_encoder(), PickleEncoder):
        return None  # to look at a message must not run what its bytes say
    try:
        return envelope.decode(unfolded(stored.data, stored.headers))
    except DecodeError:
        return None


def _raised(message: Message[Any] | None) -> str | None:
    """What the attempt before raised, by the traceback that a retry carries; its record may not be stored yet."""
    traceback = None if message is None else message.options.get("traceback")
    if not isinstance(traceback, str):
        return None
    name, colon, text = traceback.strip().rpartition("\n")[2].partition(":")
    return f"{name.rpartition('.')[2]}{colon}{text}"


def _id_of(stored: StoredMessage, message: Message[Any]) -> str:
    """The id under which a worker will run a message: every tick of a schedule has one of its own."""
    return f"{message.message_id}:{stored.sequence}" if HEADER_TICK in stored.headers else message.message_id


def _retries(message: Message[Any] | None) -> int:
    retries = 0 if message is None else message.options.get("retries", 0)
    return retries if isinstance(retries, int) else 0
