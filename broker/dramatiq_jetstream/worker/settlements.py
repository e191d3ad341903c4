"""The answers that this process gave to deliveries: kept until there is proof of them, and remembered for a while.

An ack is a plain publish, so it can be lost with the connection, and it waits in the server's memory until the server
gets to it: one that syncs each of them to disk (`sync_interval: always`) does some thousands a second, and a fleet
sends more. So every answer is kept until there is proof. Once a second each consumer is asked: an in-progress signal
for a message that is done, which changes nothing, is answered when the server has come to it, and that is after
everything sent before. (For one that was given back it would put off its next delivery; if such an answer is lost, the
message comes when its `ack_wait` is over.) What has no proof is sent again when its durable is certain after a doubt
(see `durables`), and when there is too much of it nothing more is asked for (see `pulling`).

While a durable is in doubt, its answers are only kept. If a new life of it begins, they are dropped, because the server
would take them for answers to other messages.

A server that crashes forgets the last acks it came to, and even that it delivered those messages; so does a cluster
whose leader dies. So what was acked is remembered for some seconds longer than its proof, and after a doubt, when that
may have happened, for two minutes.

There are thousands of answers at a time. They are kept as text in dictionaries, and proven as a whole, because Python's
garbage collector looks again and again at each tuple that has anything else in it.

If the process dies, all this is forgotten: work whose ack had not arrived is repeated. It belongs to the loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from dramatiq_jetstream.wire.connection import Connection, Msg

from .durables import Durable

__all__ = ["ACK", "NAK", "WPI", "Key", "Settlements", "nak_after"]

ACK = b"+ACK"
NAK = b"-NAK"
WPI = b"+WPI"

#: How long a proven ack is remembered, unless there are more than REMEMBER_MOST: longer than it takes to notice that a
#: leader is gone.
REMEMBER_SECONDS = 8.0
REMEMBER_MOST = 20_000

#: How long it is remembered when a doubt came after it.
REMEMBER_OVER_DOUBT_SECONDS = 120.0

#: How often the server is asked how far it has come with the acks. Without a reply within PROBE_TIMEOUT_SECONDS, the
#: question or the acks may be lost, and all are sent again; a slow server is given twice as long each time.
PROBE_INTERVAL_SECONDS = 1.0
PROBE_TIMEOUT_SECONDS = 30.0
LONGEST_PROBE_TIMEOUT_SECONDS = 480.0

#: With more unproven settlements than this, or without a reply to a question for this long, nothing more is fetched.
MAX_UNPROVEN = 50_000
MAX_LAG_SECONDS = 20.0

#: Stream, consumer, sequence, and the time of storing.
Key = tuple[str, str, int, int]


def nak_after(delay: int) -> bytes:
    """An answer that asks for another delivery after `delay` milliseconds."""
    return b'-NAK {"delay": %d}' % (delay * 1_000_000)


@dataclass(slots=True)
class _Round:
    """The answers between two questions to a consumer: which, and where they went."""

    acks: dict[Key, str] = field(default_factory=dict)
    others: dict[Key, tuple[str, bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.acks) + len(self.others)


@dataclass(slots=True)
class _Book:
    """The answers to one durable's deliveries.

    Attributes:
      sent: Those that no question has followed.
      asked: Those before the question that awaits its answer, since the time `since`; None when there is no question.
      patience: Seconds that the answer to the next question is awaited.
      done, done_before: What was acked with proof, in two generations: when the newer is old enough, the older one is
        dropped as a whole, at the time `turned`.
      done_over_doubt: What was acked before the latest doubts, and when the doubt was, in the order of time.
    """

    sent: _Round = field(default_factory=_Round)
    asked: _Round | None = None
    since: float = 0.0
    patience: float = PROBE_TIMEOUT_SECONDS
    done: set[Key] = field(default_factory=set)
    done_before: set[Key] = field(default_factory=set)
    turned: float = 0.0
    done_over_doubt: dict[Key, float] = field(default_factory=dict)

    @property
    def unproven(self) -> int:
        return len(self.sent) + (0 if self.asked is None else len(self.asked))

    def rounds(self) -> Iterator[_Round]:
        if self.asked is not None:
            yield self.asked
        yield self.sent

    def has_acked(self, key: Key) -> bool:
        return (
            key in self.sent.acks
            or (self.asked is not None and key in self.asked.acks)
            or key in self.done
            or key in self.done_before
            or key in self.done_over_doubt
        )

    def note_proven(self, proven: _Round) -> None:
        self.done.update(proven.acks)
        now = time.monotonic()
        if now - self.turned >= REMEMBER_SECONDS or len(self.done) >= REMEMBER_MOST:
            self.turned = now
            self.done_before, self.done = self.done, set()
            for key, since in list(self.done_over_doubt.items()):
                if now - since < REMEMBER_OVER_DOUBT_SECONDS:
                    break
                del self.done_over_doubt[key]

    def remember(self) -> None:
        """Keep in mind for long what was acked lately: the server may have forgotten it."""
        now = time.monotonic()
        acked = (key for each in self.rounds() for key in each.acks)
        for key in (*self.done_before, *self.done, *acked):
            self.done_over_doubt.pop(key, None)
            self.done_over_doubt[key] = now


class Settlements:
    """The answers of one process to all its durables.

    Parameters:
      doubt: Called with a durable that does not answer a question.
    """

    def __init__(self, connection: Connection, doubt: Callable[[Durable], None]) -> None:
        self._connection = connection
        self._doubt = doubt
        self._books: dict[Durable, _Book] = {}
        self._probed = 0.0
        connection.on_tick(self._probe)
        connection.on_fork(self._books.clear)  # what the parent settles is the parent's

    @property
    def unproven(self) -> int:
        return sum(book.unproven for book in list(self._books.values()))

    @property
    def waits(self) -> bool:
        """Whether answers wait for a doubt to end."""
        return any(
            book.unproven and not (durable.certain or durable.missing)
            for durable, book in list(self._books.items())
        )

    def unproven_of(self, durable: Durable) -> Iterable[Key]:
        """What is answered and may be answered once more."""
        for round_ in self._book(durable).rounds():
            yield from round_.acks
            yield from round_.others

    def _book(self, durable: Durable) -> _Book:
        book = self._books.get(durable)
        if book is None:
            book = self._books[durable] = _Book()
        return book

    def send(self, durable: Durable, key: Key, ack_subject: str, settlement: bytes) -> None:
        """Give the server its answer to a delivery of the present life, now or when the durable is certain."""
        book = self._books.get(durable) or self._book(durable)
        if settlement == ACK:
            book.sent.acks[key] = ack_subject
        else:
            book.sent.others[key] = ack_subject, settlement
        if durable.certain:
            self._connection.respond(ack_subject, settlement)

    def note_done(self, durable: Durable, key: Key) -> None:
        """Remember that a message of an earlier life is done, in case it is delivered in this one."""
        self._book(durable).done_over_doubt[key] = time.monotonic()

    def has_acked(self, durable: Durable, key: Key) -> bool:
        """Whether what is delivered again was acked, so that it must not run again."""
        book = self._books.get(durable)
        return book is not None and book.has_acked(key)

    def drop(self, durable: Durable, key: Key) -> None:
        """Forget that a delivery was given back: it came again, and the answer would give away what we hold now."""
        book = self._books.get(durable)
        if book is not None:
            book.sent.others.pop(key, None)
            if book.asked is not None:
                book.asked.others.pop(key, None)

    def is_behind(self, durable: Durable) -> bool:
        """Whether the server has too much left to do to be asked for more."""
        if self.unproven > MAX_UNPROVEN:
            return True
        book = self._books.get(durable)
        return book is not None and book.asked is not None and time.monotonic() - book.since > MAX_LAG_SECONDS

    def resume(self, durable: Durable, *, same: bool) -> None:
        """A doubt is over: send again what has no proof, or drop it if a new life begins."""
        book = self._books.get(durable)
        if book is None:
            return
        book.remember()
        again = _Round()
        if same:
            for each in book.rounds():
                again.acks.update(each.acks)
                again.others.update(each.others)
        book.sent, book.asked = again, None
        for ack_subject in again.acks.values():
            self._connection.respond(ack_subject, ACK)
        for ack_subject, settlement in again.others.values():
            self._connection.respond(ack_subject, settlement)

    def _probe(self) -> None:
        """Ask each consumer whose deliveries were answered since the last time how far it has come."""
        now = time.monotonic()
        if now - self._probed < PROBE_INTERVAL_SECONDS or not self._connection.is_open:
            return
        self._probed = now
        for durable, book in self._books.items():
            if not durable.certain or book.asked is not None or len(book.sent) == 0:
                continue
            asked = book.asked = book.sent
            book.sent, book.since = _Round(), now
            if asked.acks:
                self._connection.query(
                    next(reversed(asked.acks.values())),
                    WPI,
                    self._prover(durable, book, asked),
                    book.patience,
                )
            else:
                self._note_proven(book, asked)

    def _prover(self, durable: Durable, book: _Book, asked: _Round) -> Callable[[Msg | BaseException], None]:
        def note(reply: Msg | BaseException) -> None:
            if book.asked is not asked:
                return  # asked before a doubt, after which everything was sent again
            if isinstance(reply, BaseException):
                book.patience = min(2 * book.patience, LONGEST_PROBE_TIMEOUT_SECONDS)
                self._doubt(durable)
            else:
                self._note_proven(book, asked)

        return note

    def _note_proven(self, book: _Book, asked: _Round) -> None:
        book.asked = None
        book.patience = PROBE_TIMEOUT_SECONDS
        book.note_proven(asked)
