"""The settlements that this process has sent: kept until the server has proven them, and remembered for a while.

An ack is a plain publish, so it can be lost with the connection, and it waits in the server's memory until the server
gets to it. So every settlement is kept until it is proven. Once a second each consumer is asked: the question is an
in-progress signal for a message that is done, which changes nothing. The server replies when it gets to it, which is
after everything sent before. (For a requeued message the question would delay its next delivery; if a nak is lost, the
message comes when its `ack_wait` is over.) What is unproven is sent again when its durable is certain after a doubt
(see `durables`), and when there is too much of it, nothing more is fetched (see `pulling`).

While a durable is in doubt, its settlements are kept and not sent. If a new life begins, they are dropped, because the
server would apply them to other messages.

A server that crashes forgets the last acks it came to, and even that it delivered those messages; so does a cluster
whose leader dies. So an ack is remembered for some seconds after its proof, and for two minutes after a doubt, when
that may have happened.

There are thousands of settlements at a time. They are kept as text in dictionaries, and proven as a whole, because
Python's garbage collector revisits every tuple that holds anything else.

If the process dies, all this is forgotten: work whose ack had not arrived is repeated. It belongs to the loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from dramatiq_jetstream.wire.connection import Connection, Msg

from .durables import Durable
from .removals import Removals

__all__ = ["ACK", "NAK", "WPI", "Key", "Settlements", "nak_after"]

ACK = b"+ACK"
NAK = b"-NAK"
WPI = b"+WPI"

#: How long a proven ack is remembered, up to REMEMBER_MOST of them: longer than it takes to notice a lost leader.
REMEMBER_SECONDS = 8.0
REMEMBER_MOST = 20_000

#: How long an ack is remembered when its stream was in doubt after it.
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
    """A nak that asks for another delivery after `delay` milliseconds."""
    return b'-NAK {"delay": %d}' % (delay * 1_000_000)


@dataclass(slots=True)
class _Round:
    """The settlements between two questions to a consumer, with their ack subjects."""

    acks: dict[Key, str] = field(default_factory=dict)
    others: dict[Key, tuple[str, bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.acks) + len(self.others)


@dataclass(slots=True)
class _Book:
    """The settlements of one durable's deliveries.

    Attributes:
      sent: Those that no question has followed yet.
      asked: Those before the question that has waited for its reply since `since`; None without a question.
      patience: Seconds that the reply to the next question is awaited.
      done, done_before: Proven acks in two generations; when the newer is old enough, the older is dropped as a whole,
        at the time `turned`.
      done_over_doubt: Acks from before the latest doubts, with the time of the doubt, oldest first.
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
        """Remember recent acks for longer: the server may have lost them."""
        now = time.monotonic()
        acked = (key for each in self.rounds() for key in each.acks)
        for key in (*self.done_before, *self.done, *acked):
            self.done_over_doubt.pop(key, None)
            self.done_over_doubt[key] = now


class Settlements:
    """The settlements of one process, for all its durables.

    Parameters:
      doubt: Called with a durable whose server does not reply to a question.
      removals: Remove what is proven to be done.
    """

    def __init__(self, connection: Connection, doubt: Callable[[Durable], None], removals: Removals) -> None:
        self._connection = connection
        self._doubt = doubt
        self._removals = removals
        self._books: dict[Durable, _Book] = {}
        self._probed = 0.0
        connection.on_tick(self._probe)
        connection.on_fork(self._books.clear)  # the parent's settlements are the parent's

    @property
    def unproven(self) -> int:
        return sum(book.unproven for book in list(self._books.values()))

    @property
    def waits(self) -> bool:
        """Whether settlements wait for a doubt to end."""
        return any(
            book.unproven and not (durable.certain or durable.missing)
            for durable, book in list(self._books.items())
        )

    def unproven_of(self, durable: Durable) -> Iterable[Key]:
        """The settled messages whose settlement may be sent once more."""
        for round_ in self._book(durable).rounds():
            yield from round_.acks
            yield from round_.others

    def _book(self, durable: Durable) -> _Book:
        book = self._books.get(durable)
        if book is None:
            book = self._books[durable] = _Book()
        return book

    def send(self, durable: Durable, key: Key, ack_subject: str, settlement: bytes) -> None:
        """Send the settlement of a delivery of the present life, now or when the durable is certain."""
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
        """Drop the nak of a delivery that came again: sent again, it would requeue what we hold now."""
        book = self._books.get(durable)
        if book is not None:
            book.sent.others.pop(key, None)
            if book.asked is not None:
                book.asked.others.pop(key, None)

    def is_behind(self, durable: Durable) -> bool:
        """Whether the server is too far behind to be asked for more."""
        if self.unproven > MAX_UNPROVEN or self._removals.has_many(durable):
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
        """Ask each consumer with new settlements how far the server has come."""
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
                self._note_proven(durable, book, asked)

    def _prover(self, durable: Durable, book: _Book, asked: _Round) -> Callable[[Msg | BaseException], None]:
        def note(reply: Msg | BaseException) -> None:
            if book.asked is not asked:
                return  # asked before a doubt, after which everything was sent again
            if isinstance(reply, BaseException):
                book.patience = min(2 * book.patience, LONGEST_PROBE_TIMEOUT_SECONDS)
                self._doubt(durable)
            else:
                self._note_proven(durable, book, asked)

        return note

    def _note_proven(self, durable: Durable, book: _Book, asked: _Round) -> None:
        self._removals.note(durable, [sequence for _, _, sequence, _ in asked.acks])
        book.asked = None
        book.patience = PROBE_TIMEOUT_SECONDS
        book.note_proven(asked)
