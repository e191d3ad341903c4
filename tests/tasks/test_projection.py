"""What costs the read model no request: what this process wrote into the ledger itself, and what changes nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from dramatiq_jetstream.events import Event
from orders.v1.events_pb2 import OrderCreated, OrderPaid, OrderReserved, OrderShipped
from tasks import actors, anonymous, app
from tasks.events import CARRIED_ON, Happened, name_of, order_id_of, subject_of
from tasks.orders import Orders
from tasks.products import Catalogue
from tasks.projection import Projection
from tasks.saga import Saga
from tasks.stock import Stock
from tests.tasks.fakes import FakeBucket, FakeGateway, FakeStream, fake_tokens
from tests.tasks.test_saga_properties import INITIAL, created

#: An order that its own process has projected as created, and reserved.
ORDER_ID = "o-1"


class Process:
    """One process: it does steps and projections, on stores that may be those of another one."""

    def __init__(self, other: Process | None = None) -> None:
        self.effects: list[str] = []
        self.ledger = FakeBucket() if other is None else other.ledger
        self.model = FakeBucket() if other is None else other.model
        self.stream = FakeStream() if other is None else other.stream
        clock = itertools.count(1_000)
        catalogue = Catalogue(FakeBucket()).load()
        self.stock = Stock(self.ledger, INITIAL, lambda: next(clock))
        self.orders = Orders(self.model)
        self.saga = Saga(
            *(self.stock, FakeGateway(), fake_tokens(), self.stream, self.orders, catalogue),
            lambda: next(clock),
        )
        self.projection = Projection(self.stock, self.orders, catalogue, lambda: next(clock))

    def event(self, name: str) -> Happened:
        stored = next(one for one in self.stream.stored if name_of(one.event) == name)
        return stored.happened

    def place(self, *, remembered: bool = True) -> None:
        """Project an order as created, and reserve it; perhaps forget what the read model has of it."""
        event = created(ORDER_ID, [("MUG-01", 1)])
        self.stream.append(event)
        self.projection.project(self.event("created"))
        self.saga.reserve(event)
        if not remembered:
            self.orders._recent.clear()

    def wait(self, happened: Happened) -> None:
        """Have an event arrive whose run has yet to begin."""
        self.projection._waiting.expect(order_id_of(happened.event), happened)

    def watched(self) -> list[str]:
        """Note from now on what the stores are asked."""
        for name, bucket in (("ledger", self.ledger), ("model", self.model)):
            bucket.pause = lambda where, name=name: self.effects.append(f"{name}: {where}")  # type: ignore[misc]
        return self.effects

    @property
    def shown(self) -> bytes:
        return self.model.entries[ORDER_ID].value


def test_what_a_process_wrote_into_the_ledger_is_not_read_again() -> None:
    """An event of a step that this process did costs one write, that of another process reads record and ledger."""
    process = Process()
    process.place()
    effects = process.watched()
    process.projection.project(process.event("reserved"))
    assert effects == [f"model: before update of {ORDER_ID}", f"model: after update of {ORDER_ID}"]
    other = Process(process)
    process.saga.pay(OrderReserved(order_id=ORDER_ID))
    effects = other.watched()
    other.projection.project(other.event("paid"))
    assert effects[:2] == [f"model: get {ORDER_ID}", f"ledger: get order.{ORDER_ID}"]
    assert process.orders.get(ORDER_ID) == other.orders.get(ORDER_ID)


def test_what_it_wrote_confirms_only_what_it_says() -> None:
    """An event of a stranger with another time, or of a state that the order was never in, is not shown."""
    process = Process()
    process.place()
    before = process.shown
    for event in (OrderReserved(order_id=ORDER_ID, customer_id="forged"), OrderPaid(order_id=ORDER_ID)):
        assert process.projection.project(Happened(event, 9, 9)) is None
    assert process.shown == before


@pytest.mark.parametrize("remembered", [True, False])
def test_an_order_that_was_erased_meanwhile_is_not_named_again(*, remembered: bool) -> None:
    """What this process remembers of the customer gives way to what the ledger says now."""
    process = Process()
    process.place(remembered=remembered)
    reserved = process.event("reserved")
    Process(process).projection.project(reserved)
    for bucket, key, change in (
        (process.ledger, f"claim.{ORDER_ID}", anonymous.claim),
        (process.ledger, f"order.{ORDER_ID}", anonymous.record),
        (process.model, ORDER_ID, anonymous.shown_order),
    ):
        entry = bucket.entries[key]
        bucket.update(key, change(entry.value), revision=entry.revision)
    assert b"c-1" not in process.shown
    # At an earlier place, so that it is written.
    process.projection.project(Happened(reserved.event, reserved.sequence - 1, 1_000))
    assert json.loads(process.shown)["events"]["reserved"]["sequence"] == reserved.sequence - 1
    assert b"c-1" not in process.shown


@pytest.mark.parametrize("remembered", [True, False])
def test_an_order_that_was_archived_meanwhile_is_not_shown_again(*, remembered: bool) -> None:
    """Its record is gone from ledger and read model, and stays so, whatever this process remembers."""
    process = Process()
    process.place(remembered=remembered)
    process.ledger.delete(f"order.{ORDER_ID}")
    process.model.delete(ORDER_ID)
    assert process.projection.project(process.event("reserved")) is None
    assert process.model.entries == {}


def test_events_that_wait_are_added_with_the_first_one() -> None:
    """Each of their own runs finds itself added, without a request; one that nothing confirms is left to its run."""
    process = Process()
    process.place()
    process.saga.pay(OrderReserved(order_id=ORDER_ID))
    forged = Happened(OrderPaid(order_id=ORDER_ID), 9, 9)
    for happened in (*(process.event(name) for name in ("reserved", "confirmed", "paid")), forged):
        process.wait(happened)
    effects = process.watched()
    process.projection.project(process.event("reserved"))
    assert effects == [f"model: before update of {ORDER_ID}", f"model: after update of {ORDER_ID}"]
    for name in ("paid", "confirmed"):
        process.projection.project(process.event(name))
    assert len(effects) == 2
    shown = json.loads(process.shown)["events"]
    assert shown.keys() == {"created", "reserved", "paid", "confirmed"}
    assert shown["paid"]["sequence"] == 3


@pytest.mark.parametrize("remembered", [True, False])
def test_a_forged_event_that_waits_is_not_added(*, remembered: bool) -> None:
    """Whether the process remembers the ledger's record or asks for it."""
    process = Process()
    process.place()
    other = process if remembered else Process(process)
    other.wait(Happened(OrderPaid(order_id=ORDER_ID), 9, 9))
    other.projection.project(process.event("reserved"))
    assert json.loads(process.shown)["events"].keys() == {"created", "reserved"}


