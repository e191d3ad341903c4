"""The actors: each subscribes to an event and does one step of the saga, or keeps the read model.

    queue      actor            event
    orders     reserve_stock    ORDER.created
    orders     accept_offer     ORDER.offer_accepted
    payments   capture_payment  ORDER.reserved
    orders     confirm_order    ORDER.paid             (where the payment did not confirm the order itself)
    orders     release_stock    ORDER.declined
    orders     cancel_order     ORDER.cancel_requested
    payments   refund_payment   ORDER.refund_requested
    payments   refund_cancelled ORDER.cancelled
    payments   refund_returned  ORDER.returned
    payments   charge_back      ORDER.charged_back
    orders     ship_order       ORDER.shipped
    orders     return_order     ORDER.return_requested
    payments   settle_order     (no event: a refund that may have been forgotten)
    orders     announce_failure (a dead letter, of whatever cause)
    projection project_event    ORDER.>    (the read model, and the deliveries to webhooks)
    projection index_orders     (every few seconds: what lists and figures are made of)
    orders     look_after_orders (once a minute: orders that do not move)
    orders     erase_customer   (no event: an administrator asks for it)

The actors of webhooks are in `tasks.webhooks.actors`.

Payments have a queue of their own because they wait for another party. It can be paused by itself and has its own
workers (`worker_payments` in the Procfile), so a hanging gateway holds no thread of another step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import dramatiq
from dramatiq.errors import BrokerError

from dramatiq_jetstream.events import Event, current_event, subscription
from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderCreated,
    OrderDeclined,
    OrderOfferAccepted,
    OrderPaid,
    OrderRefundRequested,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
    OrderShipped,
)

from . import app, logs
from .audit import Who
from .events import CARRIED_ON, SUBJECTS, Happened, UnusableEvent, decode, happened, order_id_of
from .failures import failure_of
from .gateway import GatewayUnavailable
from .model import MAX_ID_LENGTH
from .notes import NoteBusy
from .options import BEGIN, CONTINUE, FINISH, INDEX_EVERY_MS, LOOK_EVERY_MS, step_options
from .orders import OrderBusy
from .outage import is_outage
from .saga import STEPS
from .steps import left_to_newer, observed
from .stock import RecordBehind, StockBusy
from .text import shown
from .webhooks import service as webhooks

logger = logging.getLogger(__name__)

_Refunding = OrderRefundRequested | OrderCancelled | OrderReturned | OrderChargedBack


def _step(
    subject: str, event_type: Any, queue: str, priority: int, **options: Any
) -> Callable[[Callable[[Any], None]], Any]:
    return dramatiq.actor(
        subscribe=subscription(subject, event_type),
        **step_options(queue, priority),
        **options,
    )


def _pay_again(retries: int, error: BaseException) -> bool:
    """Whether a payment is tried again: through an outage of the gateway for as long as its order may wait."""
    if isinstance(error, GatewayUnavailable) and is_outage(error):
        return retries < app.SETTINGS.retry_limit or error.waited < app.SETTINGS.payment_patience
    return retries < app.SETTINGS.retry_limit


_CREATED: Final = subscription("ORDER.created", OrderCreated)


def _read_created(event: Event) -> OrderCreated:
    """Return the order that an event asks for, which waits in this process from now on."""
    created: OrderCreated = _CREATED.decode(event)
    with suppress(UnusableEvent):  # its own run refuses it
        app.orders_waiting.expect(order_id_of(created), created)
    return created


@_step(_CREATED.subject, _read_created, "orders", BEGIN)
def reserve_stock(event: OrderCreated) -> None:
    """Hold the order's items in stock, offer what there is of them, or reject the order."""
    with observed("reserve", event) as run:
        delivered = current_event()
        run.outcome = app.saga().reserve(event, None if delivered is None else delivered.time or None)


@_step("ORDER.offer_accepted", OrderOfferAccepted, "orders", CONTINUE)
def accept_offer(event: OrderOfferAccepted) -> None:
    """Have an order go on whose offer was accepted."""
    with observed("accept", event) as run:
        run.outcome = app.saga().accept(event)


