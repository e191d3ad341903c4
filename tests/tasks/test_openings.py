"""Orders are opened together: one look and one change of each product for all that wait in a process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from dramatiq.middleware import Interrupt, raise_thread_exception

import tasks.openings
from dramatiq_jetstream.errors import BrokerConnectionError, RevisionConflict
from orders.v1.events_pb2 import OrderCreated
from tasks.ledger import Record
from tasks.openings import AT_ONCE, Openings
from tasks.pricing import claimed, first_record
from tasks.products import Catalogue
from tasks.stock import Stock
from tasks.together import Together
from tasks.waiting import Waiting
from tests.support.polling import eventually
from tests.tasks.fakes import FakeBucket, FakeEntry
from tests.tasks.test_saga_properties import created

INITIAL = {"MUG-01": 30, "TEE-01": 20, "LAMP-01": 2}


class Process:
    """A process that opens orders on a bucket, and knows the levels."""

    def __init__(self, bucket: FakeBucket) -> None:
        self.effects: list[str] = []
        self.bucket = bucket
        self.stock = Stock(bucket, INITIAL, lambda: 1_000)
        self.catalogue = Catalogue(FakeBucket()).load()
        self.waiting: Waiting[OrderCreated] = Waiting()
        self.openings = Openings(self.stock, lambda _, record, __: record, lambda: 1_000, self.waiting)
        for sku in INITIAL:
            self.stock.restock(sku, 0, "r-1", by="ann", reason="")
        bucket.pause = self.effects.append

    def place(self, order_id: str, *lines: tuple[str, int], token: str = "") -> OrderCreated:
        """Claim an order, as the front end does, and have its event arrive."""
        event = created(order_id, list(lines), token=token)
        claimed(self.stock.claims, order_id, event, self.catalogue, 1_000, lambda: 1_000)
        self.waiting.expect(event.order_id, event)
        self.effects.clear()
        return event

    @property
    def requests(self) -> list[str]:
        return [one.removeprefix("before ") for one in self.effects if not one.startswith("after")]


def test_an_order_that_is_alone_costs_one_look_and_a_write_for_each_key() -> None:
    process = Process(FakeBucket())
    found = process.openings.open(process.place("o-1", ("TEE-01", 2), ("MUG-01", 1)))
    assert process.requests == [
        "get claim.o-1, order.o-1",
        *(f"update of {key}" for key in ("level.MUG-01", "level.TEE-01", "order.o-1")),
    ]
    assert found is not None
    assert (found.fresh, found.record.state) == (True, "held")
    assert process.stock.recall("o-1") is not None
    assert process.stock.available() == {"MUG-01": 29, "TEE-01": 18, "LAMP-01": 2}
    assert list(process.stock.level("MUG-01")[0].notes) == ["o-1"]


def test_orders_that_wait_are_taken_for_by_one_change_of_each_product() -> None:
    """Their own runs store their records, and nothing else."""
    process = Process(FakeBucket())
    events = [process.place(f"o-{number}", ("MUG-01", 1), ("TEE-01", 1)) for number in range(3)]
    assert process.openings.open(events[1]) is not None
    assert [one for one in process.requests if "level" in one or "claim" in one] == [
        "get claim.o-1, order.o-1, claim.o-0, order.o-0, claim.o-2, order.o-2",
        "update of level.MUG-01",
        "update of level.TEE-01",
    ]
    assert [key for key in process.bucket.entries if key.startswith("order.")] == ["order.o-1"]
    process.effects.clear()
    assert process.openings.open(events[2]) is not None
    assert process.openings.open(events[0]) is not None
    assert process.requests == ["update of order.o-2", "update of order.o-0"]
    assert process.stock.available() == {"MUG-01": 27, "TEE-01": 17, "LAMP-01": 2}


def test_products_of_other_orders_cost_nothing() -> None:
    """Every order would pay for the size of the catalogue."""
    process = Process(FakeBucket())
    event = process.place("o-1", ("MUG-01", 1))
    assert set(process.stock.look(["o-1"], {"MUG-01", "NEW-01"}).seen_at) == {"MUG-01"}
    process.stock._shelves["TEE-01"] = process.stock._shelves["LAMP-01"] = None  # type: ignore[assignment]
    assert process.openings.open(event) is not None


def test_no_more_are_taken_for_than_wait_a_moment() -> None:
    process = Process(FakeBucket())
    events = [process.place(f"o-{number}", ("MUG-01", 1)) for number in range(AT_ONCE + 5)]
    process.openings.open(events[0])
    assert process.stock.available()["MUG-01"] == 30 - AT_ONCE


@pytest.mark.parametrize("own", [True, False])
def test_what_is_out_of_the_ordinary_is_left_to_its_own_run(*, own: bool) -> None:
    """A repetition, other contents under the same id, an unclaimed order, one that is short of a product."""
    process = Process(FakeBucket())
    done = process.place("o-done", ("MUG-01", 1))
    assert process.openings.open(done) is not None
    process.waiting.expect(done.order_id, done)
    process.place("o-other", ("MUG-01", 1))
    other = created("o-other", [("MUG-01", 2)], token="")
    unclaimed = created("o-unclaimed", [("MUG-01", 1)], token="")
    short = process.place("o-short", ("LAMP-01", 3), ("MUG-01", 1))
    for event in (other, unclaimed):
        process.waiting.expect(event.order_id, event)
    if not own:
        assert process.openings.open(process.place("o-plain", ("MUG-01", 1))) is not None
    for event in (done, other, unclaimed, short):
        assert process.openings.open(event) is None
    assert not any(f"order.{one.order_id}" in process.bucket.entries for one in (other, unclaimed, short))


def test_what_was_taken_for_an_order_is_for_no_other_one_under_its_id() -> None:
    """An event with other contents comes before the run of the one that waited."""
    process = Process(FakeBucket())
    events = [process.place(f"o-{number}", ("MUG-01", 1)) for number in range(2)]
    process.openings.open(events[0])
    assert process.openings.open(created("o-1", [("MUG-01", 2)], token="")) is None
    assert "order.o-1" not in process.bucket.entries


def test_no_token_is_kept_again_for_an_order_that_has_a_record() -> None:
    """It was done by another process, which has used the token and dropped it; here its event still seems to wait."""
    process = Process(FakeBucket())
    kept: list[str] = []

    def with_token(order_id: str, record: Record, _: str) -> Record:
        kept.append(order_id)
        return record

    openings = Openings(process.stock, with_token, lambda: 1_000, process.waiting)
    done = process.place("o-done", ("MUG-01", 1), token="tok_ok")
    assert openings.open(done) is not None
    kept.clear()
    process.waiting.expect(done.order_id, done)
    assert openings.open(process.place("o-1", ("MUG-01", 1), token="tok_ok")) is not None
    assert kept == ["o-1"]


def test_what_an_offer_has_taken_is_not_all() -> None:
    """A run that makes offers took what there was, and died; more has come since."""
    process = Process(FakeBucket())
    event = process.place("o-1", ("LAMP-01", 3))
    process.stock._shelf("LAMP-01").take("o-1", 3, in_part=True)
    process.stock.restock("LAMP-01", 5, "r-2", by="ann", reason="")
    assert process.openings.open(event) is None
    assert "order.o-1" not in process.bucket.entries
    assert process.stock.available()["LAMP-01"] == 5


def test_what_was_taken_ahead_is_found_by_another_process() -> None:
    """The event went there, or the process died: the notes stand for what it took, and nothing is taken twice."""
    bucket = FakeBucket()
    process = Process(bucket)
    events = [process.place(f"o-{number}", ("MUG-01", 1)) for number in range(2)]
    process.openings.open(events[0])
    other = Process(bucket)
    assert other.openings.open(events[1]) is not None
    assert process.openings.open(events[1]) is None, "it was opened"
    assert process.stock.available()["MUG-01"] == 28


def test_what_was_taken_long_ago_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order may have ended, and left for the archive with its record and its claim."""
    process = Process(FakeBucket())
    events = [process.place(f"o-{number}", ("MUG-01", 1)) for number in range(2)]
    process.openings.open(events[0])
    process.bucket.delete("claim.o-1")
    monkeypatch.setattr(tasks.openings, "RECALLED_SECONDS", 0.0)
    assert process.openings.open(events[1]) is None
    assert "order.o-1" not in process.bucket.entries


