"""Property tests: whatever is repeated, reordered, interleaved or killed, the books of the saga balance."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tasks.levels
import tasks.takeover
from orders.v1.events_pb2 import (
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderItem,
    OrderPaid,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
)
from tasks import money
from tasks.catalogue import CATALOGUE
from tasks.claims import ClaimBehind
from tasks.events import CARRIED_ON, Happened, UnusableEvent, name_of
from tasks.ledger import WRITTEN_OFF, Record
from tasks.levels import GIVEN_BACK, PREFIX, TAKEN, Level
from tasks.orders import Orders, merge
from tasks.pricing import claimed
from tasks.products import Catalogue
from tasks.projection import Projection
from tasks.saga import Saga
from tasks.stock import RecordBehind, Stock
from tasks.takeover import take_over
from tasks.tokens import TokenMissing
from tasks.waiting import Waiting
from tests.tasks.fakes import (
    FakeBucket,
    FakeGateway,
    FakeStored,
    FakeStream,
    Task,
    World,
    fake_tokens,
    up_to_date,
)

SKUS = ("MUG-01", "TEE-01", "PRINT-01")
INITIAL = {"MUG-01": 3, "TEE-01": 2, "PRINT-01": 1}
HOLDING = ("offered", "held", "cancelling", "paid", "declined", "confirmed", "shipped", "returning")
STEPS = {
    "created": "reserve",
    "offer_accepted": "accept",
    "reserved": "pay",
    "paid": "confirm",
    "declined": "release",
    "cancel_requested": "undo",
    "cancelled": "settle",
    "refund_requested": "settle",
    "shipped": "ship",
    "return_requested": "bring_back",
    "returned": "settle",
    "charged_back": "settle",
}


def created(order_id: str, items: list[tuple[str, int]], token: str = "tok_ok") -> OrderCreated:
    """An event as another program publishes it: fields 1 to 4, and the token."""
    total = sum(CATALOGUE[sku].unit_price * quantity for sku, quantity in items)
    return OrderCreated(
        order_id=order_id,
        customer_id="c-1",
        items=[OrderItem(sku=sku, quantity=quantity) for sku, quantity in items],
        total_amount=money.to_float(total, "EUR"),
        payment_token=token,
    )


class Service:
    """The whole saga on fakes. Every step has its own objects, as in another process: it shares the stores."""

    def __init__(
        self,
        *,
        window: bool,
        sweep_after: int = 20,
        behind: Callable[[], int] = up_to_date,
        offered_for: int | None = None,
    ) -> None:
        self.sweep_after = sweep_after
        self.offered_for = offered_for
        self.world = World()
        self.stock_bucket = FakeBucket(self.world.pause, behind)
        take_over(self.stock_bucket, INITIAL)
        self.orders_bucket = FakeBucket(self.world.pause)
        self.gateway = FakeGateway(self.world.pause)
        self.tokens = fake_tokens()
        self.catalogue = Catalogue(FakeBucket()).load()
        self.stream = FakeStream(self.world.pause, window=window)
        # Two processes; each remembers what it saw and wrote.
        self.projectors = itertools.cycle([Orders(self.orders_bucket), Orders(self.orders_bucket)])
        self.memories: Any = itertools.cycle([OrderedDict(), OrderedDict()])
        self.waiting: Any = itertools.cycle([Waiting(), Waiting()])
        self.taken: Any = itertools.cycle([OrderedDict(), OrderedDict()])
        self.shown_later: Any = itertools.cycle([Waiting(), Waiting()])
        self.clock = itertools.count(1_000)
        self.pending: list[tuple[str, FakeStored]] = []
        self.running: list[tuple[Task, tuple[str, FakeStored]]] = []
        self.seen = 0

    def now(self) -> int:
        return next(self.clock)

    def stock(self) -> Stock:
        stock = Stock(self.stock_bucket, INITIAL, self.now, sweep_after=self.sweep_after)
        stock._recent = next(self.memories)
        return stock

    def saga(self) -> Saga:
        saga = Saga(
            *(self.stock(), self.gateway, self.tokens, self.stream, Orders(self.orders_bucket)),
            self.catalogue,
            self.now,
            offered_for=self.offered_for,
        )
        saga._openings._waiting, saga._openings._taken = next(self.waiting), next(self.taken)
        return saga

    def claim(self, event: OrderCreated) -> None:
        """Claim an order's id, as the front end does."""
        claimed(self.stock().claims, event.order_id, event, self.catalogue, 1_000, self.now)

    def project(self, stored: FakeStored) -> None:
        """Add an event to the read model, as a worker does."""
        projection = Projection(self.stock(), next(self.projectors), self.catalogue, self.now)
        projection._waiting = next(self.shown_later)
        projection.project(stored.happened)

    def step(self, name: str, stored: FakeStored) -> None:
        """Do a step; an event that the ledger contradicts becomes a dead letter, what may be tried again is."""
        try:
            getattr(self.saga(), name)(stored.event)
        except (RecordBehind, ClaimBehind, TokenMissing):
            self.pending.append((name, stored))
        except UnusableEvent:
            pass

    def deliver_new(self) -> None:
        """Hand what was published since to every subscription."""
        while self.seen < len(self.stream.stored):
            stored = self.stream.stored[self.seen]
            self.seen += 1
            name = name_of(stored.event)
            self.pending.append(("project", stored))
            if name in STEPS and CARRIED_ON not in stored.headers:
                self.pending.append((STEPS[name], stored))
            if isinstance(stored.event, OrderCreated):
                next(self.waiting).expect(stored.event.order_id, stored.event)
            next(self.shown_later).expect(stored.happened.event.order_id, stored.happened)  # type: ignore[attr-defined]

    def start(self, delivery: tuple[str, FakeStored]) -> None:
        step, stored = delivery
        run = (lambda: self.project(stored)) if step == "project" else (lambda: self.step(step, stored))
        task = self.world.start(step, run)
        self.running.append((task, delivery))

    def go_on(self, position: int, *, crash: bool = False) -> None:
        task, delivery = self.running[position]
        self.world.step(task, crash=crash)
        if task.done:
            self.running.pop(position)
            if crash:
                self.pending.append(delivery)  # not acknowledged, so it is delivered again
        self.check_stock()
        self.deliver_new()

    def finish(self) -> None:
        """Run everything that is left to its end."""
        while self.running or self.pending:
            if not self.running:
                self.start(self.pending.pop(0))
            self.go_on(0)

    # The books

    def records(self) -> dict[str, Record]:
        return {
            key.removeprefix("order."): Record.decode(entry.value)
            for key, entry in self.stock_bucket.entries.items()
            if key.startswith("order.")
        }

    def levels(self) -> dict[str, Level]:
        return {
            key.removeprefix(PREFIX): Level.decode(entry.value)
            for key, entry in self.stock_bucket.entries.items()
            if key.startswith(PREFIX)
        }

    def pieces(self) -> dict[str, int]:
        return {sku: level.pieces for sku, level in self.levels().items()}

    def check_stock(self) -> None:
        """At every moment: what is available and what orders hold, by record or by note, is what there was."""
        records = self.records()
        for sku, level in self.levels().items():
            taken = 0
            for order_id, record in records.items():
                note = level.notes.get(order_id)
                gave_back = note is not None and note.kind == GIVEN_BACK
                if _holds(record) and (not gave_back or record.state == "returned"):
                    taken += sum(line.quantity for line in record.lines if line.sku == sku)
            for order_id, note in level.notes.items():
                holds = took(records.get(order_id), sku)
                taken += note.quantity if note.kind == TAKEN and not holds else 0
            added = sum(adjustment.pieces for adjustment in level.adjustments)
            assert level.pieces >= 0
            assert level.pieces + taken == INITIAL[sku] + added, f"{sku} is not conserved"

    def check_notes(self) -> None:
        """At the end: no note stands for pieces that no order holds."""
        records = self.records()
        for sku, level in self.levels().items():
            for order_id, note in level.notes.items():
                assert note.kind == GIVEN_BACK or took(records[order_id], sku), f"{sku}: {order_id} leaks"

    def check_end(self, order_ids: set[str]) -> None:
        self.check_notes()
        finals: dict[str, set[str]] = {order_id: set() for order_id in order_ids}
        assert self.orders_bucket.entries.keys() == order_ids
        for stored in self.stream.stored:
            if name_of(stored.event) in ("confirmed", "rejected") and "forged" not in str(stored.event):
                finals[stored.event.order_id].add(name_of(stored.event))  # type: ignore[attr-defined]
        assert max(Counter(self.gateway.captured).values(), default=0) <= 1, "charged twice"
        for order_id, final in finals.items():
            assert len(final) == 1, f"order {order_id} ended as {final or 'nothing'}"
            order = Orders(self.orders_bucket).get(order_id)
            assert order is not None
            assert {order.status} == final
            assert (order.status == "confirmed") == (order_id in self.gateway.captured)
            assert "forged" not in repr(order)


