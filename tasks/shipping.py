"""Sends an order's goods, and takes them back.

::

    (an operator, or another service) → shipped → ship
    return requested → bring back → returned             (goods are in stock again, or written off; a charge is owed)

The record decides once whether an order is shipped or cancelled: both move it on from `confirmed`, by compare-and-set.

An operator's word moves the record and is published then. Another service publishes `ORDER.shipped`, as other programs
publish `ORDER.created`; the step that it calls moves the record, if that says `confirmed`, and publishes the event with
the time of the record, which is the one that counts. A service that ships what was cancelled meanwhile makes a dead
letter that says so.

A return is decided in the record with its refund and with what becomes of the goods, then published, then carried out.
The note of `tasks.refunds` stands from before, so what is lost by a crash between any two of these is done later.
"""

from __future__ import annotations

from orders.v1.events_pb2 import OrderReturnRequested, OrderShipped

from .announcements import event_of
from .compensation import Compensation
from .events import UnusableEvent, order_id_of
from .ledger import BACK, WRITTEN_OFF, Refund
from .model import MAX_ID_LENGTH, MAX_TEXT, Refusal
from .refunds import RETURN
from .stock import Found
from .text import shown


class NotShippable(Refusal):
    """The order cannot be shipped; the message says why."""


class NotReturnable(Refusal):
    """The order cannot be returned; the message says why."""


class Shipping(Compensation):
    """What sends an order's goods and takes them back; see `tasks.saga.Saga`."""

    def request_shipment(self, order_id: str, carrier: str = "", tracking: str = "") -> int:
        """Record that an order was shipped, and publish it; returns the event's place in the stream.

        Repeated, it changes nothing: the first carrier and number are kept.

        Raises:
          NotShippable: When the order is not confirmed.
        """
        found, noted = self._shipped(order_id, carrier, tracking, note=True)
        place = self._publish(event_of(order_id, found.record, "shipped"), found.record.at["shipped"])
        self._stock.notes.settled(order_id, noted)
        return place

    def ship(self, event: OrderShipped) -> str:
        """Record that an order was shipped, as the event of another service says; returns the state of the order."""
        order_id = order_id_of(event)
        try:
            found, _ = self._shipped(order_id, event.carrier, event.tracking)
        except NotShippable as refusal:
            raise UnusableEvent(str(refusal)) from None
        if event != event_of(order_id, found.record, "shipped"):
            self._announce(order_id, found, "shipped")
        return found.record.state

    def request_return(self, order_id: str, stock: str, reason: str = "") -> int:
        """Decide that an order comes back, and publish it; returns the event's place in the stream.

        Parameters:
          stock: What becomes of the goods: `BACK` in stock, or `WRITTEN_OFF`.

        Raises:
          NotReturnable: When the order was not shipped, or its return was decided otherwise.
        """
        if stock not in (BACK, WRITTEN_OFF):
            raise NotReturnable(f"What comes back is {BACK!r} in stock or {WRITTEN_OFF!r}, not {stock!r}.")
        reason = shown(reason, MAX_TEXT)
        found = self._stock.find_newer(order_id, _is_shipped)
        while True:
            if found is None or not _is_shipped(found):
                raise NotReturnable(f"Order {order_id} was not shipped, so nothing of it can come back.")
            record = found.record
            if record.state != "shipped":
                if record.stock != stock:
                    raise NotReturnable(f"Order {order_id} is {record.state} already, and {record.stock}.")
                break
            self._stock.notes.unsettle(order_id, self._now(), self._now())
            ended = record.forward("returning", self._now(), reason=reason, stock=stock)
            if record.refundable:
                ended = ended.owing(Refund(RETURN, record.refundable, self._now(), reason))
            found = self._stock.forward(order_id, found, ended)
        return self._publish(event_of(order_id, found.record, "returning"), found.record.at["returning"])

    def bring_back(self, event: OrderReturnRequested) -> str:
        """Take back the goods of an order whose return was decided; returns the state of the order."""
        order_id = order_id_of(event)
        found = self._stock.find_newer(
            order_id, lambda now: now is not None and now.record.state in ("returning", "returned")
        )
        if found is None or "returning" not in found.record.at:
            raise UnusableEvent(
                f"order {order_id} comes back, says the event, but the ledger knows of no return."
            )
        return self._brought_back(order_id, found).record.state

    def _carry_on(self, order_id: str, found: Found) -> Found:
        """Do what is left to do of a shipment or a return."""
        for state in ("shipped", "returning"):
            if state in found.record.at:
                self._announce(order_id, found, state)
        return self._brought_back(order_id, found) if "returning" in found.record.at else found

    def _shipped(
        self, order_id: str, carrier: str, tracking: str, *, note: bool = False
    ) -> tuple[Found, int | None]:
        """Move the record of a confirmed order on, unless that was done.

        Parameters:
          note: Whether to note before that its event has to be published.

        Returns:
          The record, and the revision of the note if there was none before.
        """
        found = self._stock.find_newer(
            order_id, lambda now: now is not None and (_is_shipped(now) or now.record.state == "confirmed")
        )
        noted = None
        while found is not None and found.record.state == "confirmed":
            if note:
                noted = self._stock.notes.unsettle(order_id, self._now(), self._now())
            carried = {"carrier": shown(carrier, MAX_ID_LENGTH), "tracking": shown(tracking, MAX_ID_LENGTH)}
            found = self._stock.forward(
                order_id, found, found.record.forward("shipped", self._now(), **carried)
            )
        if found is None or not _is_shipped(found):
            state = "unknown" if found is None else found.record.state
            raise NotShippable(f"Order {order_id} is {state}, and only what is confirmed is shipped.")
        return found, noted

    def _brought_back(self, order_id: str, found: Found) -> Found:
        found = self._stock.bring_back(order_id, found, self._now())
        if found.record.state == "returned":
            self._announce(order_id, found)
        return found


def _is_shipped(found: Found | None) -> bool:
    return found is not None and "shipped" in found.record.at
