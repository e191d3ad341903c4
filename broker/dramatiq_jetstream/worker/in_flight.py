"""The deliveries that this process holds, on their way through Dramatiq.

A `Delivery` is *held* from its arrival until it is settled. While it is held, an in-progress signal every
third of its `ack_wait` keeps the server from giving it to another worker, however long its actor runs.

When a message arrives a second time while it is held, only its new ack subject is noted. When it arrives again after it
was done, it is acked again without being run (see `settlements`). A message is known by its place in the stream and the
time it was stored: a stream that is deleted and made again counts from one.

If the process dies, everything held is delivered again once its `ack_wait` is over. All state here belongs to the loop
thread, except for `settle`, which any thread calls.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from dramatiq_jetstream.wire.connection import Connection

from .delivery import Delivery
from .durables import LOOK_AFTER_SECONDS, Durable, Durables
from .removals import Removals
from .settlements import ACK, NAK, WPI, Key, Settlements

__all__ = ["InFlight"]

#: Seconds until a socket that took no more is checked again.
WRITABLE_SECONDS = 0.1


class HeldBoard(Protocol):
    """Where a process notes what it holds, for the supervisor that outlives it; on the loop thread."""

    def hold(self, ack_subject: str) -> int | None:
        """Note a delivery; returns its slot, None when there is none."""

    def move(self, slot: int, ack_subject: str) -> None:
        """Note the ack subject under which a delivery came again."""

    def answer(self, slot: int) -> None:
        """Note that a delivery was settled."""

    def release(self, slot: int) -> None:
        """Forget a delivery."""


class InFlight:
    """The deliveries of one process, over all its consumers and reconnects."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: dict[Key, Delivery] = {}
        self.redeliveries = 0
        self.board: HeldBoard | None = None
        self._answered: list[int] = []
        self.durables = Durables(connection, self._newest)
        self.removals = Removals(connection, self.durables)
        self.settlements = Settlements(connection, self.durables.doubt, self.removals)
        connection.on_tick(self._signal)
        # Before the pullers hear of it: what is done must be known before anything is asked for.
        self.durables.on_certain(self._resume)
        self.durables.on_missing(self._end_life)
        connection.on_fork(self._held.clear)

    @property
    def held(self) -> int:
        return len(self._held)

    def receive(self, delivery: Delivery) -> bool:
        """Note a delivery; False when it is one that we hold or have settled, and must not run again."""
        held = self._held.get(delivery.key)
        if held is not None:
            held.ack_subject, held.life = delivery.ack_subject, delivery.life
            self._note_on_board(held)
            self._keep(held)
            return False
        durable = delivery.source.durable
        if durable in self.removals.awaiting and delivery.deliveries == 1:
            self.removals.note_first(durable)
        if self.settlements.has_acked(durable, delivery.key):
            self._send(delivery, ACK)
            return False
        self.settlements.drop(durable, delivery.key)
        self._held[delivery.key] = delivery
        self._note_on_board(delivery)
        return True

    def _note_on_board(self, delivery: Delivery) -> None:
        """Note how the supervisor can requeue a delivery if this process dies."""
        if self.board is None:
            return
        if delivery.slot is None:
            delivery.slot = self.board.hold(delivery.ack_subject)
        else:
            self.board.move(delivery.slot, delivery.ack_subject)

    def _note_answered(self, delivery: Delivery) -> None:
        if self.board is not None and delivery.slot is not None:
            self.board.answer(delivery.slot)
            if not self._answered:
                self._connection.soon(self._clear_board)
            self._answered.append(delivery.slot)
            delivery.slot = None

    def _clear_board(self) -> None:
        """Take off the board what was answered in an earlier turn of the loop: the socket has taken the answers."""
        if self._connection.is_writable:
            self._forget_answered()
        else:
            self._connection.soon(self._clear_board, WRITABLE_SECONDS)

    def _forget_answered(self) -> None:
        if self.board is not None:
            for slot in self._answered:
                self.board.release(slot)
        self._answered.clear()

    def _take_off_board(self, delivery: Delivery) -> None:
        if self.board is not None and delivery.slot is not None:
            self.board.release(delivery.slot)
            delivery.slot = None

    def settle(self, delivery: Delivery, settlement: bytes) -> None:
        """Send the settlement of a delivery to the server, once; any thread may call it and does not wait."""
        if not delivery.settled:
            connection = self._connection
            # With a lookahead it hardly matters when the server hears of it: other messages are here already.
            post = connection.post_lazily if delivery.owner.lookahead else connection.post
            post(self._settle, delivery, settlement)
            delivery.settled = True  # last: if this thread is interrupted before, it may settle otherwise

    def _settle(self, delivery: Delivery, settlement: bytes | None) -> None:
        """Hold a delivery no longer, and send its settlement to the server if there is one."""
        if self._held.pop(delivery.key, None) is None:
            return  # the first settlement counts
        if settlement is not None:
            self._send(delivery, settlement)
        if delivery.slot is not None:
            self._note_answered(delivery)
        delivery.owner.released(delivery, done=settlement == ACK)

    def _send(self, delivery: Delivery, settlement: bytes) -> None:
        durable = delivery.source.durable
        if delivery.life is durable.life:
            self.settlements.send(durable, delivery.key, delivery.ack_subject, settlement)
        elif settlement == ACK:
            self.settlements.note_done(durable, delivery.key)

    def requeue_all(self) -> None:
        """Requeue everything that is held, for other workers to take at once."""
        self._connection.post(self._requeue_all)

    def _requeue_all(self) -> None:
        for delivery in list(self._held.values()):
            delivery.settled = True
            self._settle(delivery, NAK)

    def abandon(self, delivery: Delivery) -> None:
        """Stop holding a delivery without settling it: it is delivered again when its `ack_wait` is over."""
        if not delivery.settled:
            delivery.settled = True
            self._connection.post(self._settle, delivery, None)

    def flush(self, seconds: float) -> None:
        """Wait up to `seconds` until the server has everything posted so far, if it can be reached."""
        deadline = time.monotonic() + seconds
        arrived = threading.Event()
        while self.settlements.waits and self._connection.is_connected and time.monotonic() < deadline:
            arrived.wait(0.01)
        wanted: list[int] = []

        def note(fence: int) -> None:
            if wanted and fence >= wanted[0]:
                arrived.set()

        self._connection.on_fence(note)
        self._connection.post(lambda: wanted.append(self._connection.next_fence))
        while self._connection.is_connected and time.monotonic() < deadline:
            self._connection.hurry_fence()
            if arrived.wait(0.01):
                break
        self._connection.remove_callback(note)

    def _signal(self) -> None:
        """Send the in-progress signals that are due, and look at the durables whose messages take long."""
        now = time.monotonic()
        for delivery in self._held.values():
            waited = now - delivery.touched
            durable = delivery.source.durable
            if waited >= durable.ack_wait / 3000:
                self._keep(delivery)
            if waited >= LOOK_AFTER_SECONDS:
                self.durables.look(durable)

    def _keep(self, delivery: Delivery) -> None:
        """Restart the server's `ack_wait` for a delivery."""
        durable = delivery.source.durable
        if durable.certain and delivery.life is durable.life:
            delivery.touched = time.monotonic()
            self._connection.respond(delivery.ack_subject, WPI)

    def _newest(self, durable: Durable) -> tuple[int, int] | None:
        """The highest sequence and the latest time of storing among the unsettled messages."""
        held = (
            key
            for key, delivery in self._held.items()
            if delivery.source.durable is durable and delivery.life is durable.life
        )
        places = [
            (sequence, stored) for _, _, sequence, stored in (*held, *self.settlements.unproven_of(durable))
        ]
        if not places:
            return None
        return max(sequence for sequence, _ in places), max(stored for _, stored in places)

    def _resume(self, durable: Durable, same: bool) -> None:
        self.settlements.resume(durable, same=same)
        if not same:
            self._end_life(durable)
            return
        for delivery in self._held.values():
            if delivery.source.durable is durable:
                self._keep(delivery)

    def _end_life(self, durable: Durable) -> None:
        """Take deliveries of an ended life off the board: the supervisor would requeue them in another life."""
        self._forget_answered()
        for delivery in self._held.values():
            if delivery.source.durable is durable and delivery.life is not durable.life:
                self._take_off_board(delivery)
