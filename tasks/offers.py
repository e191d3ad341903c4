"""Offers what there is of an order that stock does not cover, where that is wanted (`SHORT_STOCK`).

::

    created → reserve → offered                    (what there is, is held: its customer decides)
    offer accepted → accept → reserved             (from here on an order as any other)
    offer expired, cancel requested → cancel → cancelled

The record decides once, by compare-and-set: an acceptance moves it from `offered` to `held`, a cancel or the end of the
offer from `offered` to `cancelling`. What is offered is held from before its customer learns of it until then, so an
acceptance can be kept.

An acceptance is decided in the record and published then. The note of `tasks.refunds` stands from before, so the event
of an acceptance whose process died is published later. The end of an offer is decided first and requested then; if a
crash comes between the two, the next look at the offers that have expired requests it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from orders.v1.events_pb2 import OrderOfferAccepted

from .announcements import event_of
from .claims import Claim
from .events import UnusableEvent, order_id_of
from .ledger import Record
from .model import Refusal
from .shipping import Shipping
from .stock import Found

#: Why an order is cancelled whose offer was not accepted.
EXPIRED: Final = "what there is of it was offered, and not accepted in time"


class NotOffered(Refusal):
    """Nothing is offered of the order, or not any more; the message says so."""


class Offers(Shipping):
    """What becomes of offers; see `tasks.saga.Saga`."""

    def accept_offer(self, order_id: str, by: str) -> int:
        """Record that an offer is accepted, and publish it; returns the event's place in the stream.

        Repeated, it changes nothing.

        Parameters:
          by: `customer` or `operator`.

        Raises:
          NotOffered: When nothing is offered of the order, or it was cancelled or too late.
        """
        found = self._stock.find_newer(order_id, _is_offered)
        noted = None
        while found is not None and found.record.state == "offered":
            if found.record.expires_at <= self._now():
                raise NotOffered(f"What was offered of order {order_id} is not held for it any more.")
            noted = self._stock.notes.unsettle(order_id, self._now(), self._now())
            found = self._stock.forward(order_id, found, found.record.accepted(by, self._now()))
        if found is None or not _is_offered(found):
            raise NotOffered(f"Nothing is offered of order {order_id}.")
        if "accepted" not in found.record.at:
            raise NotOffered(f"Order {order_id} is {found.record.state} already.")
        place = self._publish(event_of(order_id, found.record, "accepted"), found.record.at["accepted"])
        self._stock.notes.settled(order_id, noted)
        return place

    def accept(self, event: OrderOfferAccepted) -> str:
        """Have an order go on whose offer was accepted; returns the state in which that leaves it."""
        order_id = order_id_of(event)
        found = self._stock.find_newer(
            order_id, lambda now: now is not None and ("accepted" in now.record.at or not _is_offered(now))
        )
        if found is None or "accepted" not in found.record.at:
            raise UnusableEvent(
                f"the offer of order {order_id} was accepted, says the event, but the ledger knows of no acceptance."
            )
        if found.record.state == "held":
            self._announce(order_id, found)
        return found.record.state

    def expire_offer(self, order_id: str) -> bool:
        """End an order whose offer was not accepted in time; False when there is nothing to end, or not yet."""
        found = self._stock.find(order_id)
        while (
            found is not None and found.record.state == "offered" and found.record.expires_at <= self._now()
        ):
            ended = found.record.forward("cancelling", self._now(), reason=EXPIRED)
            found = self._stock.forward(order_id, found, ended)
        if found is None or not _is_offered(found) or found.record.state != "cancelling":
            return False
        self.request_cancel(order_id, "deadline", EXPIRED)
        return True

    def _carry_on(self, order_id: str, found: Found) -> Found:
        """Do what is left to do of an acceptance as well."""
        if "accepted" in found.record.at:
            self._announce(order_id, found, "accepted")
        return super()._carry_on(order_id, found)


def offer_of(wanted: Record, claim: Claim, offered_for: int) -> Callable[[Mapping[str, int]], Record]:
    """Return what makes the first record of an order of which only some pieces are there.

    Parameters:
      wanted: The record that would hold the whole.
      offered_for: For how many milliseconds its customer may accept.
    """
    return lambda pieces: wanted.offered(pieces, claim.names, wanted.at["held"] + offered_for)


def _is_offered(found: Found | None) -> bool:
    return found is not None and "offered" in found.record.at
