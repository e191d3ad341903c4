"""Property tests of the stock: whatever is repeated, reordered, outdated or killed, no piece is sold twice or lost.

Of the processes some offer what there is of an order, and some reject it, as while the setting is being changed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tasks.levels
import tasks.takeover
from tasks.claims import Claim
from tasks.ledger import PricedItem, Record
from tasks.levels import GIVEN_BACK, PREFIX, TAKEN, Level
from tasks.stock import RecordBehind, Stock
from tasks.takeover import take_over
from tests.tasks.fakes import FakeBucket, Task, World
from tests.tasks.test_saga_properties import took

INITIAL = {"A": 3, "B": 2, "C": 1}
HOLDING = ("offered", "held", "cancelling", "declined")
#: The most writes that a server which answers a read is behind.
BEHIND: Final = 40


class Shop:
    """The stock on a bucket whose servers may be behind; each piece of work is done as another process does it."""

    def __init__(self, orders: list[dict[str, int]], chance: random.Random, behind: int) -> None:
        self.world = World()
        self.bucket = FakeBucket(self.world.pause)
        take_over(self.bucket, INITIAL)
        self.bucket.behind = lambda: chance.randint(0, behind) if chance.random() < 0.5 else 0
        self.orders = orders
        self.taken: dict[str, Record] = {}
        self.clock = itertools.count(1_000)
        self.chance = chance
        self.before: list[Stock] = []
        for number, lines in enumerate(orders):
            Stock(self.bucket, INITIAL, self.now).claims.claim(
                f"o-{number}", Claim(1, "digest", "c-1", self.wanted(lines).lines, 1, "EUR")
            )

    def now(self) -> int:
        return next(self.clock)

    def stock(self) -> Stock:
        """The stock of another process, or of one that knows the keys as they were at some time."""
        stock = Stock(self.bucket, INITIAL, self.now, sweep_after=20)
        if self.before and self.chance.random() < 0.5:
            for sku, shelf in self.chance.choice(self.before)._shelves.items():
                stock._shelf(sku)._known = shelf._known
        self.before.append(stock)
        return stock

    @staticmethod
    def wanted(lines: dict[str, int]) -> Record:
        return Record("held", {"held": 1}, lines=tuple(PricedItem(sku, n, 100) for sku, n in lines.items()))

    @staticmethod
    def offer(wanted: Record) -> Callable[[Mapping[str, int]], Record]:
        return lambda pieces: wanted.offered(pieces, {}, 1_000_000)

    def work(self, kind: str, number: int) -> None:
        """Do a step of an order; one that has to be tried again is left to a repetition."""
        order_id, stock = f"o-{number}", self.stock()
        try:
            match kind:
                case "open" | "offer":
                    if order_id in self.taken and self.chance.random() < 0.5:
                        stock.record(order_id, self.taken.pop(order_id))
                        return
                    wanted = self.wanted(self.orders[number])
                    stock.open(order_id, wanted, self.offer(wanted) if kind == "offer" else None)
                case "ahead":
                    ids = [f"o-{one}" for one in range(len(self.orders))]
                    looked = stock.look(ids, {sku for one in self.orders for sku in one})
                    records = {one: self.wanted(self.orders[int(one[2:])]) for one in looked.claims}
                    wanted_all = {one: records[one] for one in records if one not in looked.recorded}
                    for one in stock.take(wanted_all, looked.seen_at):
                        self.taken[one] = wanted_all[one]
                case "accept":
                    found = stock.find(order_id, linearizable=True)
                    if found is not None and found.record.state == "offered":
                        stock.forward(order_id, found, found.record.accepted("customer", 2))
                case "release":
                    found = stock.find(order_id, linearizable=True)
                    if found is not None and found.record.state == "held":
                        stock.forward(order_id, found, found.record.forward("declined", 2))
                    if found is not None and found.record.state not in ("rejected", "offered"):
                        stock.release(order_id, 3)
                case "restock":
                    sku = min(self.orders[number])
                    stock.restock(sku, 1, f"r-{number}", by="a test", reason="it came in")
                case "cancel":
                    stock.cancel(order_id, 4, "an operator")
        except RecordBehind:
            pass

    def records(self) -> dict[str, Record]:
        return {
            key.removeprefix("order."): Record.decode(entry.value)
            for key, entry in self.bucket.entries.items()
            if key.startswith("order.")
        }

    def levels(self) -> dict[str, Level]:
        entries = self.bucket.entries.items()
        return {
            key.removeprefix(PREFIX): Level.decode(entry.value)
            for key, entry in entries
            if key.startswith(PREFIX)
        }

    def check(self) -> None:
        """At every moment: what is available and what orders hold, by record or by note, is what there was."""
        records = self.records()
        for sku, level in self.levels().items():
            taken = 0
            for order_id, record in records.items():
                note = level.notes.get(order_id)
                gave_back = note is not None and note.kind == GIVEN_BACK
                if record.state in HOLDING and not gave_back:
                    taken += sum(line.quantity for line in record.lines if line.sku == sku)
            for order_id, note in level.notes.items():
                holds = took(records.get(order_id), sku)
                taken += note.quantity if note.kind == TAKEN and not holds else 0
            assert level.pieces >= 0
            ids = [one.id for one in level.adjustments]
            assert len(ids) == len(set(ids))
            assert level.pieces + taken == INITIAL[sku] + len(ids), f"{sku} is not conserved"

    def check_end(self) -> None:
        """At the end: what is not available is held by an order, or for its customer to accept."""
        held: Counter[str] = Counter()
        for record in self.records().values():
            assert record.state in ("offered", "held", "declined", "rejected", "released", "cancelled")
            if record.state in HOLDING:
                held.update({line.sku: line.quantity for line in record.lines})
        for sku, level in self.levels().items():
            assert level.pieces + held[sku] == INITIAL[sku] + len(level.adjustments)


orders_strategy = st.lists(
    st.dictionaries(st.sampled_from(sorted(INITIAL)), st.integers(1, 2), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@given(
    orders=orders_strategy,
    kinds=st.lists(
        st.sampled_from(["open", "offer", "ahead", "ahead", "accept", "release", "cancel", "restock"]),
        max_size=10,
    ),
    offering=st.booleans(),
    chance=st.randoms(use_true_random=False),
    crashes=st.integers(0, 8),
    at_once=st.integers(1, 6),
    behind=st.sampled_from([0, BEHIND]),
)
# Not shrunk: a smaller failing schedule is rarely found.
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_stock_is_conserved_under_any_schedule(
    orders: list[dict[str, int]],
    kinds: list[str],
    offering: bool,
    chance: random.Random,
    crashes: int,
    at_once: int,
    behind: int,
) -> None:
    """Steps interleaved, repeated and killed at any effect, on servers that are behind: no piece twice, none lost."""
    shop = Shop(orders, chance, behind)
    opening = "offer" if offering else "open"
    pending: list[tuple[str, int]] = [(opening, number) for number in range(len(orders))]
    pending += [(kind, chance.randrange(len(orders))) for kind in kinds]
    every = list(pending)
    running: list[tuple[Task, tuple[str, int]]] = []

    def run(*, crashing: bool) -> None:
        nonlocal crashes
        while running or pending:
            if pending and len(running) < at_once:
                work = pending.pop(chance.randrange(len(pending)))
                running.append((shop.world.start(work[0], partial(shop.work, *work)), work))
            position = chance.randrange(len(running))
            task, work = running[position]
            crash = crashing and crashes > 0 and chance.random() < 0.1
            crashes -= crash
            shop.world.step(task, crash=crash)
            if task.done:
                running.pop(position)
                if crash:
                    pending.append(work)  # delivered again
            shop.check()

    run(crashing=True)
    # What was left to a repetition.
    shop.bucket.behind = lambda: 0
    pending += every
    run(crashing=False)
    shop.check_end()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fakes that conflict need not wait for each other; threads of earlier tests must, or they run in circles."""
    hurried: Any = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(tasks.levels, "time", hurried)
    monkeypatch.setattr(tasks.takeover, "time", hurried)
