"""Property tests: products and stock change while orders come in, repeated, reordered and killed at any effect."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tasks.assortment
import tasks.levels
import tasks.takeover
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import money
from tasks.assortment import Assortment, InvalidProduct, NoSuchProduct, Pieces, Wanted
from tasks.events import Happened
from tasks.levels import GIVEN_BACK, TAKEN
from tasks.orders import Orders
from tasks.pricing import claimed
from tasks.products import PREFIX, Catalogue, StoredProduct
from tasks.projection import Projection
from tasks.stock import InvalidAdjustment
from tests.tasks.fakes import FakeStored
from tests.tasks.test_products import ANN, unrecorded
from tests.tasks.test_saga_properties import HOLDING, INITIAL, SKUS, STEPS, Service, took

#: What is added by one restock, in pieces.
ADDED = {"a delivery": 2, "a return": 1}


class Shop(Service):
    """The saga, and operators that change what it sells. Each step is done by one of two processes.

    One of them hears of changes at once, the other only when it looks for them.
    """

    def __init__(self, chance: random.Random) -> None:
        super().__init__(window=False)
        self.chance = chance
        self.fresh, self.late = (Catalogue(self.stock_bucket).load() for _ in range(2))
        self.stored_at: dict[int, int] = {}
        self.expected: dict[str, tuple[int, dict[str, str]] | None] = {}

    @property
    def catalogue(self) -> Catalogue:  # type: ignore[override]
        if self.chance.random() < 0.5:
            return self.late
        self.fresh.refresh()
        return self.fresh

    @catalogue.setter
    def catalogue(self, _: Catalogue) -> None:
        """Each process has its own."""

    def sold(self, sku: str) -> tuple[int | None, str]:
        """What a product costs now and is called, as it is stored."""
        product = StoredProduct.decode(sku, self.stock_bucket.entries[f"{PREFIX}{sku}"].value)
        return product.price_at(self.now()), product.name

    def place(self, order_id: str, skus: list[str], *, is_ours: bool) -> None:
        """Place an order by the front end or by another program; note what it is to cost."""
        lines = [(sku, *self.sold(sku)) for sku in dict.fromkeys(skus)]
        total = sum(price or 0 for _, price, _ in lines)
        event = OrderCreated(
            order_id=order_id,
            customer_id="c-1",
            items=[OrderItem(sku=sku, quantity=1) for sku, _, _ in lines],
            total_amount=money.to_float(total, "EUR"),
        )
        if is_ours:
            claim = claimed(*(self.stock().claims, order_id, event, self.catalogue, self.now(), self.now))
            self.expected[order_id] = (claim.total, dict(claim.names)) if claim.lines else None
        else:
            is_sold = all(price is not None for _, price, _ in lines)
            self.expected[order_id] = (total, {sku: name for sku, _, name in lines}) if is_sold else None
        self.stream.append(event)
        self.stored_at[len(self.stream.stored)] = self.now()

    def project(self, stored: FakeStored) -> None:
        at = self.stored_at.get(stored.sequence, 1_000 + stored.sequence)
        projection = Projection(self.stock(), next(self.projectors), self.catalogue, self.now)
        projection.project(Happened(stored.event, stored.sequence, at))

    def step(self, name: str, stored: Any) -> None:
        if name == "act":
            try:
                stored()
            except (InvalidProduct, NoSuchProduct, InvalidAdjustment):
                pass
        elif name == "reserve":
            at = self.stored_at[stored.sequence]
            super().step(name, SimpleNamespace(event=stored.event, sequence=stored.sequence, at=at))
        else:
            super().step(name, stored)

    def saga(self) -> Any:
        saga = super().saga()
        reserve = saga.reserve

        def at_its_time(event: OrderCreated) -> str:
            placed = next(s.sequence for s in self.stream.stored if s.event == event)
            return reserve(event, self.stored_at[placed])

        saga.reserve = at_its_time  # type: ignore[method-assign]
        return saga

    def act(self, kind: str, sku: str, number: int) -> None:
        """Do what an operator does, under an id that a repetition has too."""
        assortment = Assortment(self.stock_bucket, self.stock(), self.catalogue, unrecorded, self.now)
        change = partial(assortment.change, sku, f"{kind}-{number}", who=ANN)
        match kind:
            case "price":
                change(wanted=Wanted(price=1_000 + number))
            case "rename":
                change(wanted=Wanted(name=f"Thing {number}"))
            case "withdraw":
                change(wanted=Wanted(withdrawn=True))
            case "both":
                change(wanted=Wanted(price=2_000 + number, pieces=Pieces("a delivery", added=2)))
            case "restock":
                self.stock().restock(sku, 1, f"{kind}-{number}", by="ann", reason="a return")
            case "count":
                change(wanted=Wanted(pieces=Pieces("counted", counted=number % 4)))
            case "correct":
                self.stock().correct(sku, number % 3, f"{kind}-{number}", by="ann", reason="counted")
            case "theft":
                change(wanted=Wanted(pieces=Pieces("stolen", added=-1)))

    def check_stock(self) -> None:
        """At every moment: what is available and what orders hold is what there was, and what people added to it."""
        records = self.records()
        for sku, level in self.levels().items():
            if sku not in INITIAL:
                continue
            taken = 0
            for order_id, record in records.items():
                note = level.notes.get(order_id)
                gave_back = note is not None and note.kind == GIVEN_BACK
                if record.state in HOLDING and not gave_back:
                    taken += sum(line.quantity for line in record.lines if line.sku == sku)
            for order_id, note in level.notes.items():
                holds = took(records.get(order_id), sku)
                taken += note.quantity if note.kind == TAKEN and not holds else 0
            ids = [one.id for one in level.adjustments]
            assert len(ids) == len(set(ids)), "a change counted twice"
            by_reason: Counter[str] = Counter()
            for one in level.adjustments:
                by_reason[one.reason] += one.pieces
                assert one.pieces == ADDED.get(one.reason, -1 if one.reason == "stolen" else one.pieces)
            assert level.pieces >= 0
            assert level.pieces + taken == INITIAL[sku] + sum(by_reason.values()), f"{sku} is not conserved"

    def check_orders(self) -> None:
        """At the end: every order costs what it was placed with, and shows the names of that time."""
        for order_id, record in self.records().items():
            wanted = self.expected[order_id]
            order = Orders(self.orders_bucket).get(order_id)
            assert order is not None
            if wanted is None:
                assert (record.state, record.code) == ("rejected", "UNKNOWN_SKU")
                continue
            assert "held" in record.at or record.code == "OUT_OF_STOCK", record
            assert order.total == wanted[0]
            assert {line.sku: line.name for line in order.items} == wanted[1]
            if "held" in record.at:
                assert record.total == wanted[0] == sum(line.unit_price for line in record.lines)


acts = st.lists(
    st.tuples(
        st.sampled_from(["price", "rename", "withdraw", "both", "restock", "count", "correct", "theft"]),
        st.sampled_from(SKUS),
    ),
    max_size=10,
)
placed = st.lists(
    st.tuples(st.lists(st.sampled_from(SKUS), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=5
)


@given(
    orders=placed,
    changes=acts,
    chance=st.randoms(use_true_random=False),
    crashes=st.integers(0, 10),
    repeats=st.integers(0, 15),
    at_once=st.integers(1, 6),
)
# Not shrunk: a smaller failing schedule is rarely found.
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_orders_keep_what_they_were_placed_with(
    orders: list[tuple[list[str], bool]],
    changes: list[tuple[str, str]],
    chance: random.Random,
    crashes: int,
    repeats: int,
    at_once: int,
) -> None:
    """Prices, withdrawals, restocks and counts between the steps of orders: stock conserved, each order its total."""
    shop = Shop(chance)
    waiting: list[Callable[[], None]] = [
        partial(shop.place, f"o-{number}", skus, is_ours=is_ours)
        for number, (skus, is_ours) in enumerate(orders)
    ]
    operators = [partial(shop.act, kind, sku, number) for number, (kind, sku) in enumerate(changes)]
    again = list(operators)
    while waiting or operators or shop.running or shop.pending:
        # A program that places an order in the same moment in which a price changes may know either.
        is_quiet = not any(task.name == "act" for task, _ in shop.running)
        if waiting and is_quiet and chance.random() < 0.1:
            waiting.pop(0)()
            shop.deliver_new()
        if operators and chance.random() < 0.1:
            shop.pending.append(("act", operators.pop(0)))  # type: ignore[arg-type]
        if repeats and chance.random() < 0.1:
            repeats -= 1
            if again and chance.random() < 0.5:
                shop.pending.append(("act", chance.choice(again)))  # type: ignore[arg-type]
            elif shop.stored_at:
                stored = shop.stream.stored[chance.choice(list(shop.stored_at)) - 1]
                shop.pending.append((STEPS["created"], stored))
        if shop.pending and len(shop.running) < at_once:
            shop.start(shop.pending.pop(chance.randrange(len(shop.pending))))
        if shop.running:
            crash = crashes > 0 and chance.random() < 0.1
            crashes -= crash
            shop.go_on(chance.randrange(len(shop.running)), crash=crash)
    shop.check_stock()
    shop.check_notes()
    assert shop.records().keys() == shop.expected.keys()
    shop.check_orders()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fakes that conflict need not wait for each other; threads of earlier tests must, or they run in circles."""
    hurried: Any = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (tasks.levels, tasks.takeover, tasks.assortment):
        monkeypatch.setattr(module, "time", hurried)
