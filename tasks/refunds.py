"""Gives money back: which refunds the gateway makes, and what a customer's bank took back before.

::

    refund requested, cancelled, returned, charged back → settle → refunded  (for each refund that the record decides)

Each refund is decided in the record, then made under a key of its own, then recorded as made, then published. A crash
between any two of them is mended by doing the step again: the gateway knows the key. The note `refund.{order_id}`
stands from before the decision until nothing is owed, and has the step called again whose event or message was lost.

A charge that the gateway makes for an order whose record was cancelled first is found here: `settle` looks it up, again
and again until `LATE_MS` have passed since the cancel, because a request that seemed lost may arrive late.

A chargeback is recorded once, by its id. What it leaves of a refund that is not made yet is asked for under another
key, after the gateway has said that it did not make the whole. If the gateway refuses a refund, it is asked for
chargebacks that it has not told of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message

from . import money
from .announcements import charged_back_event, event_of, refund_requested_event, refunded_event
from .events import UnusableEvent, key_of, order_id_of
from .gateway import UnusableAnswer
from .ledger import Chargeback, Refund
from .levels import GIVES_BACK
from .model import MAX_TEXT, Refusal
from .notes import Unsettled
from .ports import Gateway, History, Publisher
from .stock import Found, RecordBehind, Stock
from .text import shown
from .tokens import Tokens

#: For how many milliseconds after a cancel a charge may still be made by a request that was sent before.
LATE_MS: Final = 3_600_000

#: How many milliseconds lie between two looks at an order that is not settled, at least; they double.
LOOK_MS: Final = 10_000

#: The name of the refund that the end of a paid order decides.
CANCEL: Final = "cancel"
RETURN: Final = "return"


class NotRefundable(Refusal):
    """The refund cannot be made; the message says why."""


class NotChargedBack(Refusal):
    """The chargeback is of no charge that is known, or of more than is left of it; the message says so."""


class Refunds:
    """What gives money back, on the stores and the gateway that it works with; see `tasks.saga.Saga`."""

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
                left = money.to_text(record.refundable, record.currency)
                raise NotRefundable(
                    f"Of order {order_id} {left} can be refunded, not {money.to_text(wanted, record.currency)}."
                )
            self._stock.notes.unsettle(order_id, self._now(), self._now())
            owing = record.owing(Refund(key, wanted, self._now(), reason))
            found = self._stock.forward(order_id, found, owing)
        refund = found.record.refund(key)
        assert refund is not None, "it was found, or has just been decided"
        return self._publish(refund_requested_event(order_id, found.record, refund), refund.at)

    def charge_back(self, order_id: str, charge_id: str, chargeback: Chargeback) -> int:
        """Record what a customer's bank took back of a charge, and publish it; returns the event's place in the stream.

        Raises:
          NotChargedBack: When no such charge of the order is known (yet), or less is left of it than was taken back.
        """
        found = self._stock.find_newer(order_id, lambda now: now is not None and bool(now.record.charge_id))
        while True:
            if found is None or found.record.charge_id != charge_id:
                raise NotChargedBack(f"Order {order_id} is not known to have a charge {charge_id}.")
            if _chargeback(found, chargeback.id) is not None:
                break
            try:
                newer = found.record.charged_back_by(chargeback)
            except ValueError as error:
                raise NotChargedBack(f"Chargeback {chargeback.id} of order {order_id}: {error}.") from None
            self._stock.notes.unsettle(order_id, self._now(), self._now())
            found = self._stock.forward(order_id, found, newer)
        known = _chargeback(found, chargeback.id)
        assert known is not None, "it was found, or has just been recorded"
        return self._publish(charged_back_event(order_id, found.record, known), known.at)

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
        if revision is not None:
            found = self._end_if_asked(order_id, found)
        if found is None:
            claim = self._stock.claims.find(order_id, linearizable=True)
            if revision is not None and claim is not None and claim.is_archived:
                # It left between the note and the decision, which was refused then.
                self._stock.notes.settled(order_id, revision)
                return "archived"
            raise UnusableEvent(f"there is no order {order_id} to refund.")
        found = self._carry_on(order_id, found)
        if found.record.state in GIVES_BACK:
            raise RecordBehind(
                f"order {order_id} is {found.record.state} and has yet to give its stock back."
            )
        record = found.record
        may_be_late = False
        if record.state == "cancelled" and "held" in record.at and not record.charge_id:
            found, may_be_late = self._look_for_charge(order_id, found)
        for refund in found.record.due:
            found = self._pay_back(order_id, found, refund.key)
        for refund in found.record.refunds:
            self._announce_refund(order_id, found, refund)
        for chargeback in found.record.chargebacks:
            self._say(charged_back_event(order_id, found.record, chargeback), chargeback.at)
        if may_be_late:
            self._stock.notes.unsettle(order_id, record.at["cancelled"], self._now())
        elif revision is not None and not found.record.due:
            self._drop_note(order_id, found, revision)
        return found.record.state

    def _drop_note(self, order_id: str, found: Found, revision: int) -> None:
        """Drop the note of an order that is settled.

        A decision that is noted, and not recorded yet, was made on a record that the write here makes outdated, so it
        is noted again. Without that write, a crash in the middle of the decision could leave it without a note.
        """
        if self._stock.forward(order_id, found, found.record).fresh:
            self._stock.notes.settled(order_id, revision)

    def _end_if_asked(self, order_id: str, found: Found | None) -> Found | None:
        """End an order whose cancel was asked for and not carried out."""
        return found

    def _carry_on(self, order_id: str, found: Found) -> Found:
        """Do what has to be done of an order before it can be settled."""
        return found

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

    def _pay_back(self, order_id: str, found: Found, key: str) -> Found:
        """Have the gateway make a refund, as far as it can be, and record that it did."""
        while True:
            record = found.record
            refund = next((one for one in record.due if one.key == key), None)
            if refund is None:
                return found
            name = f"{order_id}.{key}" if not refund.cut else f"{order_id}.{key}-{refund.payable}"
            if excess := record.excess(key):
                made = self._gateway.find_refund(order_id, name)
                changed = record.cut(key, excess) if made is None else record.refunded(key, made, self._now())
                found = self._stock.forward(order_id, found, changed)
                continue
            try:
                made = self._gateway.refund(record.charge_id, refund.payable, record.currency, name)
            except UnusableAnswer:
                told = self._look_for_chargebacks(order_id, found)
                if told.record.chargebacks == record.chargebacks:
                    raise
                found = told
                continue
            found = self._stock.forward(order_id, found, record.refunded(key, made, self._now()))

    def _look_for_chargebacks(self, order_id: str, found: Found) -> Found:
        """Ask the gateway for the chargebacks of an order; returns its record with those that it did not know."""
        for charge_id, chargeback in self._gateway.find_chargebacks(order_id):
            if _chargeback(found, chargeback.id) is None:
                with suppress(NotChargedBack):
                    self.charge_back(order_id, charge_id, replace(chargeback, at=self._now()))
        return self._stock.find(order_id, linearizable=True) or found

    def _announce_refund(self, order_id: str, found: Found, refund: Refund) -> None:
        self._say(refund_requested_event(order_id, found.record, refund), refund.at)
        if refund.refund_id:
            self._say(refunded_event(order_id, found.record, refund), refund.made_at)

    def _say(self, event: Message, at: int) -> None:
        """Publish an event, unless it is known to be in the stream."""
        if not self._history.has_event(order_id_of(event), key_of(event)):
            self._publish(event, at)

    def _announce(
        self,
        order_id: str,
        found: Found,
        state: str | None = None,
        *,
        fresh: bool | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Publish that an order is in a state, or was, unless that was done.

        Parameters:
          fresh: Whether it was brought there just now; None to tell by what was found.
        """
        event = event_of(order_id, found.record, state)
        if fresh is None:
            fresh = found.fresh and state in (None, found.record.state)
        if fresh or not self._history.has_event(order_id, key_of(event)):
            self._publish(event, found.record.at[state or found.record.state], headers=headers)


def _chargeback(found: Found, chargeback_id: str) -> Chargeback | None:
    return next((one for one in found.record.chargebacks if one.id == chargeback_id), None)
