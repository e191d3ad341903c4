"""The stock on a real bucket: threads and processes that fight for it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from dramatiq_jetstream import JetStreamBroker
from tasks.ledger import PricedItem, Record
from tasks.stock import InvalidAdjustment, Stock

INITIAL = {"MUG-01": 30, "TEE-01": 20, "LAMP-01": 5}


def wanted(*lines: tuple[str, int]) -> Record:
    return Record(
        "held", {"held": 1_000}, lines=tuple(PricedItem(sku, quantity, 100) for sku, quantity in lines)
    )


@pytest.fixture
def stocks(broker: JetStreamBroker) -> list[Stock]:
    """The stock as two processes see it: each has its own object on the same bucket."""
    return [Stock(broker.bucket("stock"), INITIAL, lambda: 1_000) for _ in range(2)]


def test_twenty_threads_for_the_last_item(stocks: list[Stock]) -> None:
    """Exactly the pieces that there are are taken, and stock never goes below zero."""

    def take(number: int) -> str:
        return stocks[number % 2].open(f"o-{number}", wanted(("LAMP-01", 1))).record.state

    with ThreadPoolExecutor(20) as pool:
        states = Counter(pool.map(take, range(20)))
    assert states == {"held": 5, "rejected": 15}
    assert stocks[0].available()["LAMP-01"] == 0


def test_all_or_none_of_several_products(stocks: list[Stock]) -> None:
    """An order of two products, one of them short, takes nothing of the other."""
    found = stocks[0].open("o-1", wanted(("MUG-01", 1), ("LAMP-01", 6)))
    assert found.record.state == "rejected"
    assert found.record.reason == "6 × LAMP-01 ordered, 5 in stock"
    assert stocks[0].available() == INITIAL


def test_same_order_from_many_threads(stocks: list[Stock]) -> None:
    """One order reserved by twenty threads at once, in two processes, is reserved once; so is its release."""
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda n: stocks[n % 2].open("o-1", wanted(("MUG-01", 2))), range(20)))
    assert sum(one.fresh for one in found) == 1
    assert len({one.revision for one in found}) == 1
    assert stocks[0].available()["MUG-01"] == 28
    stocks[0].forward("o-1", found[0], found[0].record.forward("declined", 2_000, code="x"))
    with ThreadPoolExecutor(20) as pool:
        released = list(pool.map(lambda n: stocks[n % 2].release("o-1", 3_000), range(20)))
    assert {one.record.state for one in released} == {"released"}
    assert sum(one.fresh for one in released) == 1
    assert stocks[0].available() == INITIAL
    assert stocks[1].open("o-1", wanted(("MUG-01", 2))).record.state == "released"
    assert stocks[0].available() == INITIAL


def test_many_orders_of_mixed_products(stocks: list[Stock]) -> None:
    """Two hundred orders over three products: what was taken and what is left add up to what there was."""
    products = list(INITIAL)

    def take(number: int) -> Record:
        lines = {products[number % 3]: 1 + number % 2, products[number % 2]: 1}
        return stocks[number % 2].open(f"o-{number}", wanted(*lines.items())).record

    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(take, range(200)))
    taken: Counter[str] = Counter()
    for record in records:
        if record.state == "held":
            taken.update({line.sku: line.quantity for line in record.lines})
    left = stocks[0].available()
    assert {sku: left[sku] + taken[sku] for sku in INITIAL} == INITIAL
    assert left["TEE-01"] == 0 or left["MUG-01"] == 0


def test_stock_is_seeded_once(broker: JetStreamBroker, stocks: list[Stock]) -> None:
    """Another start, with other figures, leaves what is there alone."""
    stocks[0].open("o-1", wanted(("MUG-01", 3)))
    stocks[0].available()
    again = Stock(broker.bucket("stock"), dict.fromkeys(INITIAL, 999), lambda: 1_000)
    assert again.available() == {**INITIAL, "MUG-01": 27}


def test_adjustments_count_once(stocks: list[Stock]) -> None:
    """Restocked and corrected amid orders, repeated from many threads in two processes; who and why is kept."""

    def add(number: int) -> int:
        return (
            stocks[number % 2].restock("LAMP-01", 10, f"r-{number % 4}", by="ann", reason="delivery").pieces
        )

    with ThreadPoolExecutor(20) as pool:
        orders = [
            pool.submit(stocks[number % 2].open, f"o-{number}", wanted(("LAMP-01", 1))) for number in range(5)
        ]
        assert list(pool.map(add, range(20))) == [10] * 20
        assert {order.result().record.state for order in orders} == {"held"}
    assert stocks[0].available()["LAMP-01"] == 40
    counted = stocks[1].correct("LAMP-01", 38, "c-1", by="bob", reason="two are broken")
    assert counted == stocks[0].correct("LAMP-01", 38, "c-1", by="bob", reason="two are broken")
    assert (counted.pieces, stocks[0].available()["LAMP-01"]) == (-2, 38)
    assert [one.id for one in stocks[0].adjustments("LAMP-01")][-1] == "c-1"


def test_what_cannot_be_adjusted_is_refused(stocks: list[Stock]) -> None:
    with pytest.raises(InvalidAdjustment, match="There is no product 'NONE'"):
        stocks[0].restock("NONE", 1, "r-1", by="ann", reason="delivery")
    with pytest.raises(InvalidAdjustment, match="only 5 pieces of LAMP-01"):
        stocks[0].restock("LAMP-01", -6, "r-2", by="ann", reason="delivery")
    assert stocks[0].available() == INITIAL
