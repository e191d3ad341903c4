"""What this process holds and what it owes the server: in-progress signals, acks, and acks sent again.

A `Delivery` is *held* from its arrival until it is settled. While it is held, an in-progress signal every
third of its `ack_wait` keeps the server from giving it to somebody else, however long its actor runs.

An ack is a plain publish, so it can be lost with the connection, and it waits in the server's memory until the server
has worked it off: one that syncs each of them to disk (`sync_interval: always`) gets some thousands a second done,
and a fleet sends more. So the ledger keeps every settlement until there is proof. Once a second it asks of each
consumer: an in-progress signal for the last message that is done, which changes nothing, is answered when the server
has come to it, and that is after everything sent before. (For one that was given back it would put off its next
delivery; if such a settlement is lost, the message comes when its `ack_wait` is over.) What has no proof is sent again
after a reconnect, and when there is too much of it nothing more is asked for (see `pulling`).

A message that arrives a second time while it is held is not handed over again, only its new ack subject is noted; one
that arrives again after its work was done is acked again without being run. A message is known by its place in the
stream and the time it was stored: a stream that is deleted and made again counts from one.

A server that crashes forgets the last acks it worked off, and even that it delivered those messages; so does a
cluster whose leader dies. So what was settled is remembered for some seconds longer than its proof, and after a
reconnect or a change of leader, when that may have happened, for two minutes.

If the process dies, everything held is delivered again once its `ack_wait` is over; work whose ack had not
arrived is repeated. All state here belongs to the loop thread, except for `settle`, which any thread calls.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .connection import Connection, Msg

if TYPE_CHECKING:
    from .pulling import Puller, Source

__all__ = ["ACK", "NAK", "TERM", "WPI", "Delivery", "Ledger", "nak_after"]

ACK = b"+ACK"
NAK = b"-NAK"
TERM = b"+TERM"
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

#: With so many settlements that are not proven, or after so many seconds without an answer, a consumer is asked for no
#: further messages.
MAX_UNPROVEN = 50_000
MAX_LAG = 20.0

#: Stream, consumer, sequence, and the time of storing.
Key = tuple[str, str, int, int]


def nak_after(delay: int) -> bytes:
    """A settlement that asks for another delivery after `delay` milliseconds."""
    return b'-NAK {"delay": %d}' % (delay * 1_000_000)


class Delivery:
    """One delivered message and its place in the stream; what it says comes from its ack subject (ADR-15)."""

    __slots__ = (
        "_message",
        "ack_subject",
        "ack_wait",
        "data",
        "deliveries",
        "key",
        "on_settled",
        "owner",
        "pending",
        "sequence",
        "settled",
        "source",
        "stream",
        "subject",
        "timestamp",
        "touched",
    )

    def __init__(self, message: Msg, source: Source, owner: Puller) -> None:
        self.subject = message.subject
        self.data = message.data
        self._message = message
        self.ack_subject = message.reply
        self.source = source
        self.owner = owner
        self.on_settled: Callable[[], None] | None = None
        self.ack_wait = source.ack_wait
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<..>.<timestamp>.<pending>, and with a domain
        # and an account hash: $JS.ACK.<domain>.<hash>.<stream>. … .<pending>.<random>
        tokens = message.reply.split(".")
        start = 2 if len(tokens) == 9 else 4
        self.stream = source.stream
        self.deliveries = int(tokens[start + 2])
        self.sequence = int(tokens[start + 3])
        stored = int(tokens[start + 5])
        self.timestamp = stored // 1_000_000
        self.pending = int(tokens[start + 6])
        self.key: Key = (source.stream, source.durable, self.sequence, stored)
        self.settled = False
        self.touched = time.monotonic()

    def __str__(self) -> str:
        return f"Message {self.sequence} of {self.stream}"

    @property
    def headers(self) -> Mapping[str, str]:
        return self._message.headers

    def mentions(self, header: str) -> bool:
        """Whether the headers may have this one; much cheaper than to look."""
        return self._message.mentions(header)

    @property
    def origin(self) -> str:
        """One token that identifies the message wherever it is delivered."""
        _, consumer, sequence, stored = self.key
        return f"{self.stream}-{consumer}-{sequence}-{stored:x}"


class Ledger:
    """The deliveries of one process, over all its consumers and reconnects."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: dict[Key, Delivery] = {}
        # In the order of sending: the round of questions that will prove it, whose it is, where it went, and what.
        self._unproven: OrderedDict[Key, tuple[int, Source, str, bytes]] = OrderedDict()
        self._round = 0
        self._proven: dict[Source, int] = {}  # the last round that was answered
        self._asked: dict[
            Source, tuple[int, float]
        ] = {}  # the round for which an answer is awaited, and since when
        self._latest: dict[
            Source, str
        ] = {}  # where the last settlement went that no question has followed yet
        self._probed = 0.0
        # Two generations: when the newer is old enough, the older one is dropped as a whole.
        self._done: set[Key] = set()
        self._done_before: set[Key] = set()
        self._turned = 0.0
        self._done_over_reconnect: dict[Key, float] = {}
        self.redeliveries = 0
        connection.on_tick(self._signal)
        connection.on_tick(self._probe)
        connection.on_reconnect(self._reconnected)
        connection.on_fork(self._forget)

    @property
    def held(self) -> int:
        return len(self._held)

    def receive(self, delivery: Delivery) -> bool:
        """Note a delivery; False when it is one that we hold or have settled, and must not run again."""
        held = self._held.get(delivery.key)
        if held is not None:
            held.ack_subject = delivery.ack_subject
            self._connection.write(held.ack_subject, WPI)
            return False
        settled = self._unproven.get(delivery.key)
        if settled is not None:
            if settled[-1] == ACK:
                self._resolve(delivery, ACK)
                return False
            # It was given back and came again; sent once more, that answer would give away what we hold now.
            del self._unproven[delivery.key]
        elif (
            delivery.key in self._done
            or delivery.key in self._done_before
            or delivery.key in self._done_over_reconnect
        ):
            self._resolve(delivery, ACK)
            return False
        self._held[delivery.key] = delivery
        return True

    def settle(self, delivery: Delivery, answer: bytes) -> None:
        """Give the server its answer to a delivery, once; any thread may call it and does not wait."""
        if not delivery.settled:
            delivery.settled = True
            connection = self._connection
            # With a lookahead it hardly matters when the server hears of it: other messages are here already.
            post = connection.post_lazily if delivery.owner.lookahead else connection.post
            post(self._settle, delivery, answer)

    def _settle(self, delivery: Delivery, answer: bytes) -> None:
        self._held.pop(delivery.key, None)
        self._resolve(delivery, answer)
        self._release(delivery, done=answer == ACK)

    def _resolve(self, delivery: Delivery, answer: bytes) -> None:
        key, source, ack_subject = delivery.key, delivery.source, delivery.ack_subject
        self._unproven[key] = (self._round, source, ack_subject, answer)
        self._unproven.move_to_end(key)
        self._note_latest(source, ack_subject, answer)
        self._connection.write(ack_subject, answer)

    def _note_latest(self, source: Source, ack_subject: str, answer: bytes) -> None:
        if answer == ACK:
            self._latest[source] = ack_subject
        else:
            self._latest.setdefault(source, "")

    def abandon(self, delivery: Delivery) -> None:
        """Stop holding a delivery without an answer: it is delivered again when its `ack_wait` is over."""
        if not delivery.settled:
            delivery.settled = True
            self._connection.post(self._abandon, delivery)

    def _abandon(self, delivery: Delivery) -> None:
        self._held.pop(delivery.key, None)
        self._release(delivery, done=False)

    def _release(self, delivery: Delivery, *, done: bool) -> None:
        delivery.owner.released(done=done)
        if delivery.on_settled is not None:
            delivery.on_settled()

    @property
    def unproven(self) -> int:
        return len(self._unproven)

    def is_behind(self, source: Source) -> bool:
        """Whether the server has too much left to work off to be sent more."""
        if len(self._unproven) > MAX_UNPROVEN:
            return True
        asked = self._asked.get(source)
        return asked is not None and time.monotonic() - asked[1] > MAX_LAG

    def flush(self, seconds: float) -> None:
        """Wait until the server has all that was posted so far, if it can be reached, up to so long."""
        arrived = threading.Event()
        wanted: list[int] = []

        def note(fence: int) -> None:
            if wanted and fence >= wanted[0]:
                arrived.set()

        self._connection.on_fence(note)
        self._connection.post(lambda: wanted.append(self._connection.next_fence))
        deadline = time.monotonic() + seconds
        while self._connection.is_connected and time.monotonic() < deadline:
            self._connection.hurry_fence()
            if arrived.wait(0.01):
                break
        self._connection.forget(note)

    def _probe(self) -> None:
        """Ask each consumer whose messages were settled since the last time how far it has come."""
        now = time.monotonic()
        if now - self._probed < PROBE_INTERVAL or not self._latest or not self._connection.is_open:
            return
        self._probed = now
        waiting = {source: subject for source, subject in self._latest.items() if source in self._asked}
        for source, ack_subject in self._latest.items():
            if source in waiting:
                continue
            self._asked[source] = self._round, now
            prove = self._prover(source, self._round)
            if ack_subject:
                self._connection.query(ack_subject, WPI, prove, PROBE_TIMEOUT)
            else:
                prove()
        self._latest = waiting
        self._round += 1

    def _prover(self, source: Source, asked: int) -> Callable[[], None]:
        def prove() -> None:
            if self._asked.get(source, (None, 0))[0] != asked:
                return  # asked before a reconnect, after which everything was sent again
            del self._asked[source]
            # Without an answer in all that time there is nobody whom a settlement could reach.
            self._proven[source] = asked
            self._forget_proven()

        return prove

    def _forget_proven(self) -> None:
        unproven = self._unproven
        while unproven:
            key, (sent, source, _, answer) = next(iter(unproven.items()))
            if sent > self._proven.get(source, -1):
                break
            del unproven[key]
            if answer == ACK:
                self._done.add(key)
        now = time.monotonic()
        if now - self._turned >= REMEMBER or len(self._done) >= REMEMBER_MOST:
            self._turned = now
            self._done_before, self._done = self._done, set()
            for key, since in list(self._done_over_reconnect.items()):
                if now - since < REMEMBER_OVER_RECONNECT:
                    break  # they are in the order of time
                del self._done_over_reconnect[key]

    def _forget(self) -> None:
        """In the child of a fork: what the parent holds is the parent's to settle."""
        for kept in (self._held, self._unproven, self._proven, self._asked, self._latest):
            kept.clear()
        for remembered in (self._done, self._done_before, self._done_over_reconnect):
            remembered.clear()

    def _signal(self) -> None:
        """Send the in-progress signals that are due."""
        now = time.monotonic()
        for delivery in self._held.values():
            if now - delivery.touched >= delivery.ack_wait / 3000:
                delivery.touched = now
                self._connection.write(delivery.ack_subject, WPI)

    def _reconnected(self) -> None:
        # In this order: what is done must be known before anything is asked for.
        self._asked.clear()
        for key, (_, source, ack_subject, answer) in list(self._unproven.items()):
            self._unproven[key] = (self._round, source, ack_subject, answer)
            self._note_latest(source, ack_subject, answer)
            self._connection.write(ack_subject, answer)
        self.remember()
        now = time.monotonic()
        for delivery in self._held.values():
            delivery.touched = now
            self._connection.write(delivery.ack_subject, WPI)

    def remember(self) -> None:
        """Keep in mind for long what was acked lately: the server may have forgotten it."""
        now = time.monotonic()
        acked = (key for key, (*_, answer) in self._unproven.items() if answer == ACK)
        for key in (*self._done_before, *self._done, *acked):
            self._done_over_reconnect.pop(key, None)
            self._done_over_reconnect[key] = now