def took(record: Record | None, sku: str) -> bool:
    """Whether a record says that its order has pieces of a product, or had."""
    return (
        record is not None
        and not record.at.keys().isdisjoint({"offered", "held"})
        and any(line.sku == sku for line in record.lines)
    )


def _holds(record: Record) -> bool:
    """Whether what an order took is not in stock: it has it, or it came back and can never be sold."""
    return record.state in HOLDING or (record.state == "returned" and record.stock == WRITTEN_OFF)


def forged(order_id: str, chance: random.Random) -> Message:
    """Return an event of a step that a stranger made up."""
    return chance.choice(
        [
            OrderReserved(order_id=order_id, customer_id="forged", total_minor=1, currency="NOPE"),
            OrderPaid(order_id=order_id, charge_id="forged"),
            OrderDeclined(order_id=order_id, reason="forged"),
            OrderConfirmed(order_id=order_id, charge_id="forged"),
            OrderRejected(order_id=order_id, reason="forged"),
            OrderFailed(order_id=order_id, step="pay", error="forged"),
            OrderReturnRequested(order_id=order_id, reason="forged"),
            OrderReturned(order_id=order_id, reason="forged"),
            OrderChargedBack(order_id=order_id, chargeback_id="forged", amount_minor=1),
        ]
    )


