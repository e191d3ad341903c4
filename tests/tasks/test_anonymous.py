"""What remains of an order whose customer is erased says nothing of them, whatever other programs put there."""

from __future__ import annotations

import pytest

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import anonymous
from tasks.claims import Claim
from tasks.events import decode


def test_fields_that_are_not_known_go() -> None:
    """Another program says more in its events than this one knows of, also within an item."""
    unknown = b"\xa2\x06\x03Ann"  # field 100
    item = OrderItem.FromString(OrderItem(sku="MUG-01", quantity=2).SerializeToString() + unknown)
    event = OrderCreated(order_id="o-1", customer_id="ann", items=[item], total_amount=2.0)
    left = anonymous.event("ORDER.created", event.SerializeToString() + unknown)
    assert b"nn" not in left
    assert decode("ORDER.created", left) == OrderCreated(
        order_id="o-1", items=[OrderItem(sku="MUG-01", quantity=2)], total_amount=2.0
    )
    assert anonymous.event("ORDER.created", left) == left


@pytest.mark.parametrize("code", ["INVALID", "UNKNOWN_SKU"])
def test_a_claim_does_not_quote_what_was_asked_for(code: str) -> None:
    """An order that broke a rule was told so in its own words; which rule it was stays."""
    claim = Claim(1, "digest", code=code, reason="items[0].sku names no product: there is no 'Ann'")
    left = anonymous.claim(claim.encode())
    assert b"Ann" not in left
    assert Claim.decode(left).code == code
    assert anonymous.claim(left) == left