@pytest.mark.parametrize(
    ("event", "headers", "carried_on", "waits"),
    [
        (OrderCreated, {}, False, True),
        (OrderCreated, {CARRIED_ON: "1"}, True, False),
        (OrderPaid, {CARRIED_ON: "1"}, False, True),
        (OrderShipped, {CARRIED_ON: "1"}, False, True),
    ],
)
def test_what_waits_has_a_run_that_takes_it_out_of_the_line(
    event: Any, headers: dict[str, str], carried_on: bool, waits: bool
) -> None:
    """A stranger's events would stay there, of any size. Only `created` is left to its publisher."""
    data = event(order_id="o-waits").SerializeToString()
    stored = Event(subject_of(event()), data, headers, "ORDERS", 1, 1_000)
    app.events_waiting.take_of("o-waits")
    received = actors.read_event(stored)
    assert received is not None
    assert received.carried_on is carried_on
    assert app.events_waiting.take_of("o-waits") == ([received.what] if waits else [])


def test_an_order_of_another_program_is_claimed_and_shown() -> None:
    """Its first event is confirmed by the claim that it makes, not by what is remembered."""
    process = Process()
    event = created(ORDER_ID, [("MUG-01", 1)])
    process.stream.append(event)
    recorded = process.projection.project(process.event("created"))
    assert recorded is not None
    assert recorded.order is not None
    assert recorded.order.status == "accepted"
    other = OrderCreated()
    other.CopyFrom(event)
    other.customer_id = "forged"
    shown = process.shown
    assert process.projection.project(Happened(other, 9, 9)) is not None  # the order has been created already
    assert process.shown == shown