def test_a_level_that_has_changed_since_the_look_has_its_orders_looked_for_again() -> None:
    """Another process has opened one of them in between: its record says so, and it takes nothing more."""
    bucket = FakeBucket()
    process, other = Process(bucket), Process(bucket)
    events = [process.place(f"o-{number}", ("MUG-01", 1)) for number in range(2)]
    interfered: list[bool] = []

    def pause(where: str) -> None:
        if where == "before update of level.MUG-01" and not interfered:
            interfered.append(True)
            assert other.openings.open(events[1]) is not None
            other.stock.restock("MUG-01", 0, "r-2", by="ann", reason="")  # drops its note

    bucket.pause = pause
    assert process.openings.open(events[0]) is not None
    assert process.openings.open(events[1]) is None
    assert process.stock.available()["MUG-01"] == 28


def test_a_product_in_great_demand_fails_no_order_of_another_one() -> None:
    """Others keep changing it; an order that wants none of it was only taken for together with one that does."""

    class Contended(FakeBucket):
        def update(self, key: str, value: bytes, *, revision: int, ttl: int | None = None) -> int:
            if key == "level.MUG-01" and contended:
                raise RevisionConflict(key)
            return super().update(key, value, revision=revision, ttl=ttl)

    contended: list[bool] = []
    process = Process(Contended())
    process.stock._shelf("MUG-01")._timeout = 0
    process.place("o-1", ("MUG-01", 1))
    event = process.place("o-2", ("TEE-01", 1))
    contended.append(True)
    assert process.openings.open(event) is None, "it takes the long way"