@_step("ORDER.reserved", OrderReserved, "payments", CONTINUE, retry_when=_pay_again)
def capture_payment(event: OrderReserved) -> None:
    """Capture the payment of an order whose items are held."""
    with observed("pay", event) as run:
        try:
            run.outcome = app.saga().pay(event)
        except GatewayUnavailable as error:
            error.waited = app.now() - event.reserved_at.ToMilliseconds()
            raise


@_step("ORDER.paid", OrderPaid, "orders", FINISH)
def confirm_order(event: OrderPaid) -> None:
    """Confirm an order that is paid, unless its payment does that."""
    delivered = current_event()
    if delivered is not None and CARRIED_ON in delivered.headers:
        logs.bind(order_id=shown(event.order_id, MAX_ID_LENGTH))
        return
    with observed("confirm", event) as run:
        run.outcome = app.saga().confirm(event)


@_step("ORDER.declined", OrderDeclined, "orders", FINISH)
def release_stock(event: OrderDeclined) -> None:
    """Give back what was held for an order whose payment was declined."""
    with observed("release", event) as run:
        run.outcome = app.saga().release(event)


@_step("ORDER.cancel_requested", OrderCancelRequested, "orders", FINISH)
def cancel_order(event: OrderCancelRequested) -> None:
    """End an order, and give back what it holds."""
    with observed("cancel", event) as run:
        run.outcome = app.saga().undo(event)
        app.operator().drop_letters(event.order_id)


@_step("ORDER.refund_requested", OrderRefundRequested, "payments", FINISH, retry_when=_pay_again)
def refund_payment(event: OrderRefundRequested) -> None:
    """Have the gateway give back what is owed of an order's payment."""
    _refund(event, lambda: event.refund_requested_at.ToMilliseconds())


@_step("ORDER.cancelled", OrderCancelled, "payments", FINISH, retry_when=_pay_again)
def refund_cancelled(event: OrderCancelled) -> None:
    """Have the gateway give back what a cancelled order was charged, if it was."""
    _refund(event, lambda: event.cancelled_at.ToMilliseconds())


@_step("ORDER.returned", OrderReturned, "payments", FINISH, retry_when=_pay_again)
def refund_returned(event: OrderReturned) -> None:
    """Have the gateway give back what is left of the charge of an order that came back."""
    _refund(event, lambda: event.returned_at.ToMilliseconds())


@_step("ORDER.charged_back", OrderChargedBack, "payments", FINISH, retry_when=_pay_again)
def charge_back(event: OrderChargedBack) -> None:
    """Cut down refunds that were not made, after the customer's bank took money back."""
    _refund(event, lambda: event.charged_back_at.ToMilliseconds())


def _refund(event: _Refunding, since: Callable[[], int]) -> None:
    with observed("refund", event) as run:
        try:
            run.outcome = app.saga().settle(event)
        except GatewayUnavailable as error:
            # Not before: the time of a stranger's event may be none.
            error.waited = app.now() - since()
            raise


@_step("ORDER.shipped", OrderShipped, "orders", FINISH)
def ship_order(event: OrderShipped) -> None:
    """Record that the goods of an order have left, as another service says."""
    with observed("ship", event) as run:
        run.outcome = app.saga().ship(event)


@_step("ORDER.return_requested", OrderReturnRequested, "orders", FINISH)
def return_order(event: OrderReturnRequested) -> None:
    """Take back the goods of an order."""
    with observed("return", event) as run:
        run.outcome = app.saga().bring_back(event)


@dramatiq.actor(**{**step_options("payments", CONTINUE), "max_retries": 0}, max_age=600_000)
def settle_order(order_id: str) -> None:
    """Look once more whether money of an order has to go back."""
    logs.bind(order_id=order_id)
    try:
        with left_to_newer():
            app.saga().settle_order(order_id)
    except (GatewayUnavailable, NoteBusy, RecordBehind, StockBusy) as error:
        # The next look comes by itself.
        logger.warning("A refund of order %s waits: %s", order_id, error)


