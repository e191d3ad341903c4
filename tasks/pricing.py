"""Makes the first record of an order out of its OrderCreated event: what is held, or why it is rejected."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orders.v1.events_pb2 import OrderCreated

from . import rules
from .catalogue import CURRENCY
from .claims import Claim, Claims, customer_of, digest_of_event, token_of
from .ledger import Record


def first_record(event: OrderCreated, at: int) -> Record:
    """Return the first record of an order: held (if stock allows), or rejected for what is wrong with it."""
    broken = next(_broken_rules(event), None)
    if broken is not None:
        return Record("rejected", {"rejected": at}, code=broken.code, reason=broken.reason)
    items = rules.priced(rules.quantities_of(event.items))
    return Record(
        "held",
        {"held": at},
        customer_id=customer_of(event),
        lines=items,
        total=rules.total_of(items),
        currency=CURRENCY,
        payment_token=token_of(event),
    )


def claimed(claims: Claims, order_id: str, event: OrderCreated, now: Callable[[], int]) -> Claim:
    """Return what an order id stands for; an unclaimed one is claimed for the order that this event asks for."""
    claim = claims.find(order_id)
    if claim is None:
        at = now()
        record = first_record(event, at)
        wanted = Claim(
            at, digest_of_event(event), record.customer_id, record.lines, record.total, record.currency
        )
        claim, _ = claims.claim(order_id, wanted)
    return claim


def _broken_rules(event: OrderCreated) -> Iterator[rules.BrokenRule]:
    """The rules that an event breaks, one by one: each is only asked about when those before it are kept."""
    yield from rules.broken_by_customer(event.customer_id)
    yield from rules.broken_by_token(event.payment_token or None)
    yield from rules.broken_by_count(event.items)
    for position, item in enumerate(event.items):
        yield from rules.broken_by_item(f"items[{position}]", item.sku, item.quantity)
    yield from rules.broken_by_pieces(event.items)
    yield from rules.broken_by_prices(event, needs_total=True)
