"""Takes an order back: who wants it cancelled, what that gives back, and which refunds the gateway makes.

::

    cancel requested → cancel → cancelled            (stock is given back; a charge is owed)
    refund requested, cancelled → refund → refunded  (for each refund that the record decides)

The record decides once. A payment moves it from `held` to `paid`, a cancel from `held` or later to `cancelling`, each
by compare-and-set. A cancel that comes first leaves nothing to pay; one that comes later decides the refund in the same
change. A charge that the gateway makes for an order whose record was cancelled first is found there: `refund` looks it
up, again and again until `LATE_MS` have passed since the cancel, because a request that seemed lost may arrive late.

A request is noted in the ledger before its event is published, so an event without that note is a stranger's. Each
refund is decided in the record, then made under a key of its own, then recorded as made, then published. A crash
between any two of them is mended by doing the step again: the gateway knows the key. The note `refund.{order_id}`
stands from before the event until nothing is owed, and has the step called again whose event or message was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from google.protobuf.message import Message

from orders.v1.events_pb2 import OrderCancelRequested

from .announcements import cancel_requested_event, event_of, refund_requested_event, refunded_event
from .events import UnusableEvent, key_of, order_id_of
from .ledger import Refund
from .model import MAX_TEXT
from .notes import CancelRequest, Unsettled
from .ports import Gateway, History, Publisher
from .stock import Found, RecordBehind, Stock
from .text import shown
from .tokens import Tokens

#: For how many milliseconds after a cancel a charge may still be made by a request that was sent before.
LATE_MS: Final = 3_600_000

#: How many milliseconds lie between two looks at an order that is not settled, at least; they double.
LOOK_MS: Final = 60_000

#: The name of the refund that a cancel decides.
CANCEL: Final = "cancel"

#: The states of the ledger in which an order can be cancelled, or is.
CANCELLABLE: Final = frozenset(
    {"held", "paid", "confirmed", "declined", "released", "cancelling", "cancelled"}
)


class NotCancellable(Exception):
    """The order cannot be cancelled; the message says why."""


class NotRefundable(Exception):
    """The refund cannot be made; the message says why."""


class Compensation:
    """What takes an order back, on the stores and the gateway that it works with; see `tasks.saga.Saga`."""

    def __init__(
        self,
        stock: Stock,
        gateway: Gateway,
        tokens: Tokens,
        publish: Publisher,
        history: History,
        now: Callable[[], int],
    ) -> None:
        self._stock = stock
        self._gateway = gateway
        self._tokens = tokens
        self._publish = publish
        self._history = history
        self._now = now

    # Cancelling

    def request_cancel(self, order_id: str, by: str, reason: str = "", name: str = "") -> int:
        """Note that an order is to be cancelled and publish it; returns the event's place in the stream.

        Parameters:
          by: `customer`, `operator` or `deadline`; who asked first is kept.
          name: What that person or program is called.

        Raises:
          NotCancellable: When there is no such order, or it is over.
        """
        found = self._stock.find(order_id)
        if found is None and self._stock.claims.find(order_id) is None:
            raise NotCancellable(f"There is no order {order_id}.")
        if found is not None and found.record.state not in CANCELLABLE:
            raise NotCancellable(f"Order {order_id} is {found.record.state} already.")
        request = CancelRequest(self._now(), by, shown(reason, MAX_TEXT), name)
        request = self._stock.notes.ask_to_cancel(order_id, request)
        return self._publish(cancel_requested_event(order_id, request), request.at)

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
        if found.record.state == "cancelled" and "held" in found.record.at:
            at = found.record.at["cancelled"]
            self._stock.notes.unsettle(order_id, at, self._now())
        self._announce(order_id, found)
        self._tokens.drop(order_id)
        return found

    def _cancelled(self, order_id: str, reason: str) -> Found:
        """Bring an order to its end from wherever it is; it only moves forward meanwhile, so this comes to an end."""
        found = self._stock.find(order_id)
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
            if found.record.state not in ("held", "paid", "confirmed"):
                return found

    # Refunds

    def request_refund(self, order_id: str, key: str, amount: int | None, reason: str) -> int:
        """Decide that a part of a charge goes back, and publish it; returns the event's place in the stream.

        Parameters:
          key: Names the refund; asked again with the same one, nothing more is refunded.
          amount: In minor units; None is what is left of the charge.

        Raises:
          NotRefundable: When the order was not charged, or less is left of the charge.
        """
        reason = shown(reason, MAX_TEXT)
        found = self._stock.find(order_id)
        while True:
            if found is None or not found.record.charge_id or found.record.state == "cancelling":
                raise NotRefundable(f"Order {order_id} is not paid, so nothing of it can be refunded.")
            record = found.record
            known = record.refund(key)
            if known is not None:
                if amount not in (None, known.amount):
                    raise NotRefundable(
                        f"Refund {key} of order {order_id} was decided with {known.amount} minor units before."
                    )
                break
            wanted = record.refundable if amount is None else amount
            if not 0 < wanted <= record.refundable:
                raise NotRefundable(
                    f"Of order {order_id} {record.refundable} minor units can be refunded, not {wanted}."
                )
            self._stock.notes.unsettle(order_id, self._now(), self._now())
            owing = record.owing(Refund(key, wanted, self._now(), reason))
            found = self._stock.forward(order_id, found, owing)
        refund = found.record.refund(key)
        assert refund is not None, "it was found, or has just been decided"
        return self._publish(refund_requested_event(order_id, found.record, refund), refund.at)

    def settle(self, event: Message) -> str:
        """Give back what an order's record says that is owed; returns the state of the order."""
        return self.settle_order(order_id_of(event))

    def settle_order(self, order_id: str) -> str:
        """Give back what an order's record says that is owed; returns the state of the order.

        Of an order that was cancelled before a charge was known, the gateway is asked first.

        Raises:
          GatewayUnavailable: When the gateway gave no answer; trying again is safe.
        """
        revision = self._stock.notes.find_unsettled(order_id)
        found = self._stock.find_newer(order_id, lambda now: now is not None and bool(now.record.due))
        if found is None:
            raise UnusableEvent(f"there is no order {order_id} to refund.")
        if found.record.state == "cancelling":
            # Not before its stock is given back: that is written over what is recorded meanwhile.
            raise RecordBehind(f"order {order_id} is being cancelled.")
        record = found.record
        may_be_late = False
        if record.state == "cancelled" and "held" in record.at and not record.charge_id:
            found, may_be_late = self._look_for_charge(order_id, found)
        for refund in found.record.due:
            refund_id = self._gateway.refund(
                found.record.charge_id, refund.amount, found.record.currency, f"{order_id}.{refund.key}"
            )
            found = self._made(order_id, found, refund.key, refund_id)
        for refund in found.record.refunds:
            self._announce_refund(order_id, found, refund)
        if may_be_late:
            self._stock.notes.unsettle(order_id, record.at["cancelled"], self._now())
        elif not found.record.due:
            self._stock.notes.settled(order_id, revision)
        return found.record.state

    def unsettled(self) -> Iterator[Unsettled]:
        """Yield the orders whose time has come to be settled again."""
        for one in self._stock.notes.unsettled():
            if self._now() - one.looked_at >= max(LOOK_MS, one.looked_at - one.at):
                yield one

    def _look_for_charge(self, order_id: str, found: Found) -> tuple[Found, bool]:
        """Ask the gateway for the charge of a cancelled order; returns the record, and whether one may still come."""
        charge = self._gateway.find_charge(order_id)
        if charge is None:
            return found, self._now() - found.record.at["cancelled"] < LATE_MS
        while not found.record.charge_id:
            charged = replace(found.record, charge_id=charge.charge_id)
            owing = charged.owing(Refund(CANCEL, charged.refundable, self._now(), charged.reason))
            found = self._stock.forward(order_id, found, owing)
        return found, False

    def _made(self, order_id: str, found: Found, key: str, refund_id: str) -> Found:
        """Record that a refund was made."""
        while True:
            refund = found.record.refund(key)
            if refund is None or refund.refund_id:
                return found
            found = self._stock.forward(order_id, found, found.record.refunded(key, refund_id, self._now()))

    def _announce_refund(self, order_id: str, found: Found, refund: Refund) -> None:
        requested = refund_requested_event(order_id, found.record, refund)
        if not self._history.has_event(order_id, key_of(requested)):
            self._publish(requested, refund.at)
        if refund.refund_id:
            made = refunded_event(order_id, found.record, refund)
            if not self._history.has_event(order_id, key_of(made)):
                self._publish(made, refund.made_at)

    def _announce(self, order_id: str, found: Found, state: str | None = None) -> None:
        """Publish that an order is in a state, or was, unless that was done."""
        event = event_of(order_id, found.record, state)
        fresh = found.fresh and state in (None, found.record.state)
        if fresh or not self._history.has_event(order_id, key_of(event)):
            self._publish(event, found.record.at[state or found.record.state])
