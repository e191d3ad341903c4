"""The answers that this process gave to deliveries: kept until there is proof of them, and remembered for a while.

An ack is a plain publish, so it can be lost with the connection, and it waits in the server's memory until the server
has worked it off: one that syncs each of them to disk (`sync_interval: always`) gets some thousands a second done,
and a fleet sends more. So every answer is kept until there is proof. Once a second each consumer is asked: an
in-progress signal for a message that is done, which changes nothing, is answered when the server has come to it, and
that is after everything sent before. (For one that was given back it would put off its next delivery; if such an answer
is lost, the message comes when its `ack_wait` is over.) What has no proof is sent again after a reconnect, and when
there is too much of it nothing more is asked for (see `pulling`).

A server that crashes forgets the last acks it worked off, and even that it delivered those messages; so does a
cluster whose leader dies. So what was acked is remembered for some seconds longer than its proof, and after a
reconnect or a change of leader, when that may have happened, for two minutes.

There are thousands of answers at a time. They are kept as text in dictionaries, and proven as a whole, because Python's
garbage collector looks again and again at each tuple that has anything else in it.

If the process dies, all this is forgotten: work whose ack had not arrived is repeated. It belongs to the loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dramatiq_jetstream.wire.connection import Connection

__all__ = ["ACK", "NAK", "WPI", "Key", "Settlements", "nak_after"]

ACK = b"+ACK"
NAK = b"-NAK"
WPI = b"+WPI"

#: Seconds for which a proven ack is remembered, as long as there are not more than so many of them: longer than
#: it takes to notice that a leader is gone.
REMEMBER = 8.0
REMEMBER_MOST = 20_000

#: Seconds for which it is remembered when a reconnect or a change of leader came after it.
REMEMBER_OVER_RECONNECT = 120.0

#: How often, in seconds, the server is asked how far it has come with the acks, and how long an answer is awaited
#: before a consumer is taken to be gone, with nobody left to hear an ack.
PROBE_INTERVAL = 1.0
PROBE_TIMEOUT = 120.0

#: With so many answers that are not proven, or after so many seconds without one to a question, a consumer is asked
#: for no further messages.
MAX_UNPROVEN = 50_000
MAX_LAG = 20.0

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
class _Unproven:
    """The answers to one consumer's deliveries of which there is no proof yet.

    Attributes:
      sent: Those that no question has followed.
      asked: Those before the question that awaits its answer, since the time `since`; None when there is no question.
    """

    sent: _Round = field(default_factory=_Round)
    asked: _Round | None = None
    since: float = 0.0

    def __len__(self) -> int:
        return len(self.sent) + (0 if self.asked is None else len(self.asked))

    def rounds(self) -> Iterator[_Round]:
        if self.asked is not None:
            yield self.asked
        yield self.sent

    def has_acked(self, key: Key) -> bool:
        return any(key in each.acks for each in self.rounds())

    def drop(self, key: Key) -> None:
        for each in self.rounds():
            each.others.pop(key, None)


class Settlements:
    """The answers of one process to all its consumers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unproven: dict[str, _Unproven] = {}
        self._probed = 0.0
        # Two generations: when the newer is old enough, the older one is dropped as a whole.
        self._done: set[Key] = set()
        self._done_before: set[Key] = set()
        self._turned = 0.0
        self._done_over_reconnect: dict[Key, float] = {}
        connection.on_tick(self._probe)
        connection.on_reconnect(self._reconnected)
        connection.on_fork(self._forget)

    @property
    def unproven(self) -> int:
        return sum(map(len, list(self._unproven.values())))

    def answer(self, consumer: str, key: Key, ack_subject: str, answer: bytes) -> None:
        """Give the server its answer to a delivery."""
        unproven = self._unproven.get(consumer)
        if unproven is None:
            unproven = self._unproven[consumer] = _Unproven()
        if answer == ACK:
            unproven.sent.acks[key] = ack_subject
        else:
            unproven.sent.others[key] = ack_subject, answer
        self._connection.write(ack_subject, answer)

    def has_acked(self, consumer: str, key: Key) -> bool:
        """Whether what is delivered again was acked, so that it must not run again."""
        unproven = self._unproven.get(consumer)
        return (
            (unproven is not None and unproven.has_acked(key))
            or key in self._done
            or key in self._done_before
            or key in self._done_over_reconnect
        )

    def drop(self, consumer: str, key: Key) -> None:
        """Forget that a delivery was given back: it came again, and the answer would give away what we hold now."""
        unproven = self._unproven.get(consumer)
        if unproven is not None:
            unproven.drop(key)

    def is_behind(self, consumer: str) -> bool:
        """Whether the server has too much left to work off to be sent more."""
        if self.unproven > MAX_UNPROVEN:
            return True
        unproven = self._unproven.get(consumer)
        return (
            unproven is not None
            and unproven.asked is not None
            and time.monotonic() - unproven.since > MAX_LAG
        )

    def remember(self) -> None:
        """Keep in mind for long what was acked lately: the server may have forgotten it."""
        now = time.monotonic()
        acked = (key for each in self._unproven.values() for round_ in each.rounds() for key in round_.acks)
        for key in (*self._done_before, *self._done, *acked):
            self._done_over_reconnect.pop(key, None)
            self._done_over_reconnect[key] = now

    def _probe(self) -> None:
        """Ask each consumer whose deliveries were answered since the last time how far it has come."""
        now = time.monotonic()
        if now - self._probed < PROBE_INTERVAL or not self._connection.is_open:
            return
        self._probed = now
        for unproven in self._unproven.values():
            if unproven.asked is not None or len(unproven.sent) == 0:
                continue
            unproven.asked, unproven.sent, unproven.since = unproven.sent, _Round(), now
            prove = self._prover(unproven, unproven.asked)
            if unproven.asked.acks:
                self._connection.query(
                    next(reversed(unproven.asked.acks.values())), WPI, prove, PROBE_TIMEOUT
                )
            else:
                prove()

    def _prover(self, unproven: _Unproven, asked: _Round) -> Callable[[], None]:
        def prove() -> None:
            if unproven.asked is not asked:
                return  # asked before a reconnect, after which everything was sent again
            # Without an answer in all that time there is nobody whom it could reach.
            unproven.asked = None
            self._remember_proven(asked)

        return prove

    def _remember_proven(self, proven: _Round) -> None:
        self._done.update(proven.acks)
        now = time.monotonic()
        if now - self._turned >= REMEMBER or len(self._done) >= REMEMBER_MOST:
            self._turned = now
            self._done_before, self._done = self._done, set()
            for key, since in list(self._done_over_reconnect.items()):
                if now - since < REMEMBER_OVER_RECONNECT:
                    break  # they are in the order of time
                del self._done_over_reconnect[key]

    def _reconnected(self) -> None:
        for unproven in self._unproven.values():
            again = _Round()
            for each in unproven.rounds():
                again.acks.update(each.acks)
                again.others.update(each.others)
            unproven.sent, unproven.asked = again, None
            for ack_subject in again.acks.values():
                self._connection.write(ack_subject, ACK)
            for ack_subject, answer in again.others.values():
                self._connection.write(ack_subject, answer)
        self.remember()

    def _forget(self) -> None:
        """In the child of a fork: what the parent settles is the parent's."""
        self._unproven.clear()
        for remembered in (self._done, self._done_before, self._done_over_reconnect):
            remembered.clear()
