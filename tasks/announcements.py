"""Makes the events that report the ledger, and decides whether an event of the stream is one of them.

Any program that may publish to the stream can put any event there, at any time and as often as it likes. So an event
counts only if the ledger says the same: an order's content is what its id was claimed with, a step's event carries the
time at which the record entered that state, and what is shown of either comes from the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

from google.protobuf.message import Message

from orders.v1.events_pb2 import (
    OfferedItem,
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderItem,
    OrderOfferAccepted,
    OrderOffered,
    OrderPaid,
    OrderRefunded,
    OrderRefundRequested,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
    OrderShipped,
)

from . import money
from .claims import ERASED, Claim, digest_of_event
from .events import Happened, key_of, name_of, order_id_of, timestamp
from .ledger import Chargeback, PricedItem, Record, Refund
from .notes import CancelRequest, GivenUp
from .pricing import claimed
from .products import Catalogue
from .stock import Found, Stock

#: The states of the record that an event can stand for.
_STATES: Final[dict[str, tuple[str, ...]]] = {
    "offered": ("offered",),
    "offer_accepted": ("accepted",),
    "reserved": ("held",),
    "paid": ("paid",),
    "declined": ("declined",),
    "confirmed": ("confirmed",),
    "rejected": ("rejected", "released"),
    "cancelled": ("cancelled",),
    "shipped": ("shipped",),
    "return_requested": ("returning",),
    "returned": ("returned",),
}


class Testimony:
    """What the ledger says of one order; read when it is asked for, and kept.

    Parameters:
      stock: The ledger.
      now: The time in milliseconds.
      claim: What the order's id was claimed with, if that is known already.
    """

    def __init__(
        self, stock: Stock, order_id: str, now: Callable[[], int], claim: Claim | None = None
    ) -> None:
        self._stock = stock
        self._order_id = order_id
        self._now = now
        self._claim = claim
        self._found: Found | None = None

    @property
    def claim(self) -> Claim | None:
        """What the order's id was claimed with."""
        if self._claim is None:
            self._claim = self._stock.claims.find(self._order_id)
        return self._claim

    @property
    def accepted(self) -> Record | None:
        """The record of an order of which its customer accepted what there is; None of any other."""
        if self._found is None:
            self._found = self._stock.find(self._order_id)
        record = None if self._found is None else self._found.record
        return record if record is not None and "accepted" in record.at else None

    @property
    def is_known(self) -> bool:
        """Whether the ledger knows the order at all."""
        return self.claim is not None or self._stock.find_newer(self._order_id, bool) is not None

    @property
    def is_anonymous(self) -> bool:
        """Whether the order's customer was erased."""
        return self.claim is not None and self.claim.digest == ERASED

    def attested(self, happened: Happened, catalogue: Catalogue) -> Happened | None:
        """Return what the ledger confirms of an event, in the ledger's words; None when that is nothing.

        An order whose id is unclaimed is claimed by this, at the catalogue's prices of that time, so nothing is shown
        that the ledger does not have.
        """
        event = happened.event
        said: Message | None
        if isinstance(event, OrderCreated):
            claim = self._claim = self.claim or claimed(
                *(self._stock.claims, self._order_id, event, catalogue, happened.at, self._now)
            )
            if claim.digest != digest_of_event(event) and not _is_what_remains(self._order_id, claim, event):
                return None
            # Nothing is kept of what an order asked for that breaks the rules, so its event is all there is.
            said = placed_event(self._order_id, claim) if claim.lines else event
        else:
            said = self.said(key_of(event), lambda said: _same_time(event, said))
        return None if said is None else replace(happened, event=said)

    def said(self, key: str, is_meant: Callable[[Message], bool] = lambda _: True) -> Message | None:
        """Return the event with a key of the read model, as the ledger has it; None when it does not know it.

        Parameters:
          is_meant: Which one, if the ledger has several.
        """
        name, _, step = key.partition(".")
        if name == "created":
            return placed_event(self._order_id, self.claim) if self.claim and self.claim.lines else None
        if name == "failed":
            failure = self._stock.notes.failures(self._order_id).get(step)
            failed = None if failure is None else failed_event(self._order_id, step, failure)
            return failed if failed is not None and is_meant(failed) else None
        if name == "cancel_requested":
            request = self._stock.notes.cancel_request(self._order_id)
            asked = None if request is None else cancel_requested_event(self._order_id, request)
            return asked if asked is not None and is_meant(asked) else None

        def meant(found: Found | None) -> Message | None:
            return None if found is None else _said_by(self._order_id, found.record, key, is_meant)

        # A step's event comes after its record was written; a server that is behind may not have that yet.
        if meant(self._found) is None:
            self._found = self._stock.find_newer(self._order_id, lambda found: meant(found) is not None)
        return meant(self._found)


