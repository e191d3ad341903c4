"""A store of an earlier version, whose stock is one key, is taken over once, while earlier workers still run."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from tasks.ledger import PricedItem, Record
from tasks.ports import Bucket
from tasks.stock import Stock
from tasks.takeover import LEVELS
from tests.tasks.fakes import FakeBucket, Task, World

INITIAL = {"A": 5, "B": 4}


def wanted(**lines: int) -> Record:
    return Record("held", {"held": 1}, lines=tuple(PricedItem(sku, n, 100) for sku, n in lines.items()))


class Earlier:
    """What an earlier version does: it decides and notes every order in one key, then writes the record."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def _read(self) -> tuple[dict[str, Any], int]:
        while True:
            entry = self.bucket.get(LEVELS)
            if entry is not None:
                return json.loads(entry.value), entry.revision
            try:
                first = {"pieces": INITIAL, "pending": {}}
                return json.loads(json.dumps(first)), self.bucket.create(LEVELS, json.dumps(first).encode())
            except KeyExists:
                continue

    def available(self) -> dict[str, int]:
        return {sku: self._read()[0]["pieces"].get(sku, pieces) for sku, pieces in INITIAL.items()}

    def open(self, order_id: str, record: Record) -> Record:
        while True:
            stored, revision = self._read()
            existing = self.bucket.get(f"order.{order_id}")
            noted = stored["pending"].get(order_id)
            if existing is not None or noted is not None:
                record = Record.decode(existing.value) if existing else Record.from_json(noted)
                break
            for line in record.lines:
                stored["pieces"][line.sku] -= line.quantity
            pending = {}
            for other, note in stored["pending"].items():
                state = note["state"]
                if state != "written":
                    pending[other] = note
            stored["pending"] = {**pending, order_id: record.to_json()}
            try:
                self.bucket.update(LEVELS, json.dumps(stored).encode(), revision=revision)
                break
            except RevisionConflict:
                continue
        try:
            self.bucket.create(f"order.{order_id}", record.encode())
        except KeyExists:
            pass
        return record


def test_what_was_there_is_taken_over_once(broker: JetStreamBroker) -> None:
    """Pieces, and decisions that had not reached their records; another start changes nothing."""
    bucket = broker.bucket("stock")
    Earlier(bucket).open("o-1", wanted(A=2))
    stored = {"pieces": {"A": 1, "B": 4}, "pending": {"o-2": wanted(A=2).to_json()}}
    entry = bucket.get(LEVELS)
    assert entry is not None
    bucket.update(LEVELS, json.dumps(stored).encode(), revision=entry.revision)
    stock = Stock(bucket, INITIAL, lambda: 1_000)
    assert stock.available() == {"A": 1, "B": 4}
    found = stock.find("o-2")
    assert found is not None
    assert found.record == wanted(A=2)
    assert stock.open("o-2", wanted(A=2)).record == found.record
    assert stock.open("o-3", wanted(A=1)).record.state == "held"
    assert Stock(bucket, INITIAL, lambda: 1_000).available() == {"A": 0, "B": 4}


@pytest.mark.parametrize("new", [True, False])
def test_an_earlier_worker_changes_nothing_after_it(broker: JetStreamBroker, new: bool) -> None:
    """It fails before it writes, sees what it has decided, and shows what there was; a new store is closed as well."""
    bucket = broker.bucket("stock")
    earlier = Earlier(bucket)
    if not new:
        earlier.open("o-1", wanted(A=1))
    stock = Stock(bucket, INITIAL, lambda: 1_000)
    left = stock.available()
    with pytest.raises(TypeError):
        earlier.open("o-2", wanted(A=1))
    assert stock.available() == left == earlier.available()
    assert stock.find("o-2") is None
    if not new:
        assert earlier.open("o-1", wanted(A=1)).state == "held"


@given(chance=st.randoms(use_true_random=False), crashes=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_old_and_new_workers_side_by_side(chance: random.Random, crashes: int) -> None:
    """Orders reserved by workers of both versions while the key is taken over, killed at any effect: none leaks."""
    world = World()
    bucket = FakeBucket(world.pause)
    orders = {f"o-{number}": wanted(A=1, **({"B": 1} if number % 2 else {})) for number in range(4)}
    pending = [(order_id, old) for order_id in orders for old in (True, False)]
    running: list[tuple[Task, tuple[str, bool]]] = []

    def reserve(order_id: str, old: bool) -> None:
        try:
            if old:
                Earlier(bucket).open(order_id, orders[order_id])
            else:
                Stock(bucket, INITIAL, lambda: 1_000).open(order_id, orders[order_id])
        except TypeError:
            assert old
            pending.append((order_id, False))  # tried again until another worker takes it

    while running or pending:
        if pending and len(running) < 4:
            work = pending.pop(chance.randrange(len(pending)))
            running.append((world.start("reserve", lambda work=work: reserve(*work)), work))
        position = chance.randrange(len(running))
        task, work = running[position]
        crash = crashes > 0 and chance.random() < 0.1
        crashes -= crash
        world.step(task, crash=crash)
        if task.done:
            running.pop(position)
            if crash:
                pending.append(work)
    assert Stock(bucket, INITIAL, lambda: 1_000).available() == {"A": 1, "B": 2}
    for order_id, record in orders.items():
        entry = bucket.get(f"order.{order_id}")
        assert entry is not None
        assert Record.decode(entry.value) == record
