"""Messages that could not be processed, kept as they came, to be inspected, replayed or dropped.

A dead letter is stored before the message it stands for is acknowledged. If the process dies between the two, the
message is delivered again and its letter is stored again on the same subject. The stream keeps one message per subject,
so the letter is there once. A body that leaves no room for the letter's headers within the server's `max_payload` is
stored first, as a message of its own.

A replay publishes the message and then removes the letter. If the process dies between the two, the letter
is still there; replaying it again stores nothing new while JetStream remembers the first replay's
`Nats-Msg-Id` (two minutes), and after that runs the message again. Replaying a letter that is gone does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from dramatiq.encoder import PickleEncoder
from dramatiq.errors import DecodeError
from dramatiq.message import Message, get_encoder

from .errors import ApiError, InvalidOption, MessageTooLarge, NotFound, StreamLost, TopologyMissing
from .jetstream import names as wire_names
from .jetstream.listing import Listing
from .jetstream.names import BODY_SUFFIX, Names
from .jetstream.reading import StoredMessage, first_message, last_message, message_at
from .sending.envelope import HISTORY_OPTION, Event, checked, to_message
from .sending.fitting import ADDED, fit, unfolded
from .sending.references import References
from .wire.connection import Connection
from .wire.error_numbers import NO_MESSAGE_TO_DELETE
from .wire.headers import sendable

if TYPE_CHECKING:
    from .worker.delivery import Delivery

__all__ = [
    "DELIVERED_TOO_OFTEN",
    "KILLED",
    "REASONS",
    "REJECTED",
    "RETRIES_EXHAUSTED",
    "UNDECODABLE",
    "UNKNOWN_ACTOR",
    "DeadLetter",
    "DeadLetters",
]

RETRIES_EXHAUSTED = "retries exhausted"
UNDECODABLE = "undecodable"
UNKNOWN_ACTOR = "unknown actor"
REJECTED = "rejected"
DELIVERED_TOO_OFTEN = "delivered too often"
KILLED = "killed after its time limit"
REASONS = (RETRIES_EXHAUSTED, UNDECODABLE, UNKNOWN_ACTOR, REJECTED, DELIVERED_TOO_OFTEN, KILLED)

#: How many characters of an error's text are kept, and how many of a message's last failures.
MAX_ERROR = 2_000
MAX_HISTORY = 10

#: Characters of a traceback that are kept, and the bytes that it may take in a header.
MAX_TRACEBACK = 12_000
_MAX_TRACEBACK_HEADER = 20_000

#: The bytes that earlier failures may take in a header; all headers of a message have 64 KiB.
_MAX_HISTORY_HEADER = 20_000

#: How many letters are asked for at once.
PAGE = 256

#: How many bodies a listing keeps until their letters come; each has one message's size at most.
MOST_BODIES = 8


def worker_name() -> str:
    """This process for people: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter; times are milliseconds since 1970.

    `history` lists the earlier failures of the same message, oldest first, one mapping for each replay.
    `headers` are those of the message, the trace context among them. `traceback` is that of the last attempt, as Python
    prints it; empty when no error ended it. `attempts` are the recorded attempts of the message with their errors and
    times, oldest first, as `history.Record.as_dict` has them; only `DeadLetters.get` reads them.

    Examples:
      >>> letter = broker.dead_letters.get(broker.status(refused).letter)
      >>> letter.reason, letter.error
      ('retries exhausted', 'ValueError: -1 is no amount')
      >>> letter.decode().args
      ('c-42', -1)
      >>> letter.summary()["actor"]
      'charge'
    """

    id: str
    queue: str
    actor: str | None
    message_id: str | None
    reason: str
    error: str
    deliveries: int
    time: int
    worker: str
    subject: str
    data: bytes
    headers: Mapping[str, str]
    history: tuple[Mapping[str, Any], ...] = field(default=())
    event: Event | None = None
    traceback: str = ""
    attempts: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    def decode(self) -> Message[Any] | None:
        """The message, or None when the bytes are not one."""
        if self.event is not None:
            return to_message(self.event, queue=self.queue, actor=self.actor or "")
        try:
            return checked(Message.decode(unfolded(self.data, self.headers)), self.queue)
        except DecodeError:
            return None

    def summary(self) -> dict[str, Any]:
        """The letter for people and programs, without its bytes."""
        return {
            "id": self.id,
            "queue": self.queue,
            "actor": self.actor,
            "message_id": self.message_id,
            "reason": self.reason,
            "error": self.error,
            "traceback": self.traceback,
            "deliveries": self.deliveries,
            "time": self.time,
            "worker": self.worker,
            "history": [dict(entry) for entry in self.history],
        }


class DeadLetters:
    """The dead letters of a namespace.

    Parameters:
      ensure: Makes the stream of dead letters if it may and must; with True also if it was there once.
      emit: Calls a hook of middleware.
      attempts: Reads what is recorded of the attempts of a message.

    Examples:
      >>> letters = broker.dead_letters
      >>> for letter in letters.list(actor="charge", limit=1):
      ...     print(letter.queue, letter.error)
      default ValueError: -1 is no amount
      >>> letters.get(letter.id) == letters.oldest("default") == letter
      True
      >>> letters.count() == len(list(letters.newest()))
      True
      >>> letters.replay(letter)  # after the cause is mended
      True
      >>> letters.drop(letter)  # it is gone already
      False
    """

    def __init__(
        self,
        connection: Connection,
        names: Names,
        ensure: Callable[[bool], None],
        emit: Callable[..., None],
        attempts: Callable[[str], Sequence[Mapping[str, Any]]] = lambda _: (),
    ) -> None:
        self._attempts = attempts
        self._connection = connection
        self._names = names
        self._ensure = ensure
        self._emit = emit
        self._listing = Listing(connection, names.dead_stream)

    def store(
        self,
        *,
        queue: str,
        origin: str,
        subject: str,
        data: bytes,
        headers: Mapping[str, str],
        reason: str,
        error: str,
        deliveries: int,
        traceback: str = "",
        actor: str | None = None,
        message_id: str | None = None,
        event: Event | None = None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Store a letter; a worker does so before it acks the message.

        Parameters:
          origin: What identifies the message in its stream: the same origin is the same letter.
          subject: Where a replay goes.
          history: The earlier failures of the message, as `history_of` finds them in it.
          event: The event, if this was its first run; a replay hands it to `actor` alone.

        Raises:
          BrokerConnectionError: When it is not known to be stored.

        Examples:
          >>> broker.dead_letters.store(
          ...     queue="default",
          ...     origin="by-hand-1",
          ...     subject=broker.names.task("default"),
          ...     data=charge.message("c-42", 20).encode(),
          ...     headers={},
          ...     reason="rejected",
          ...     error="not before the first of the month",
          ...     deliveries=1,
          ...     actor="charge",
          ... )
          >>> broker.dead_letters.at("by-hand-1").reason
          'rejected'
        """
        self._ensure(False)
        kept = {
            name: value
            for name, value in sendable(headers).items()
            if not name.startswith(("Nats-", "Dramatiq-Dead-")) and name not in wire_names.REQUEUE_HEADERS
        }
        letter = {
            **kept,
            wire_names.HEADER_MSG_ID: f"dead:{origin}:{deliveries}",
            wire_names.HEADER_DEAD_REASON: reason,
            wire_names.HEADER_DEAD_ERROR: _header(error),
            wire_names.HEADER_DEAD_QUEUE: wire_names.encode(queue),
            wire_names.HEADER_DEAD_SUBJECT: subject,
            wire_names.HEADER_DEAD_DELIVERIES: str(deliveries),
            wire_names.HEADER_DEAD_AT: str(int(time.time() * 1000)),
            wire_names.HEADER_DEAD_WORKER: worker_name(),
        }
        if actor is not None:
            letter[wire_names.HEADER_DEAD_ACTOR] = wire_names.encode(actor)
        if message_id is not None:
            letter[wire_names.HEADER_MESSAGE_ID] = wire_names.encode(message_id)
        if event is not None:
            place = {"subject": event.subject, "stream": event.stream, "sequence": event.sequence}
            place.update(time=event.time, id=event.id)
            letter[wire_names.HEADER_DEAD_EVENT] = json.dumps(place)
        if traceback:
            letter[wire_names.HEADER_DEAD_TRACEBACK] = _on_one_line(traceback)
        if history:
            letter[wire_names.HEADER_DEAD_HISTORY] = _bounded(history)
        try:
            self._put(queue, origin, data, letter, kept)
        except (TopologyMissing, StreamLost):
            self._ensure(True)
            self._put(queue, origin, data, letter, kept)

    def _put(
        self, queue: str, origin: str, data: bytes, letter: dict[str, str], kept: Mapping[str, str]
    ) -> None:
        subject = self._names.dead(queue, origin)
        try:
            self._connection.publish(subject, data, letter)
            return
        except MessageTooLarge:
            self._connection.publish(self._names.dead_body(queue, origin), data)
        apart = {**letter, wire_names.HEADER_DEAD_BODY: "apart"}
        try:
            self._connection.publish(subject, b"", apart)
        except MessageTooLarge:
            # The message's own headers are too large; the letter's are bounded.
            needed = {wire_names.HEADER_BODY} | (apart.keys() - kept.keys())
            needed -= {wire_names.HEADER_DEAD_TRACEBACK}
            bounded = {name: value for name, value in apart.items() if name in needed}
            self._connection.publish(subject, b"", bounded)

    def list(
        self,
        queue: str | None = None,
        *,
        actor: str | None = None,
        reason: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> list[DeadLetter]:
        """Dead letters, oldest first, of a queue, actor or reason if given.

        Parameters:
          limit: How many at most.
          after: The id of the last letter of the page before.
        """
        found: list[DeadLetter] = []
        for letter in self._iterate(queue, 1 if after is None else _number(after) + 1):
            if (actor is None or letter.actor == actor) and (reason is None or letter.reason == reason):
                found.append(letter)
                if limit is not None and len(found) >= limit:
                    break
        return found

    def newest(self, queue: str | None = None, *, before: str | None = None) -> Iterator[DeadLetter]:
        """Yield dead letters, newest first, of a queue if given.

        Parameters:
          before: The id of a letter: only those that are older, which is the way to the next page.
        """
        end = None if before is None else _number(before)
        for stored in self._listing.read_back(self._subject(queue), before=end):
            yield self._read(stored)

    def get(self, letter_id: str) -> DeadLetter | None:
        """The letter with an id, or None when it was replayed, dropped, or never there."""
        letter = self._find(letter_id)
        if letter is None or letter.message_id is None:
            return letter
        return dataclasses.replace(letter, attempts=tuple(self._attempts(letter.message_id)))

    def _find(self, letter_id: str) -> DeadLetter | None:
        stored = message_at(self._connection, self._names.dead_stream, _number(letter_id))
        return None if stored is None else self._read(stored)

    def at(self, origin: str) -> DeadLetter | None:
        """The letter of the message with that origin, as `history.Record.letter` names it; None when it is gone.

        Examples:
          >>> failed = broker.history.of(refused.message_id)[-1]
          >>> broker.dead_letters.at(failed.letter).message_id == refused.message_id
          True
        """
        stored = last_message(self._connection, self._names.dead_stream, self._names.dead_at(origin))
        return None if stored is None else self._read(stored)

    def newest_of(self, message_id: str, *, look_at: int) -> DeadLetter | None:
        """The letter of a message among the newest `look_at` ones; None when it is not there.

        Examples:
          >>> broker.dead_letters.newest_of(refused.message_id, look_at=1_000).reason
          'retries exhausted'
        """
        letters = islice(self.newest(), look_at)
        return next((letter for letter in letters if letter.message_id == message_id), None)

    def count(self, queue: str | None = None) -> int:
        """How many letters there are, of a queue if given."""
        try:
            return self._listing.count(self._subject(queue))
        except TopologyMissing:
            return 0

    def replay(self, letter: DeadLetter | str) -> bool:
        """Put a message back on its queue with a fresh set of retries; False when another replay, or a drop, did more.

        Of several replays of one letter at once, the message is put back once, and the one that removes the letter
        returns True.

        The message keeps the history of this failure: should it die again, the next letter lists it. Its age
        counts from now, so that `max_age` does not end it at once.
        """
        found = self._find(letter.id if isinstance(letter, DeadLetter) else letter)
        if found is None:
            return False
        entry = found.summary()
        for name in ("history", "id", "queue", "actor", "message_id", "traceback"):
            del entry[name]
        history = [*map(dict, found.history), entry][-MAX_HISTORY:]
        headers = {**found.headers, wire_names.HEADER_MSG_ID: f"replay:{found.id}:{found.time}"}
        message = found.decode()
        if message is None:
            headers[wire_names.HEADER_DEAD_HISTORY] = json.dumps(history)
        else:
            options = {name: value for name, value in message.options.items() if name not in ADDED}
            options[HISTORY_OPTION] = history
            now = int(time.time() * 1000)
            message = dataclasses.replace(message, options=options, message_timestamp=now)
        self._emit("before_replay", found.queue, headers, message)
        try:
            self._connection.publish(found.subject, self._body(found, message, headers), headers)
        except BaseException as error:
            self._emit("after_replay", found.queue, headers, message, exception=error)
            raise
        self._emit("after_replay", found.queue, headers, message, exception=None)
        return self.drop(found)

    def _body(self, letter: DeadLetter, message: Message[Any] | None, headers: dict[str, str]) -> bytes:
        """What to publish for a letter; what a replay adds is left out if the message would be too large with it."""
        if message is None:
            body = letter.data
            if len(body) > self._connection.room_beside(headers):
                del headers[wire_names.HEADER_DEAD_HISTORY]
            return body
        headers.pop(wire_names.HEADER_BODY, None)
        refer = References(self._connection).refer
        return fit(message, self._connection.room_beside(headers), headers, refer)

    def drop(self, letter: DeadLetter | str) -> bool:
        """Delete a letter for good; False when it is gone already."""
        stream = self._names.dead_stream
        stored = message_at(
            self._connection, stream, _number(letter.id if isinstance(letter, DeadLetter) else letter)
        )
        if stored is None:
            return False
        try:
            self._connection.api(f"STREAM.MSG.DELETE.{stream}", {"seq": stored.sequence, "no_erase": True})
        except ApiError as error:
            if not isinstance(error, NotFound) and error.err_code != NO_MESSAGE_TO_DELETE:
                raise
            return False
        if wire_names.HEADER_DEAD_BODY in stored.headers:
            self._connection.api(f"STREAM.PURGE.{stream}", {"filter": f"{stored.subject}{BODY_SUFFIX}"})
        return True

    def flush(self, queue: str) -> int:
        """Delete all letters of a queue; return how many there were.

        Examples:
          >>> broker.dead_letters.flush("scans")
          0
        """
        purged = 0
        try:
            for subject in (self._names.dead_of_queue(queue), self._names.dead_with_bodies(queue)):
                reply = self._connection.api(f"STREAM.PURGE.{self._names.dead_stream}", {"filter": subject})
                purged = purged or int(reply.get("purged", 0))
        except NotFound:
            return 0
        return purged

    def _subject(self, queue: str | None) -> str:
        return self._names.all_dead if queue is None else self._names.dead_of_queue(queue)

    def _iterate(self, queue: str | None, start: int = 1) -> Iterator[DeadLetter]:
        """Yield letters, oldest first. A body that is stored apart comes in the same pages, before its letter."""
        names = self._names
        everything = names.all_dead_with_bodies if queue is None else names.dead_with_bodies(queue)
        bodies: dict[str, bytes] = {}
        for stored in self._listing.read(everything, start=start, page=PAGE):
            if names.is_dead_body(stored.subject):
                bodies[stored.subject] = stored.data
                if len(bodies) > MOST_BODIES:  # their letters are gone, or were never stored
                    del bodies[next(iter(bodies))]
                continue
            yield self._read(stored, bodies.pop(f"{stored.subject}{BODY_SUFFIX}", None))

    def oldest(self, queue: str | None = None) -> DeadLetter | None:
        """Return the oldest dead letter, of one queue if it is named; None when there is none."""
        stored = first_message(self._connection, self._names.dead_stream, self._subject(queue))
        return None if stored is None else self._read(stored)

    def _read(self, stored: StoredMessage, body: bytes | None = None) -> DeadLetter:
        """The letter that is stored, with its body if that is stored apart; it is asked for unless it is given."""
        if wire_names.HEADER_DEAD_BODY in stored.headers:
            if body is None:
                found = last_message(self._connection, stored.stream, f"{stored.subject}{BODY_SUFFIX}")
                body = b"" if found is None else found.data
            stored = dataclasses.replace(stored, data=body)
        letter = _read(stored)
        if letter.event is not None or letter.message_id is not None:
            return letter
        # It was stored without being decoded, because it came too often. Looking at it must not run what pickle says.
        message = None if isinstance(get_encoder(), PickleEncoder) else letter.decode()
        if message is not None:
            return dataclasses.replace(
                letter,
                actor=message.actor_name,
                message_id=message.message_id,
                history=letter.history or tuple(history_of(message)),
            )
        return letter


def _number(letter_id: str) -> int:
    # A sequence of the server has 64 bits.
    if not letter_id.isdecimal() or len(letter_id) > 19:
        raise InvalidOption(f"dead letter id {letter_id!r} cannot be used: `list` shows the ids, numbers.")
    return int(letter_id)


def _bounded(history: Sequence[Mapping[str, Any]]) -> str:
    """The latest failures that a header can carry."""
    kept = list(history)[-MAX_HISTORY:]
    while len(text := json.dumps(kept)) > _MAX_HISTORY_HEADER and len(kept) > 1:
        del kept[0]
    return text


def _on_one_line(traceback: str) -> str:
    """A traceback as a header can carry it; of one that is too long, the end, which says what was raised."""
    text = traceback[-MAX_TRACEBACK:]
    while len(line := json.dumps(text)) > _MAX_TRACEBACK_HEADER:
        text = text[-len(text) // 2 :]
    return line


def _traceback(headers: Mapping[str, str]) -> str:
    try:
        text = json.loads(headers.get(wire_names.HEADER_DEAD_TRACEBACK, '""'))
    except ValueError:
        return ""  # not ours: any program may publish
    return text if isinstance(text, str) else ""


def _header(text: str) -> str:
    """A text on one line; what UTF-8 cannot encode, as in names of files, is escaped."""
    return " ".join(text.split())[:MAX_ERROR].encode("utf-8", "backslashreplace").decode()


def _read(stored: StoredMessage) -> DeadLetter:
    headers = stored.headers
    own = {name: value for name, value in headers.items() if not name.startswith(("Dramatiq-Dead-", "Nats-"))}
    own.pop(wire_names.HEADER_MESSAGE_ID, None)
    actor = headers.get(wire_names.HEADER_DEAD_ACTOR)
    message_id = headers.get(wire_names.HEADER_MESSAGE_ID)
    event = None
    if wire_names.HEADER_DEAD_EVENT in headers:
        place = json.loads(headers[wire_names.HEADER_DEAD_EVENT])
        event = Event(
            subject=place["subject"],
            data=stored.data,
            headers={wire_names.HEADER_MSG_ID: place["id"], **own},
            stream=place["stream"],
            sequence=place["sequence"],
            time=place["time"],
        )
    return DeadLetter(
        id=str(stored.sequence),
        queue=wire_names.decode(headers.get(wire_names.HEADER_DEAD_QUEUE, "")),
        actor=None if actor is None else wire_names.decode(actor),
        message_id=None if message_id is None else wire_names.decode(message_id),
        reason=headers.get(wire_names.HEADER_DEAD_REASON, ""),
        error=headers.get(wire_names.HEADER_DEAD_ERROR, ""),
        deliveries=int(headers.get(wire_names.HEADER_DEAD_DELIVERIES, "0")),
        time=int(headers.get(wire_names.HEADER_DEAD_AT, "0")),
        worker=headers.get(wire_names.HEADER_DEAD_WORKER, ""),
        subject=headers.get(wire_names.HEADER_DEAD_SUBJECT, ""),
        data=stored.data,
        headers=own,
        history=tuple(_history(headers)),
        event=event,
        traceback=_traceback(headers),
    )


def history_of(message: Any) -> Sequence[Mapping[str, Any]]:
    """The earlier failures that a replayed message carries with it, oldest first."""
    return _failures(message.options.get(HISTORY_OPTION))


def history_in(delivery: Delivery) -> Sequence[Mapping[str, Any]]:
    """The earlier failures of what was replayed without being a message, from its headers."""
    return _history(delivery.headers)


def _history(headers: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    try:
        history = json.loads(headers.get(wire_names.HEADER_DEAD_HISTORY, "[]"))
    except ValueError:
        return []  # not ours: any program may publish
    return _failures(history)


#: What a replay notes of a failure, with what is shown where another program noted something else.
_NOTED = {"reason": "", "error": "", "deliveries": 0, "time": 0, "worker": ""}

#: The end of the year 9999, in milliseconds since 1970.
_LATEST = 253_402_300_799_999


def _failures(history: Any) -> list[dict[str, Any]]:
    """Earlier failures as they can be shown, out of what a message says of them."""
    found = []
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, Mapping):
            noted: dict[str, Any] = {
                name: entry[name] if type(entry.get(name)) is type(usual) else usual
                for name, usual in _NOTED.items()
            }
            noted["time"] = noted["time"] if 0 <= noted["time"] <= _LATEST else 0
            found.append({**entry, **noted})
    return found
