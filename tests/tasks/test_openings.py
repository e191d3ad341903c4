"""Orders are opened together: one atomic batch for all that threads of a process open at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from dramatiq.middleware import Interrupt, raise_thread_exception

from dramatiq_jetstream import JetStreamBroker
from tasks.ledger import PricedItem, Record
from tasks.stock import Stock
from tasks.together import Together
from tests.support.polling import eventually
from tests.tasks.fakes import FakeBucket

INITIAL = {"MUG-01": 30, "TEE-01": 20, "LAMP-01": 2}


def wanted(*lines: tuple[str, int]) -> Record:
    return Record(
        "held", {"held": 1_000}, lines=tuple(PricedItem(sku, quantity, 100) for sku, quantity in lines)
    )


def opened(bucket: FakeBucket) -> Stock:
    """Return a stock that knows its levels."""
    stock = Stock(bucket, INITIAL, lambda: 1_000)
    stock.open("o-0", wanted(*((sku, 1) for sku in INITIAL)))
    return stock


def test_an_order_of_several_products_is_one_batch() -> None:
    """Levels and record are stored by one write and without a look; what was written before drops its notes."""
    effects: list[str] = []
    bucket = FakeBucket(effects.append)
    stock = opened(bucket)
    effects.clear()
    found = stock.open("o-1", wanted(("TEE-01", 2), ("MUG-01", 1)))
    assert effects == [
        "before update of level.MUG-01, level.TEE-01, order.o-1",
        "after update of level.MUG-01, level.TEE-01, order.o-1",
    ]
    assert (found.fresh, found.record.state) == (True, "held")
    assert found.revision == bucket.entries["order.o-1"].revision
    assert stock.recall("o-1") is not None
    for sku in ("MUG-01", "TEE-01"):
        assert list(stock.level(sku)[0].notes) == ["o-1"]


@pytest.mark.parametrize("refused", [False, True])
def test_what_is_out_of_the_ordinary_is_opened_as_well(*, refused: bool) -> None:
    """Short stock, a repetition, an outdated level, a server that takes no batches: each comes to the same end."""
    bucket = FakeBucket()
    bucket.refuses_batch = lambda keys: refused
    stock, other = opened(bucket), opened(bucket)
    assert other.open("o-1", wanted(("MUG-01", 1))).fresh
    assert stock.open("o-2", wanted(("MUG-01", 1), ("TEE-01", 1))).fresh  # MUG-01 is known as it was
    assert not stock.open("o-1", wanted(("MUG-01", 1))).fresh
    assert stock.open("o-3", wanted(("MUG-01", 1), ("LAMP-01", 2))).record.state == "rejected"
    assert stock.available() == {"MUG-01": 27, "TEE-01": 18, "LAMP-01": 1}


def test_threads_share_a_batch(broker: JetStreamBroker) -> None:
    """What threads open while the turn is another's is stored at once, on a real bucket: the revisions have no gaps."""
    stock = opened(broker.bucket("stock"))  # type: ignore[arg-type]
    together = stock._openings._together
    numbers = range(1, 6)
    with ThreadPoolExecutor(len(numbers)) as pool:
        with together.turn:
            found = [pool.submit(stock.open, f"o-{n}", wanted(("MUG-01", 1), ("TEE-01", 1))) for n in numbers]
            eventually(lambda: len(together._waiting) == len(numbers), timeout=30)
        revisions = sorted(one.result(30).revision for one in found)
    assert revisions == [*range(revisions[0], revisions[0] + len(numbers))]
    assert stock.level("MUG-01")[1] == revisions[0] - 2
    assert stock.available() == {"MUG-01": 24, "TEE-01": 14, "LAMP-01": 1}


class Interrupted(BaseException):
    """Strikes a thread between any two lines."""


def test_an_interrupt_is_meant_for_one_thread() -> None:
    """Those whose work another thread took are told in words of their own, and the turn is free again."""
    strikes = [True]
    done: list[int] = []
    waiting = threading.Event()

    def do(wanted: list[int]) -> None:
        assert waiting.wait(30)
        if strikes:
            strikes.clear()
            raise Interrupted
        done.extend(wanted)

    together = Together(do, lambda error: ValueError(repr(error)))
    with ThreadPoolExecutor(2) as pool:
        with together.turn:
            both = [pool.submit(together, number) for number in range(2)]
            eventually(lambda: len(together._waiting) == 2, timeout=30)
            waiting.set()
        errors = {type(one.exception(30)) for one in both}
    assert errors == {Interrupted, ValueError}
    together(7)
    assert done == [7]


@pytest.mark.parametrize("awaited", ["LAMP-01", "MUG-01", "TEE-01"])
def test_an_interrupt_keeps_no_turn(awaited: str) -> None:
    """An interrupt that strikes a thread while it waits for the turn of a product leaves the turns of all free."""
    stock = opened(FakeBucket())
    shelves = {sku: stock._shelf(sku) for sku in INITIAL}
    lines = [(sku, 1) for sku in INITIAL]
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            stock.open("o-1", wanted(*lines))
        except Interrupt as error:
            errors.append(error)

    struck = threading.Thread(target=open_it)
    with shelves[awaited].turn:
        struck.start()
        before = [shelf.turn for sku, shelf in shelves.items() if sku < awaited]
        together = stock._openings._together
        eventually(lambda: together.turn.locked() and all(turn.locked() for turn in before), timeout=30)
        assert struck.ident is not None
        raise_thread_exception(struck.ident, Interrupt)
    struck.join(30)
    assert errors
    assert not together.turn.locked()
    assert [sku for sku, shelf in shelves.items() if shelf.turn.locked()] == []
    assert stock.open("o-1", wanted(*lines)).record.state == "held"