def confirmed_by(record: Record, happened: Happened) -> Happened | None:
    """Return what a record confirms of an event, in the record's words; None when the ledger has to be asked."""
    event = happened.event
    said = _said_by(order_id_of(event), record, key_of(event), lambda said: _same_time(event, said))
    return None if said is None else replace(happened, event=said)


def _said_by(order_id: str, record: Record, key: str, is_meant: Callable[[Message], bool]) -> Message | None:
    """Return the event with a key of the read model, as a record has it; None when it does not know it."""
    name, _, which = key.partition(".")
    if name in ("refund_requested", "refunded", "charged_back"):
        event = money_event(order_id, record, name, which)
        return event if event is not None and is_meant(event) else None
    events = (event_of(order_id, record, state) for state in _STATES.get(name, ()) if state in record.at)
    return next(filter(is_meant, events), None)


def _is_what_remains(order_id: str, claim: Claim, event: OrderCreated) -> bool:
    """Whether an event is the one of an order whose customer was erased, as the ledger says it."""
    # Of an order that broke a rule it says nothing more.
    return claim.digest == ERASED and bool(claim.lines) and event == placed_event(order_id, claim)


def _same_time(event: Message, said: Message) -> bool:
    """Whether an event carries the time that the ledger says; a stranger cannot know it beforehand."""
    field = f"{name_of(said)}_at"
    return bool(getattr(event, field) == getattr(said, field))


def placed_event(order_id: str, claim: Claim, payment_token: str = "") -> OrderCreated:
    """Return the event that places the order which an id was claimed with."""
    return OrderCreated(
        order_id=order_id,
        customer_id=claim.customer_id,
        items=_items(claim.lines, claim.names),
        total_amount=money.to_float(claim.total, claim.currency),
        total_minor=claim.total,
        currency=claim.currency,
        created_at=timestamp(claim.at),
        payment_token=payment_token,
    )


def event_of(order_id: str, record: Record, state: str | None = None) -> Message:
    """Return the event that reports a record; the same record always gives the same event.

    Parameters:
      state: Which state of the record is reported; None: the one that it is in.
    """
    state = state or record.state
    at = timestamp(record.at[state])
    match state:
        case "offered":
            there = {line.sku: line.quantity for line in record.lines}
            return OrderOffered(
                order_id=order_id,
                items=[
                    OfferedItem(
                        sku=item.sku,
                        name=item.name,
                        ordered=item.quantity,
                        quantity=there.get(item.sku, 0),
                        unit_price_minor=item.unit_price,
                    )
                    for item in record.ordered
                ],
                total_minor=record.total,
                currency=record.currency,
                expires_at=timestamp(record.expires_at),
                offered_at=at,
            )
        case "accepted":
            return OrderOfferAccepted(
                order_id=order_id,
                by=record.accepted_by,
                total_minor=record.total,
                currency=record.currency,
                offer_accepted_at=at,
            )
        case "held":
            return OrderReserved(
                order_id=order_id,
                customer_id=record.customer_id,
                items=_items(record.lines),
                total_minor=record.total,
                currency=record.currency,
                reserved_at=at,
            )
        case "paid":
            return OrderPaid(
                order_id=order_id,
                charge_id=record.charge_id,
                amount_minor=record.total,
                currency=record.currency,
                paid_at=at,
            )
        case "declined":
            return OrderDeclined(order_id=order_id, code=record.code, reason=record.reason, declined_at=at)
        case "confirmed":
            return OrderConfirmed(
                order_id=order_id,
                charge_id=record.charge_id,
                total_minor=record.total,
                currency=record.currency,
                confirmed_at=at,
            )
        case "rejected":
            return OrderRejected(
                order_id=order_id,
                code=f"REJECTION_CODE_{record.code}",
                reason=record.reason,
                rejected_at=at,
            )
        case "released":
            return OrderRejected(
                order_id=order_id,
                code="REJECTION_CODE_PAYMENT_DECLINED",
                reason="the payment was declined" + (f": {record.reason}" if record.reason else ""),
                rejected_at=at,
            )
        case "cancelled":
            return OrderCancelled(order_id=order_id, reason=record.reason, cancelled_at=at)
        case "shipped":
            return OrderShipped(
                order_id=order_id, carrier=record.carrier, tracking=record.tracking, shipped_at=at
            )
        case "returning":
            return OrderReturnRequested(
                order_id=order_id, stock=_stock(record), reason=record.reason, return_requested_at=at
            )
        case "returned":
            return OrderReturned(
                order_id=order_id, stock=_stock(record), reason=record.reason, returned_at=at
            )
    raise ValueError(f"no event says that an order is {state}")