class Strict(FakeBucket):
    """Waits for a revision that a key does not have, as a server does, and gives up at once."""

    def get_many(self, keys: Sequence[str], *, since: tuple[str, int]) -> dict[str, FakeEntry]:
        newest = self.entries.get(since[0])
        if newest is None or newest.revision < since[1]:
            raise BrokerConnectionError("the replicas did not catch up with their leader in time")
        return super().get_many(keys, since=since)


@pytest.mark.parametrize("emptied", [True, False])
def test_a_store_that_was_made_again_costs_one_run(*, emptied: bool) -> None:
    """What a process knows of the levels is of revisions that the store never gets to; the run is tried again."""
    bucket = Strict()
    process = Process(bucket)
    for number in range(20):
        process.stock.restock("MUG-01", 0, f"r-{number}", by="ann", reason="")
    bucket.entries.clear()
    bucket._revision = 0
    if not emptied:
        Process(bucket)
    event = process.place("o-1", ("MUG-01", 1))
    with pytest.raises(BrokerConnectionError):
        process.openings.open(event)
    assert process.openings.open(event) is None, "it takes the long way"
    claim = process.stock.claims.find("o-1")
    assert claim is not None
    assert process.stock.open("o-1", first_record(claim, event, 1_000)).record.state == "held"
    assert process.openings.open(process.place("o-2", ("MUG-01", 1))) is not None


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
    process = Process(FakeBucket())
    event = process.place("o-1", *((sku, 1) for sku in INITIAL))
    shelves = {sku: process.stock._shelf(sku) for sku in INITIAL}
    turn = process.openings._together.turn
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            process.openings.open(event)
        except Interrupt as error:
            errors.append(error)

    struck = threading.Thread(target=open_it)
    with shelves[awaited].turn:
        struck.start()
        eventually(lambda: turn.locked() and bool(shelves[awaited]._together._waiting), timeout=30)
        assert struck.ident is not None
        raise_thread_exception(struck.ident, Interrupt)
    struck.join(30)
    assert errors
    assert not turn.locked()
    assert [sku for sku, shelf in shelves.items() if shelf.turn.locked()] == []
    found = process.openings.open(event)
    assert found is not None
    assert found.record.state == "held"