orders_strategy = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from(SKUS), st.integers(1, 2)), min_size=1, max_size=3),
        st.sampled_from(["tok_ok", "tok_declined"]),
    ),
    min_size=1,
    max_size=4,
)


@given(
    orders=orders_strategy,
    chance=st.randoms(use_true_random=False),
    crashes=st.integers(0, 12),
    repeats=st.integers(0, 30),
    forgeries=st.integers(0, 20),
    at_once=st.integers(1, 6),
    window=st.booleans(),
    sweep_after=st.sampled_from([0, 20]),
)
# Not shrunk: a smaller failing schedule is rarely found.
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_books_balance_under_any_schedule(
    orders: list[Any],
    chance: random.Random,
    crashes: int,
    repeats: int,
    forgeries: int,
    at_once: int,
    window: bool,
    sweep_after: int,
) -> None:
    """Random interleavings, repetitions, forgeries, crashes: stock conserved, one charge at most, one final status."""
    service = Service(window=window, sweep_after=sweep_after)
    for number, (items, token) in enumerate(orders):
        event = created(f"o-{number}", items, token)
        service.claim(event)
        service.stream.append(event)
    service.deliver_new()
    while service.running or service.pending:
        if repeats and chance.random() < 0.2:
            repeats -= 1
            stored = chance.choice(service.stream.stored)
            service.pending.append((STEPS.get(name_of(stored.event), "project"), stored))
        if forgeries and chance.random() < 0.1:
            forgeries -= 1
            number = chance.randrange(len(orders) + 2)  # among them orders that never were
            event = forged(f"o-{number}", chance)
            if number < len(orders) and chance.random() < 0.3:
                event = created(f"o-{number}", [("TEE-01", 2)], "forged")
            service.stream.stored.append(FakeStored(event, len(service.stream.stored) + 1))
            service.deliver_new()
        if service.pending and len(service.running) < at_once:
            service.start(service.pending.pop(chance.randrange(len(service.pending))))
        crash = crashes > 0 and chance.random() < 0.1
        crashes -= crash
        service.go_on(chance.randrange(len(service.running)), crash=crash)
    service.check_end({f"o-{number}" for number in range(len(orders))})


