"""Money, and what an order may ask for: every rule of the event has its reason for people."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import money
from tasks.ledger import Record
from tasks.pricing import claim_of_event, first_record
from tasks.products import Offer, first_products

minor_units = st.integers(-(10**12), 10**12)


@given(minor_units)
def test_money_survives_the_float_of_the_contract(minor: int) -> None:
    """An amount written into total_amount is read back as the same amount."""
    assert money.from_float(money.to_float(minor, "EUR"), "EUR") == minor


@given(st.lists(st.integers(1, 10_000_00), max_size=100))
def test_sums_of_doubles_are_understood(prices: list[int]) -> None:
    """A producer that adds prices as doubles arrives near enough to the exact total."""
    total = 0.0
    for price in prices:
        total += price / 100
    assert money.from_float(total, "EUR") == sum(prices)


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf])
def test_no_amount(amount: float) -> None:
    """NaN and the infinities are no amounts."""
    assert money.from_float(amount, "EUR") is None


def test_amounts_for_people() -> None:
    """Amounts are shown with the decimals of their currency."""
    assert money.to_text(123_456, "EUR") == "1,234.56 EUR"
    assert money.to_text(-5, "EUR") == "-0.05 EUR"
    assert money.to_text(500, "JPY") == "500 JPY"


def event(**members: Any) -> OrderCreated:
    """Return a good event (two mugs), with some members replaced."""
    good: dict[str, Any] = {
        "order_id": "o-1",
        "customer_id": "c-1",
        "items": [OrderItem(sku="MUG-01", quantity=2)],
        "total_amount": 25.80,
    }
    return OrderCreated(**{**good, **members})


def test_a_name_is_kept_in_one_form() -> None:
    """The event of another program may have it decomposed, or with joiners."""
    assert record_of(event(customer_id="Zoe\u0308 👩\u200d🚀")).customer_id == "Zoë 👩\u200d🚀"


def record_of(event: OrderCreated) -> Record:
    """Return the first record of an event that was stored while the first prices held."""
    return first_record(claim_of_event(event, Offer(first_products(), 1_000), 1_000), event, 1_000)


def mugs(quantity: int, **members: Any) -> list[OrderItem]:
    return [OrderItem(sku="MUG-01", quantity=quantity, **members)]


BAD: dict[str, tuple[OrderCreated, str, str]] = {
    "no customer": (event(customer_id=""), "INVALID", "customer_id"),
    "blank customer": (event(customer_id=" \t"), "INVALID", "customer_id"),
    "long customer": (event(customer_id="c" * 65), "INVALID", "customer_id"),
    "customer with a line break": (event(customer_id="c\r\nd"), "INVALID", "customer_id"),
    "customer that turns the direction": (event(customer_id="c\u202ed"), "INVALID", "direction"),
    "customer that shows nothing": (event(customer_id="\u200d"), "INVALID", "customer_id"),
    "long token": (event(payment_token="t" * 256), "INVALID", "payment_token"),
    "no items": (event(items=[]), "INVALID", "1 to 100 items"),
    "10,000 items": (event(items=mugs(1) * 10_000), "INVALID", "not 10000"),
    "negative quantity": (event(items=mugs(-1), total_amount=-12.9), "INVALID", "not -1"),
    "zero quantity": (event(items=mugs(0), total_amount=0), "INVALID", "not 0"),
    "huge quantity": (event(items=mugs(2**31 - 1)), "INVALID", "not 2147483647"),
    "many pieces over many lines": (event(items=mugs(11) * 100), "INVALID", "1000 pieces"),
    "another currency": (event(currency="USD"), "INVALID", "'USD'"),
    "unknown sku": (event(items=[OrderItem(sku="NOPE", quantity=1)]), "UNKNOWN_SKU", "'NOPE'"),
    "a sku of 1 MB": (event(items=[OrderItem(sku="x" * 10**6, quantity=1)]), "UNKNOWN_SKU", "…"),
    "wrong price": (event(items=mugs(2, unit_price_minor=1)), "TOTAL_MISMATCH", "not 0.01 EUR"),
    "wrong total": (event(total_amount=25.79), "TOTAL_MISMATCH", "not 25.79 EUR"),
    "missing total": (event(total_amount=0), "TOTAL_MISMATCH", "25.80 EUR"),
    "negative total": (event(total_amount=-25.8), "TOTAL_MISMATCH", "-25.80 EUR"),
    "NaN total": (event(total_amount=math.nan), "TOTAL_MISMATCH", "no amount"),
    "infinite total": (event(total_amount=math.inf), "TOTAL_MISMATCH", "no amount"),
    "astronomic total": (event(total_amount=1e308), "TOTAL_MISMATCH", "14 digits or more"),
    "wrong minor total": (event(total_minor=2579), "TOTAL_MISMATCH", "25.79 EUR"),
}


@pytest.mark.parametrize(("bad", "code", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_order_is_rejected_with_its_reason(bad: OrderCreated, code: str, reason: str) -> None:
    """An event that breaks a rule becomes a rejection that says which, in a text of bounded length."""
    record = record_of(bad)
    assert (record.state, record.code) == ("rejected", code)
    assert reason in record.reason
    assert len(record.reason) < 300


def test_good_order_is_priced_by_the_catalogue() -> None:
    """Fields 1 to 4 are enough; a sku that stands twice is one line."""
    record = record_of(
        event(items=[*mugs(2), OrderItem(sku="TEE-01", quantity=1), *mugs(1)], total_amount=63.2)
    )
    assert record.state == "held"
    assert [(line.sku, line.quantity, line.unit_price) for line in record.lines] == [
        ("MUG-01", 3, 1_290),
        ("TEE-01", 1, 2_450),
    ]
    assert (record.total, record.currency) == (6_320, "EUR")


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_first_step(data: bytes) -> None:
    """Whatever protobuf accepts as an OrderCreated becomes a record."""
    from google.protobuf.message import DecodeError

    try:
        decoded = OrderCreated.FromString(data)
    except DecodeError:
        return
    assert record_of(decoded).state in ("held", "rejected")