def cancel_requested_event(order_id: str, request: CancelRequest) -> OrderCancelRequested:
    """Return the event that says that an order is to be cancelled."""
    return OrderCancelRequested(
        order_id=order_id,
        by=request.by,
        reason=request.reason,
        cancel_requested_at=timestamp(request.at),
    )


def refund_requested_event(order_id: str, record: Record, refund: Refund) -> OrderRefundRequested:
    """Return the event that says that a refund was decided."""
    return OrderRefundRequested(
        order_id=order_id,
        refund=refund.key,
        amount_minor=refund.amount,
        currency=record.currency,
        reason=refund.reason,
        refund_requested_at=timestamp(refund.at),
    )


def refunded_event(order_id: str, record: Record, refund: Refund) -> OrderRefunded:
    """Return the event that says that a refund was made."""
    return OrderRefunded(
        order_id=order_id,
        refund=refund.key,
        refund_id=refund.refund_id,
        amount_minor=refund.payable,
        currency=record.currency,
        refunded_at=timestamp(refund.made_at),
    )


def charged_back_event(order_id: str, record: Record, chargeback: Chargeback) -> OrderChargedBack:
    """Return the event that says that the customer's bank took money back."""
    return OrderChargedBack(
        order_id=order_id,
        chargeback_id=chargeback.id,
        amount_minor=chargeback.amount,
        currency=record.currency,
        reason=chargeback.reason,
        charged_back_at=timestamp(chargeback.at),
    )


def money_event(order_id: str, record: Record, name: str, key: str) -> Message | None:
    """Return the event with a name about a refund or a chargeback, None when the record does not say that."""
    if name == "charged_back":
        found = (charged_back_event(order_id, record, one) for one in record.chargebacks if one.id == key)
        return next(found, None)
    refund = record.refund(key)
    if refund is None or (name == "refunded" and not refund.refund_id):
        return None
    return (refunded_event if name == "refunded" else refund_requested_event)(order_id, record, refund)


def failed_event(order_id: str, step: str, failure: GivenUp) -> OrderFailed:
    """Return the event that says that a step was given up."""
    return OrderFailed(
        order_id=order_id,
        step=step,
        error=failure.error,
        message_id=failure.message_id,
        failed_at=timestamp(failure.at),
    )


def _stock(record: Record) -> str:
    return f"RETURNED_STOCK_{record.stock.upper()}"


def _items(lines: Iterable[PricedItem], names: Mapping[str, str] | None = None) -> list[OrderItem]:
    return [
        OrderItem(
            sku=line.sku,
            quantity=line.quantity,
            unit_price_minor=line.unit_price,
            name=(names or {}).get(line.sku, ""),
        )
        for line in lines
    ]
