"""The steps that carry an order from created to confirmed.

::

    created  → reserve → reserved | rejected | offered (after the claim on its id)
    reserved → pay     → paid, confirmed | declined
    paid     → confirm → confirmed                  (of an event that no payment of this version has published)
    declined → release → rejected

What takes an order back is in `tasks.compensation`, what sends and returns goods in `tasks.shipping`, what moves money
back in `tasks.refunds`, what becomes of an order that stock covers in part in `tasks.offers`.

Each step follows one order of things: read the record (`tasks.ledger`), do the effect, record it, publish the
next event. A crash between any two of them is mended by doing the step again, because the effect is
idempotent, the record says what was decided, and an event that is published again has the same id and
content.

The event is only what calls a step. What the step does comes from the record, and an event that the record
contradicts is refused: a stranger may have published it.

Nothing is waited for between `paid` and `confirmed`, so the payment records both with one write and publishes both. If
it is killed in between, it is done again, which publishes what is missing. The `paid` that it publishes says so
(`tasks.events.CARRIED_ON`) and calls no step. One that does not say so was published by an earlier version, or once
more for an order that stands still, and has `confirm` do the rest.

A step that comes late, when the record is past it, changes nothing. Unless the read model has the event that the step
publishes, no one can know whether it was published, so it is published again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from google.protobuf.message import Message

from orders.v1.events_pb2 import OrderCreated, OrderDeclined, OrderPaid, OrderReserved

from .announcements import failed_event
from .claims import digest_of_event
from .compensation import NotCancellable
from .events import CARRIED_ON, UnusableEvent, name_of, order_id_of
from .ledger import Record
from .model import MAX_TEXT
from .notes import GivenUp
from .offers import NotOffered, Offers, offer_of
from .openings import Openings
from .ports import Charge, Gateway, History, Publisher
from .pricing import claimed, first_record
from .products import Catalogue
from .refunds import NotChargedBack, NotRefundable
from .shipping import NotReturnable, NotShippable
from .stock import Found, Stock
from .text import shown
from .tokens import TokenMissing, Tokens, is_reference
from .waiting import Waiting

__all__ = [
    "OUTCOMES",
    "STEPS",
    "NotCancellable",
    "NotChargedBack",
    "NotOffered",
    "NotRefundable",
    "NotReturnable",
    "NotShippable",
    "Saga",
]

#: The step that each actor does.
STEPS: Final = {
    "reserve_stock": "reserve",
    "accept_offer": "accept",
    "capture_payment": "pay",
    "confirm_order": "confirm",
    "release_stock": "release",
    "cancel_order": "cancel",
    "refund_payment": "refund",
    "refund_cancelled": "refund",
    "refund_returned": "refund",
    "charge_back": "refund",
    "ship_order": "ship",
    "return_order": "return",
}

#: The steps, and for each the events that it may publish when it has done its work.
OUTCOMES: Final[dict[str, frozenset[str]]] = {
    "reserve": frozenset({"reserved", "rejected", "offered"}),
    "accept": frozenset({"reserved"}),
    "pay": frozenset({"confirmed", "declined"}),
    "confirm": frozenset({"confirmed"}),
    "release": frozenset({"rejected"}),
    "cancel": frozenset({"cancelled", "rejected"}),
    "ship": frozenset({"shipped"}),
    "return": frozenset({"returned"}),
    # Of several refunds the events do not say which one the step was given up for.
    "refund": frozenset(),
}


class Saga(Offers):
    """The steps, on the stores and the gateway that they work with; those after `confirmed` are inherited.

    Parameters:
      stock: Stock and records.
      gateway: Captures payments and refunds them.
      tokens: Keeps payment tokens until they have been used.
      publish: Stores an event.
      history: Knows which events are in the stream.
      catalogue: The products and their prices.
      now: The time in milliseconds.
      offered_for: For how many milliseconds what there is of an order that stock does not cover is offered; None
        rejects the order.
      waiting: The orders that wait in this process; None for no others.
    """

    def __init__(
        self,
        stock: Stock,
        gateway: Gateway,
        tokens: Tokens,
        publish: Publisher,
        history: History,
        catalogue: Catalogue,
        now: Callable[[], int],
        *,
        offered_for: int | None = None,
        waiting: Waiting[OrderCreated] | None = None,
    ) -> None:
        super().__init__(stock, gateway, tokens, publish, history, now)
        self._catalogue = catalogue
        self._offered_for = offered_for
        self._openings = Openings(stock, self._with_token, now, waiting or Waiting())

    def reserve(self, event: OrderCreated, stored_at: int | None = None) -> str:
        """Hold the order's items in stock, offer what there is of them, or reject the order; returns the state in which
        that leaves it.

        Parameters:
          stored_at: When the event was stored, in milliseconds, None for now; an order that is not claimed costs what
            its products did then.
        """
        order_id = order_id_of(event)
        found = self._openings.open(event)
        if found is None:
            found = self._reserve(order_id, event, self._now() if stored_at is None else stored_at)
        if "offered" in found.record.at:
            # It may have been accepted, or cancelled, before it was published.
            self._announce(order_id, found, "offered")
        if found.record.state in ("held", "rejected"):
            self._announce(order_id, found)
        if found.record.state not in ("offered", "held") and event.payment_token:
            self._tokens.drop(order_id)
        return found.record.state

    def _reserve(self, order_id: str, event: OrderCreated, stored_at: int) -> Found:
        """Store the first record of an order, whatever is known of it."""
        claim = claimed(self._stock.claims, order_id, event, self._catalogue, stored_at, self._now)
        if claim.digest != digest_of_event(event):
            raise UnusableEvent(
                f"order id {order_id} stands for an order with other contents than this event's."
            )
        wanted = first_record(claim, event, self._now())
        if wanted.payment_token:
            wanted = self._with_token(order_id, wanted, event.payment_token)
        offer = None if self._offered_for is None else offer_of(wanted, claim, self._offered_for)
        return self._stock.open(order_id, wanted, offer)

    def pay(self, event: OrderReserved) -> str:
        """Capture the payment of an order whose items are held; returns the state in which that leaves it."""
        order_id = order_id_of(event)
        found = self._recorded(order_id, event, "held")
        if found.record.state == "offered":
            self._expect(found, event, "held")
        before = found.record
        if found.record.state == "held":
            found = self._capture(order_id, found)
        found = self._confirmed(order_id, found)
        if found.record.state == "declined":
            self._announce(order_id, found)
        elif "paid" in found.record.at:
            # It may have been followed by a cancel before it was published.
            self._announce_payment(order_id, found, before)
        if found.record.payment_token and found.record.state != "held":
            self._tokens.drop(order_id)
        return found.record.state

    def _with_token(self, order_id: str, wanted: Record, token: str) -> Record:
        """Keep the token that an event brought, or see to it that the one that it names is kept."""
        if not is_reference(token):
            self._tokens.keep(order_id, wanted.customer_id, token)
        elif self._tokens.find(order_id, token) is None:
            return wanted.rejected("INVALID", "payment_token names none that is kept here")
        return wanted

    def _capture(self, order_id: str, held: Found) -> Found:
        """Have the gateway decide about a payment, and record what it says."""
        record = held.record
        named = record.payment_token
        token = self._tokens.find(order_id, named) if named else ""
        if token is None:
            return self._captured_elsewhere(order_id)
        outcome = self._gateway.charge(order_id, record.total, record.currency, token)
        if isinstance(outcome, Charge):
            state, facts = "paid", {"charge_id": outcome.charge_id}
        else:
            code, reason = shown(outcome.code, MAX_TEXT), shown(outcome.reason, MAX_TEXT)
            state, facts = "declined", {"code": code, "reason": reason}
        found = held
        while found.record.state == "held":
            # What settles an order may change the record and leave its state.
            decided = found.record.forward(state, self._now(), **facts)
            if state == "paid":
                decided = decided.forward("confirmed", decided.at["paid"])
            found = self._stock.forward(order_id, found, decided)
        if isinstance(outcome, Charge) and "paid" not in found.record.at:
            # Cancelled meanwhile: what was captured goes back.
            self._stock.notes.unsettle(order_id, self._now(), 0)
        return found

    def _captured_elsewhere(self, order_id: str) -> Found:
        """Return what another run has recorded, which has dropped the token since this one read the record."""
        found = self._stock.find_newer(order_id, lambda now: now is not None and now.record.state != "held")
        if found is None or found.record.state == "held":
            # No decline: the payment may have been captured by a run that could not record it.
            raise TokenMissing(f"the payment token of order {order_id} is not kept any more.")
        return found

    def confirm(self, event: OrderPaid) -> str:
        """Confirm an order that is paid; returns the state in which that leaves it."""
        order_id = order_id_of(event)
        found = self._confirmed(order_id, self._recorded(order_id, event, "paid"))
        if "confirmed" in found.record.at or "paid" not in found.record.at:
            self._expect(found, event, "confirmed")
            self._announce(order_id, found, "confirmed")
        return found.record.state

    def _announce_payment(self, order_id: str, found: Found, before: Record) -> None:
        """Publish that an order is paid, and confirmed if that is recorded as well.

        Parameters:
          before: The record before this step changed it.
        """

        is_confirmed = "confirmed" in found.record.at
        for state in ("paid", "confirmed") if is_confirmed else ("paid",):
            fresh = found.fresh and state not in before.at
            headers = {CARRIED_ON: "1"} if state == "paid" and is_confirmed else {}
            self._announce(order_id, found, state, fresh=fresh, headers=headers)

    def _confirmed(self, order_id: str, found: Found) -> Found:
        """Confirm an order that is only paid, as an earlier version recorded it; returns what is recorded then."""
        while found.record.state == "paid":
            # A refund may change the record and leave its state.
            found = self._stock.forward(order_id, found, found.record.forward("confirmed", self._now()))
        return found

    def release(self, event: OrderDeclined) -> str:
        """Give back what is held for an order whose payment was declined, and reject it; returns its state then."""
        order_id = order_id_of(event)
        found = self._recorded(order_id, event, "declined")
        if found.record.state == "declined":
            found = self._stock.release(order_id, self._now())
        self._expect(found, event, "released")
        self._announce(order_id, found, "released")
        return found.record.state

    def fail(self, order_id: str, step: str, error: str, message_id: str) -> None:
        """Say that a step of an order was given up and waits as a dead letter."""
        if any(self._history.has_event(order_id, outcome) for outcome in OUTCOMES[step]):
            return  # it was a repetition that failed: the order itself is past this step
        failure = GivenUp(self._now(), shown(error, MAX_TEXT), message_id)
        failure = self._stock.notes.give_up(order_id, step, failure)
        self._publish(failed_event(order_id, step, failure), failure.at)

    def _recorded(self, order_id: str, event: Message, state: str) -> Found:
        # What this process remembers is good enough to go on from: a step that did so before made it outdated. But an
        # order that was cancelled meanwhile is not charged.
        found = None if state == "held" else self._stock.recall(order_id)
        if found is None or found.record.state != state:
            earlier = ("offered",) if state == "held" else ("offered", "held")
            found = self._stock.find_newer(
                order_id, lambda now: now is not None and now.record.state not in earlier
            )
        if found is None:
            raise UnusableEvent(
                f"order {order_id} is {name_of(event)}, says the event, but was never created."
            )
        return found

    def _expect(self, found: Found, event: Message, state: str) -> None:
        # Only an event that this service did not publish can be ahead of the record.
        if state not in found.record.at:
            raise UnusableEvent(
                f"the event says that the order is {name_of(event)}, but it is {found.record.state}."
            )
