"""What an operator does with orders that do not move on; `python -m tasks.operate` is the command.

An order stands in the ledger and in the read model, not in its dead letter: one whose letter was dropped or has
expired is found here all the same, and goes on or ends as any other. Every action may be repeated, and killed at any
moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from google.protobuf.message import Message

from dramatiq_jetstream.dead_letters import DeadLetter, DeadLetters

from .announcements import event_of
from .failures import failure_of
from .ledger import NewerRecord, Record
from .model import Order
from .orders import Orders
from .ports import Bucket
from .saga import Saga
from .stock import Stock
from .stream import EventStream

#: The states of the ledger that an order does not rest in.
_UNDER_WAY: Final = frozenset({"held", "paid", "declined", "cancelling", "returning"})


@dataclass
class Stuck:
    """An order that has not moved: its status, since when (milliseconds), and the dead letters that it waits for."""

    order_id: str
    status: str
    since: int
    letters: list[DeadLetter] = field(default_factory=list)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since / 1000, UTC).isoformat(timespec="seconds")
        reasons = "; ".join(f"{one.actor}: {one.reason}: {one.error[:120]}" for one in self.letters)
        return f"{self.order_id}  {self.status}  since {since}  {reasons or 'no dead letter'}"


class Operator:
    """What an operator does with orders.

    Parameters:
      publish: Stores an event once more, whatever is stored already.
      steps: The step of each actor, by which an order's dead letters are known.
    """

    def __init__(
        self,
        stock: Stock,
        stock_bucket: Bucket,
        orders: Orders,
        orders_bucket: Bucket,
        stream: EventStream,
        saga: Saga,
        dead_letters: DeadLetters,
        publish: Callable[[Message], None],
        steps: Mapping[str, str],
    ) -> None:
        self._stock = stock
        self._stock_bucket = stock_bucket
        self._orders = orders
        self._orders_bucket = orders_bucket
        self._stream = stream
        self._saga = saga
        self._dead_letters = dead_letters
        self._publish = publish
        self._steps = steps

    def stuck(self, before: int) -> list[Stuck]:
        """Return the orders that have not moved since a time in milliseconds, longest first."""
        found: dict[str, Stuck] = {}
        for entry in self._orders_bucket.items():
            order = self._orders.read(entry)
            if order is None or order.is_final or order.status == "offered":
                continue  # one that is offered waits for its customer
            if _moved_at(order) < before:
                found[entry.key] = Stuck(entry.key, order.status, _moved_at(order))
        for entry in self._stock_bucket.items("order."):
            order_id = entry.key.removeprefix("order.")
            try:
                record = Record.decode(entry.value)
            except NewerRecord:
                continue  # what it means, a command of that version knows
            since = max(record.at.values())
            if record.state in _UNDER_WAY and since < before:
                found.setdefault(order_id, Stuck(order_id, record.state, since))
        for order_id, letters in self._letters().items():
            if order_id in found:
                found[order_id].letters = letters
        return sorted(found.values(), key=lambda one: one.since)

    def redrive(self, orders: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Have the steps that orders wait for done again; yields what was done about each."""
        letters = self._letters()
        for order_id in orders:
            try:
                yield order_id, self._redrive(order_id, letters.get(order_id, []))
            except NewerRecord as error:
                yield order_id, f"left alone: {error}"

    def _redrive(self, order_id: str, letters: list[DeadLetter]) -> str:
        replayed = sum(map(self._dead_letters.replay, letters))
        if replayed:
            return f"{replayed} dead letters replayed"
        found = self._stock.find(order_id)
        if found is not None and found.record.state == "cancelling":
            self._saga.cancel(order_id, found.record.reason)
            return "cancelled"
        event = self._created(order_id) if found is None else _called_by(order_id, found.record)
        if event is None:
            return "there is no such order"
        self._publish(event)
        return f"{event.DESCRIPTOR.name} published again"

    def cancel(self, order_id: str, reason: str) -> str:
        """End an order; returns what was done.

        Raises:
          NotCancellable: When there is no such order, or it is over.
        """
        found = self._saga.cancel(order_id, reason)
        return f"{found.record.state}; {self.drop_letters(order_id)} dead letters dropped"

    def drop_letters(self, order_id: str) -> int:
        """Drop the dead letters of an order that is over, except those of refunds; returns how many there were."""
        if not self._stock.notes.failures(order_id).keys() - {"refund"}:
            return 0
        found = self._stock.find(order_id)
        if found is None or found.record.state not in ("cancelled", "released"):
            return 0
        letters = self._letters().get(order_id, [])
        dropped = [one for one in letters if self._steps.get(one.actor or "") != "refund"]
        return sum(map(self._dead_letters.drop, dropped))

    def refund(self, order_id: str, key: str, amount: int | None, reason: str) -> str:
        """Request a refund of an order; returns what was done.

        Raises:
          NotRefundable: When the order was not charged, or less is left of the charge.
        """
        self._saga.request_refund(order_id, key, amount, reason)
        return "refund requested"

    def accept(self, order_id: str) -> str:
        """Accept for its customer what there is of an order; returns what was done.

        Raises:
          NotOffered: When nothing is offered of the order, or not any more.
        """
        self._saga.accept_offer(order_id, "operator")
        return "accepted"

    def ship(self, order_id: str, carrier: str, tracking: str) -> str:
        """Record that an order was shipped; returns what was done.

        Raises:
          NotShippable: When the order is not confirmed.
        """
        self._saga.request_shipment(order_id, carrier, tracking)
        return "shipped"

    def take_back(self, order_id: str, stock: str, reason: str) -> str:
        """Request the return of an order; returns what was done.

        Raises:
          NotReturnable: When the order was not shipped, or its return was decided otherwise.
        """
        self._saga.request_return(order_id, stock, reason)
        return "return requested"

    def _created(self, order_id: str) -> Message | None:
        order = self._orders.get(order_id)
        happened = self._stream.happened_at(order.place) if order is not None and order.place else None
        return None if happened is None else happened.event

    def _letters(self) -> dict[str, list[DeadLetter]]:
        """Return the dead letters of steps, by order."""
        found: dict[str, list[DeadLetter]] = {}
        for letter in self._dead_letters.list():
            failure = failure_of(letter, self._steps)
            if failure is not None:
                found.setdefault(failure.order_id, []).append(letter)
        return found


def _called_by(order_id: str, record: Record) -> Message:
    """Return the event that calls the step which publishes what is missing of an order.

    A payment records `paid` and `confirmed` at once and publishes both, so it is the one to do that again.
    """
    return event_of(order_id, record, "held" if record.state == "confirmed" else record.state)


def _moved_at(order: Order) -> int:
    return int(max(entry.at for entry in order.history).timestamp() * 1000) if order.history else 0