def _itself(event: Event) -> Event:
    return event


# However long publishing fails, the failure is not given up: no one else would learn of it.
@dramatiq.actor(
    subscribe=subscription(app.broker.names.all_dead, _itself),
    **{**step_options("orders", FINISH), "max_retries": None},
)
def announce_failure(event: Event) -> None:
    """Publish that a step of an order was given up; its message is a dead letter."""
    letter = app.broker.dead_letters.get(str(event.sequence))
    failure = None if letter is None else failure_of(letter, STEPS)
    if failure is not None:
        logs.bind(order_id=failure.order_id)
        app.saga().fail(failure.order_id, failure.step, failure.error, failure.message_id)


class Received(NamedTuple):
    """An event that was stored, when this process had it, by `time.monotonic`, and whether its publisher adds it to the
    read model.
    """

    what: Happened
    at: float
    carried_on: bool = False


def read_event(event: Event) -> Received | None:
    """Return what happened, None for an event that is no order's: other services may use ORDER.* too."""
    decoded = decode(event.subject, event.data)
    if decoded is None:
        return None
    try:
        order_id_of(decoded)
    except UnusableEvent:
        return None  # the step that acts on it makes it a dead letter; one is enough
    what = happened(decoded, event.sequence, event.time, event.headers)
    # A worker of the version before this one adds `confirmed` without the `paid` that it names, and counts past it.
    carried_on = CARRIED_ON in event.headers and isinstance(decoded, OrderCreated)
    if not carried_on:  # or no run of its own would take it out of the line
        app.events_waiting.expect(order_id_of(decoded), what)
    return Received(what, time.monotonic(), carried_on)


# However long the store is away, no event is given up: it would be missing from its order, and no webhook would get it.
@dramatiq.actor(
    subscribe=subscription(SUBJECTS, read_event),
    **{**step_options("projection", FINISH), "max_retries": None},
)
def project_event(received: Received | None) -> None:
    """Add an event to its order's record, as far as the ledger confirms it, and make its deliveries to webhooks."""
    if received is not None:
        logs.bind(order_id=order_id_of(received.what.event))
        with left_to_newer():
            if not received.carried_on:
                app.projection().project(received.what)
            webhooks.announcer().announce(received.what, received.at)


@dramatiq.actor(
    every=INDEX_EVERY_MS,
    # A tick that waits behind events is still of use; those that gather meanwhile find nothing left to do.
    max_age=20 * INDEX_EVERY_MS,
    **{**step_options("projection", FINISH), "max_retries": 0},
)
def index_orders() -> None:
    """Bring the index and the figures up to date."""
    try:
        app.indexer().advance()
        app.counting().advance()
    except (BrokerError, OrderBusy) as error:
        logger.warning("The index is not brought up to date now: %s", error)


@dramatiq.actor(**{**step_options("orders", FINISH), "time_limit": 4 * 3_600_000}, max_age=7 * 86_400_000)
def erase_customer(certificate: str) -> None:
    """Carry an erasure out that an administrator asked for."""
    who = Who("", "service", "worker")
    with app.audit_log().record("customer.erase", certificate, who) as act:
        job = app.erasure().run(certificate)
        act.detail.update({kind: str(count) for kind, count in job.counts.items()})


@dramatiq.actor(
    every=LOOK_EVERY_MS,
    # A tick that comes late is of no use: the next one is there.
    max_age=LOOK_EVERY_MS,
    **{**step_options("orders", FINISH), "max_retries": 0},
)
def look_after_orders() -> None:
    """Report the orders that do not move, call those again that nothing calls, end those that are too late, offers too,
    and look again at those whose customers may be owed money.
    """
    try:
        # A store that was emptied gets back what is known of the products.
        app.catalogue().load()
        app.standstill().run()
        app.deadline().run()
        for unsettled in app.saga().unsettled():
            settle_order.send(unsettled.order_id)
    except BrokerError as error:
        logger.warning("Orders that do not move were not looked after: %s", error)
