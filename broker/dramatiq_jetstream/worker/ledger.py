"""What this process holds: deliveries that are on their way through Dramatiq.

A `Delivery` is *held* from its arrival until it is settled. While it is held, an in-progress signal every
third of its `ack_wait` keeps the server from giving it to somebody else, however long its actor runs.

A message that arrives a second time while it is held is not handed over again, only its new ack subject is noted; one
that arrives again after its work was done is acked again without being run (see `settlements`). A message is known by
its place in the stream and the time it was stored: a stream that is deleted and made again counts from one.

If the process dies, everything held is delivered again once its `ack_wait` is over. All state here belongs to the loop
thread, except for `settle`, which any thread calls.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from dramatiq_jetstream.wire.connection import Connection

from .delivery import Delivery
from .settlements import ACK, WPI, Key, Settlements

__all__ = ["Ledger"]


class HeldBoard(Protocol):
    """Where a process notes what it holds, for the supervisor that outlives it; on the loop thread."""

    def hold(self, ack_subject: str) -> int | None:
        """Note a delivery; returns its slot, None when there is none."""

    def move(self, slot: int, ack_subject: str) -> None:
        """Note the ack subject under which a delivery came again."""

    def release(self, slot: int) -> None:
        """Forget a delivery that was settled."""


class Ledger:
    """The deliveries of one process, over all its consumers and reconnects."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: dict[Key, Delivery] = {}
        self.redeliveries = 0
        self.board: HeldBoard | None = None
        connection.on_tick(self._signal)
        # Before ours hears of a reconnect: what is done must be known before anything is asked for.
        self.settlements = Settlements(connection)
        connection.on_reconnect(self._reconnected)
        connection.on_fork(self._held.clear)

    @property
    def held(self) -> int:
        return len(self._held)

    def receive(self, delivery: Delivery) -> bool:
        """Note a delivery; False when it is one that we hold or have settled, and must not run again."""
        held = self._held.get(delivery.key)
        if held is not None:
            held.ack_subject = delivery.ack_subject
            self._note_moved(held)
            self._connection.write(held.ack_subject, WPI)
            return False
        if self.settlements.has_acked(delivery.source.name, delivery.key):
            self._answer(delivery, ACK)
            return False
        self.settlements.drop(delivery.source.name, delivery.key)
        self._held[delivery.key] = delivery
        if self.board is not None:
            delivery.slot = self.board.hold(delivery.ack_subject)
        return True

    def _note_moved(self, held: Delivery) -> None:
        """Note the new ack subject of a delivery that came again."""
        if self.board is not None and held.slot is not None:
            self.board.move(held.slot, held.ack_subject)

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
        self._answer(delivery, answer)
        self._release(delivery, done=answer == ACK)

    def _answer(self, delivery: Delivery, answer: bytes) -> None:
        self.settlements.answer(delivery.source.name, delivery.key, delivery.ack_subject, answer)

    def abandon(self, delivery: Delivery) -> None:
        """Stop holding a delivery without an answer: it is delivered again when its `ack_wait` is over."""
        if not delivery.settled:
            delivery.settled = True
            self._connection.post(self._abandon, delivery)

    def _abandon(self, delivery: Delivery) -> None:
        self._held.pop(delivery.key, None)
        self._release(delivery, done=False)

    def _release(self, delivery: Delivery, *, done: bool) -> None:
        if self.board is not None and delivery.slot is not None:
            self.board.release(delivery.slot)
            delivery.slot = None
        delivery.owner.released(done=done)
        if delivery.on_settled is not None:
            delivery.on_settled()

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

    def _signal(self) -> None:
        """Send the in-progress signals that are due."""
        now = time.monotonic()
        for delivery in self._held.values():
            if now - delivery.touched >= delivery.ack_wait / 3000:
                delivery.touched = now
                self._connection.write(delivery.ack_subject, WPI)

    def _reconnected(self) -> None:
        now = time.monotonic()
        for delivery in self._held.values():
            delivery.touched = now
            self._connection.write(delivery.ack_subject, WPI)
