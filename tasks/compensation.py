"""Takes an order back: who wants it cancelled, and what that gives back.

::

    cancel requested → cancel → cancelled            (stock is given back; a charge is owed, see `tasks.refunds`)

The record decides once. A payment moves it from `held` to `paid`, a cancel from wherever it is to `cancelling`, each
by compare-and-set. A cancel that comes first leaves nothing to pay; one that comes later decides the refund in the same
change. One that comes after the goods have left cancels nothing: it asks for a return (`tasks.shipping`).

A request is noted in the ledger before its event is published, so an event without that note is a stranger's. The note
of `tasks.refunds` stands from before that until the order has ended. So a request whose process died before it
published the event, or whose message someone purged, is carried out with the next look at what is not settled.
"""

from __future__ import annotations

from typing import Final

from orders.v1.events_pb2 import OrderCancelRequested

from .announcements import cancel_requested_event
from .events import UnusableEvent, order_id_of
from .ledger import Refund
from .model import MAX_TEXT, Refusal
from .notes import CancelRequest
from .refunds import CANCEL, Refunds
from .stock import Found, RecordBehind
from .text import shown

#: The states of the ledger in which an order can be cancelled, or is.
CANCELLABLE: Final = frozenset(
    {"offered", "held", "paid", "confirmed", "declined", "released", "cancelling", "cancelled"}
)

#: Those from which a cancel has something to do.
_NOT_ENDED: Final = CANCELLABLE - {"released", "cancelled"}


class NotCancellable(Refusal):
    """The order cannot be cancelled; the message says why."""


class Compensation(Refunds):
    """What takes an order back; see `tasks.saga.Saga`."""

    def request_cancel(self, order_id: str, by: str, reason: str = "", name: str = "") -> int:
        """Note that an order is to be cancelled and publish it; returns the event's place in the stream.

        Of an order that was shipped, a customer asks for its return like this.

        Parameters:
          by: `customer`, `operator` or `deadline`; who asked first is kept.
          name: What that person or program is called.

        Raises:
          NotCancellable: When there is no such order, or it is over, or an operator is to return it instead.
        """
        found = self._stock.find(order_id)
        if found is None:
            self._check_there(order_id)
        if found is not None and found.record.state not in CANCELLABLE:
            if found.record.state != "shipped":
                raise NotCancellable(f"Order {order_id} is {found.record.state} already.")
            if by != "customer":
                raise NotCancellable(
                    f"Order {order_id} is shipped: return it, and say what becomes of its goods."
                )
        notes, noted = self._stock.notes, None
        has_to_end = found is None or found.record.state in _NOT_ENDED
        if has_to_end and not notes.was_asked(order_id):
            noted = notes.unsettle(order_id, self._now(), self._now())
        wanted = CancelRequest(self._now(), by, shown(reason, MAX_TEXT), name)
        request, revision = notes.ask_to_cancel(order_id, wanted)
        if revision is not None:
            self._check_not_leaving(order_id, revision, noted)
            if has_to_end:
                # A process that settled the order before the request was there may have dropped the note.
                notes.unsettle(order_id, self._now(), self._now())
        return self._publish(cancel_requested_event(order_id, request), request.at)

    def _check_not_leaving(self, order_id: str, revision: int, noted: int | None) -> None:
        """Raise NotCancellable when an order leaves for the archive right now, and drop the notes on it.

        What closes the claim looks for the notes after that, so one of the two sees the other.

        Parameters:
          revision: Of the note of who wants it cancelled.
          noted: Of the note that the order is not settled, None when it was noted before.
        """
        claim = self._stock.claims.find(order_id, linearizable=True)
        if claim is not None and claim.is_archived:
            self._stock.notes.take_back_cancel(order_id, revision)
            self._stock.notes.settled(order_id, noted)
            raise NotCancellable(
                f"Order {order_id} is leaving for the archive: ask again, and restore it first when it has left."
            )

    def _check_there(self, order_id: str) -> None:
        """Raise NotCancellable when there is no such order, or it is in the archive."""
        claim = self._stock.claims.find(order_id)
        if claim is None:
            raise NotCancellable(f"There is no order {order_id}.")
        if claim.is_archived:
            raise NotCancellable(f"Order {order_id} is in the archive.")

    def _end_if_asked(self, order_id: str, found: Found | None) -> Found | None:
        """Cancel an order whose cancel was requested, if nothing has yet: its event, or its message, may be lost."""
        if found is not None and found.record.state not in _NOT_ENDED:
            return found
        request = self._stock.notes.cancel_request(order_id)
        if request is None:
            return found
        try:
            self._check_there(order_id)
            self._say(cancel_requested_event(order_id, request), request.at)
            return self._cancel(order_id, request)
        except NotCancellable:
            return self._stock.find(order_id)

    def undo(self, event: OrderCancelRequested) -> str:
        """Cancel an order whose cancel was requested; returns the state in which that leaves it."""
        order_id = order_id_of(event)
        request = self._stock.notes.cancel_request(order_id)
        if request is None:
            raise UnusableEvent(
                f"order {order_id} is to be cancelled, says the event, but the ledger knows of no request."
            )
        try:
            return self._cancel(order_id, request).record.state
        except NotCancellable:
            found = self._stock.find(order_id)
            return "missing" if found is None else found.record.state

    def cancel(self, order_id: str, reason: str, by: str = "operator") -> Found:
        """Request that an order is cancelled and cancel it; returns what is recorded then.

        One whose payment was declined is rejected, as it would have been.

        Raises:
          NotCancellable: When there is no such order, or it is over.
        """
        self.request_cancel(order_id, by, reason)
        request = self._stock.notes.cancel_request(order_id)
        return self._cancel(order_id, request or CancelRequest(self._now(), by, shown(reason, MAX_TEXT)))

    def _cancel(self, order_id: str, request: CancelRequest) -> Found:
        reason = request.reason or {"deadline": "it was not completed in time"}.get(request.by, "")
        found = self._cancelled(order_id, reason)
        if found.record.state == "declined":
            found = self._stock.release(order_id, self._now())
        if found.record.state not in ("cancelled", "released"):
            raise NotCancellable(f"Order {order_id} is {found.record.state} already.")
        may_be_charged = found.record.state == "cancelled" and "held" in found.record.at
        if may_be_charged:
            at = found.record.at["cancelled"]
            self._stock.notes.unsettle(order_id, at, self._now())
        self._announce(order_id, found)
        if not may_be_charged:
            self._stock.notes.settled(order_id, self._stock.notes.find_unsettled(order_id))
        self._tokens.drop(order_id)
        return found

    def _cancelled(self, order_id: str, reason: str) -> Found:
        """Bring an order to its end from wherever it is; it only moves forward meanwhile, so this comes to an end."""
        found = self._stock.find(order_id)
        if found is None:
            self._check_there(order_id)  # or an order that was archived a moment ago would be made again
        while True:
            if found is not None and found.record.state in ("paid", "confirmed"):
                record = found.record
                ended = record.forward("cancelling", self._now(), reason=reason)
                if record.refundable:
                    ended = ended.owing(Refund(CANCEL, record.refundable, self._now(), reason))
                found = self._stock.forward(order_id, found, ended)
                if not found.fresh:
                    continue
            found = self._stock.cancel(order_id, self._now(), reason)
            if found.record.state == "cancelling":
                raise RecordBehind(f"the record of order {order_id} cannot be read as it is now.")
            if found.record.state not in ("offered", "held", "paid", "confirmed"):
                return found