@given(chance=st.randoms(use_true_random=False), decline=st.booleans())
@settings(max_examples=200, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_one_order_is_decided_once(chance: random.Random, decline: bool) -> None:
    """One order reserved (or released) by several processes at once, amid other orders that drop its note."""
    service = Service(window=False, sweep_after=0)
    token = "tok_declined" if decline else "tok_ok"
    event = created("o-0", [("MUG-01", 1)], token)
    if decline:
        saga = service.saga()
        saga.reserve(event)
        saga.pay(OrderReserved(order_id="o-0"))
    for number in range(6):
        other = created(f"o-{1 + number}", [("TEE-01", 1)])
        run = (lambda: service.saga().release(OrderDeclined(order_id="o-0"))) if decline else None
        for work in (
            run or (lambda: service.saga().reserve(event)),
            lambda o=other: service.saga().reserve(o),
        ):
            service.running.append((service.world.start("step", work), ("", FakeStored(event, 0))))
    while service.running:
        service.go_on(chance.randrange(len(service.running)))
        service.pending.clear()
    assert service.pieces()["MUG-01"] == INITIAL["MUG-01"] - (not decline)


@given(orders=orders_strategy, data=st.data())
@settings(max_examples=60, deadline=None)
def test_repeating_a_finished_order_changes_nothing(orders: list[Any], data: st.DataObject) -> None:
    """Every event of finished orders delivered again, twice, in any order: no store and no charge changes."""
    service = Service(window=False)
    for number, (items, token) in enumerate(orders):
        service.stream.append(created(f"o-{number}", items, token))
    service.deliver_new()
    service.finish()
    before = [
        dict(service.stock_bucket.entries),
        dict(service.orders_bucket.entries),
        list(service.gateway.captured),
        list(service.stream.stored),
    ]
    again = [(step, s) for s in service.stream.stored for step in ("project", STEPS.get(name_of(s.event)))]
    service.pending = data.draw(st.permutations([delivery for delivery in again * 2 if delivery[0]]))
    service.finish()
    assert before == [
        service.stock_bucket.entries,
        service.orders_bucket.entries,
        service.gateway.captured,
        service.stream.stored,
    ]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_read_model_depends_on_the_set_of_events_only(data: st.DataObject) -> None:
    """Projecting the events of an order in any order, with repetitions, gives the same record."""
    service = Service(window=False)
    saga = service.saga()
    service.stream.append(
        created("o-1", [("MUG-01", 1)], data.draw(st.sampled_from(["tok_ok", "tok_declined"])))
    )
    service.gateway.down = data.draw(st.booleans())
    if service.gateway.down:
        saga.fail("o-1", "pay", "the gateway is down", "m-1")
        service.gateway.down = False
    service.deliver_new()
    service.finish()
    events = [Happened(s.event, s.sequence, 1_000 + s.sequence) for s in service.stream.stored]

    def fold(happened: list[Happened]) -> str:
        record: dict[str, Any] | None = None
        for one in happened:
            record = merge(record, one) or record
        return json.dumps(record, sort_keys=True)

    shuffled = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=8))))
    assert fold(list(shuffled)) == fold(events)


def test_reserve_after_release_does_not_take_stock_again() -> None:
    """ORDER.created and ORDER.reserved delivered again long after the order was declined change nothing."""
    service = Service(window=False)
    service.stream.append(created("o-1", [("MUG-01", 2)], "tok_declined"))
    service.deliver_new()
    service.finish()
    first = list(service.stream.stored)
    for stored in first:
        if name_of(stored.event) in STEPS:
            service.start((STEPS[name_of(stored.event)], stored))
    service.finish()
    assert service.records()["o-1"].state == "released"
    assert service.pieces() == INITIAL
    assert len(service.stream.stored) == len(first)


def test_event_ahead_of_its_record_is_refused() -> None:
    """An ORDER.paid that this service did not publish is no payment."""
    service = Service(window=True)
    saga = service.saga()
    with pytest.raises(UnusableEvent, match="never created"):
        saga.confirm(OrderPaid(order_id="o-1"))
    saga.reserve(created("o-1", [("MUG-01", 1)]))
    with pytest.raises(UnusableEvent, match="it is held"):
        saga.confirm(OrderPaid(order_id="o-1"))


def test_failure_is_superseded_by_the_replay() -> None:
    """failed → (replay) → paid, confirmed: the status follows, and the history keeps the failure."""
    service = Service(window=True)
    saga = service.saga()
    orders = Orders(service.orders_bucket)

    def project() -> str:
        for stored in service.stream.stored:
            orders.project(Happened(stored.event, stored.sequence, stored.sequence))
        order = orders.get("o-1")
        assert order is not None
        return order.status

    def event(name: str) -> Message:
        return next(s.event for s in service.stream.stored if name_of(s.event) == name)

    service.stream.append(created("o-1", [("MUG-01", 1)]))
    saga.reserve(event("created"))  # type: ignore[arg-type]
    saga.fail("o-1", "pay", "the gateway is down", "m-1")
    assert project() == "failed"
    saga.pay(event("reserved"))  # type: ignore[arg-type]
    assert project() == "confirmed"
    order = orders.get("o-1")
    assert order is not None
    assert [entry.event for entry in order.history] == ["created", "reserved", "failed", "paid", "confirmed"]
    saga.fail("o-1", "pay", "a repetition failed later", "m-2")
    assert project() == "confirmed"
    assert len(service.stream.stored) == 5


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fakes that conflict need not wait for each other; threads of earlier tests must, or they run in circles."""
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(tasks.levels, "time", hurried)
    monkeypatch.setattr(tasks.takeover, "time", hurried)
