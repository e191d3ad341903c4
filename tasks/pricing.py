"""Prices an order, once, and makes the first record of it.

An order costs what its products did when it was accepted: an order of the front end when its id was claimed, one of
another program when JetStream stored its event. Its claim says so from then on, and the first record takes it from
there, so nothing that becomes of a product reaches an order that was accepted, whenever a worker looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from orders.v1.events_pb2 import OrderCreated

from . import rules
from .catalogue import CURRENCY
from .claims import Claim, Claims, customer_of, digest_of_event, token_of
from .ledger import Record
from .products import Catalogue, Offered


def first_record(claim: Claim, event: OrderCreated, at: int) -> Record:
    """Return the first record of an order: held (if stock allows) as it was placed, or rejected for what is wrong."""
    if not claim.lines:
        reason = claim.reason or "it broke a rule of orders when it was placed"
        return Record("rejected", {"rejected": at}, code=claim.code or "INVALID", reason=reason)
    return Record(
        "held",
        {"held": at},
        customer_id=claim.customer_id,
        lines=claim.lines,
        total=claim.total,
        currency=claim.currency,
        payment_token=token_of(event),
    )


def claimed(
    claims: Claims,
    order_id: str,
    event: OrderCreated,
    catalogue: Catalogue,
    stored_at: int,
    now: Callable[[], int],
) -> Claim:
    """Return what an order id stands for; an unclaimed one is claimed for the order that this event asks for.

    Parameters:
      stored_at: When the event was stored, in milliseconds: the prices of that time hold.
    """
    claim = claims.find(order_id)
    if claim is None:
        # Nothing counts that this process has only not heard of yet, not a name either.
        catalogue.refresh()
        claim, _ = claims.claim(order_id, claim_of_event(event, catalogue.at(stored_at), now()))
    return claim


def claim_of_event(event: OrderCreated, offer: Mapping[str, Offered], at: int) -> Claim:
    """Return the claim for an event of another program: at the prices of the offer, or with the first broken rule."""
    broken = next(_broken_rules(event, offer), None)
    if broken is not None:
        return Claim(at, digest_of_event(event), code=broken.code, reason=broken.reason)
    return claim_of(rules.quantities_of(event.items), offer, at, digest_of_event(event), customer_of(event))


def claim_of(
    quantities: Mapping[str, int], offer: Mapping[str, Offered], at: int, digest: str, customer_id: str
) -> Claim:
    """Return the claim for an order that keeps the rules."""
    lines = rules.priced(quantities, offer)
    return Claim(
        at,
        digest,
        customer_id,
        lines,
        rules.total_of(lines),
        CURRENCY,
        names={sku: offer[sku].name for sku in quantities},
    )


def _broken_rules(event: OrderCreated, offer: Mapping[str, Offered]) -> Iterator[rules.BrokenRule]:
    """The rules that an event breaks, one by one: each is only asked about when those before it are kept."""
    yield from rules.broken_by_customer(event.customer_id)
    yield from rules.broken_by_token(event.payment_token or None)
    yield from rules.broken_by_count(event.items)
    for position, item in enumerate(event.items):
        yield from rules.broken_by_item(f"items[{position}]", item.sku, item.quantity, offer)
    yield from rules.broken_by_pieces(event.items)
    yield from rules.broken_by_prices(event, offer, needs_total=True)
