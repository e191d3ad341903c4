"""A rebuild of the read model, killed at any moment and beside workers: no record is ever behind what it was."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tasks.rebuild
from dramatiq_jetstream.streams import Range
from orders.v1.events_pb2 import OrderConfirmed, OrderPaid
from tasks.events import Happened
from tasks.rebuild import Rebuild, Summary
from tests.tasks.fakes import FakeEntry
from tests.tasks.test_saga_properties import Service, created

Records = dict[str, dict[str, Any]]


class Events:
    """The stream of a `Service`, as a rebuild reads it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def range(self) -> Range:
        return Range(1, len(self._service.stream.stored))

    def read(self, start: int) -> Iterator[Happened]:
        for stored in self._service.stream.stored[start - 1 :]:
            yield Happened(stored.event, stored.sequence, 1_000 + stored.sequence)


def shop(count: int) -> Service:
    """Return a service whose orders are over, one of them after a failure, with events of strangers between."""
    service = Service(window=False)
    for number in range(count):
        token = ("tok_ok", "tok_declined")[number % 2]
        service.stream.append(created(f"o-{number}", [("MUG-01", 1 + number % 3)], token))
        if number % 3 == 0:
            service.stream.append(OrderPaid(order_id=f"o-{number}", charge_id="forged"))
            service.stream.append(created(f"o-{number}", [("TEE-01", 1)], "forged"))
    service.deliver_new()
    service.saga().fail("o-0", "pay", "the gateway is down", "m-1")
    service.finish()
    service.stream.append(OrderConfirmed(order_id="o-1", charge_id="forged"))
    service.deliver_new()
    service.finish()
    return service


def rebuild(service: Service) -> Summary:
    return Rebuild(
        service.orders_bucket,
        service.stock(),
        Events(service),  # type: ignore[arg-type]
        service.catalogue,
        lambda done, of: None,
        service.now,
    ).run()


def records(service: Service) -> Records:
    return {key: json.loads(entry.value) for key, entry in service.orders_bucket.entries.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders whose events are further apart than a rebuild holds in memory."""
    monkeypatch.setattr(tasks.rebuild, "_CHUNK", 3)


def test_right_records_are_left_alone() -> None:
    """Nothing is written, although events of strangers lie between those that count."""
    service = shop(8)
    before = dict(service.orders_bucket.entries)
    said = rebuild(service)
    assert (said.written, said.unchanged, said.removed) == (0, 8, 0)
    assert service.orders_bucket.entries == before


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_no_record_is_taken_back(seed: int) -> None:
    """Killed between any two effects and begun again, while workers project events that come again."""
    chance = random.Random(seed)
    service = shop(6)
    whole = records(service)
    spoilt = {order_id for order_id in whole if chance.random() < 0.5}
    for order_id in spoilt:
        spoil(service, order_id, chance)
    kept = {order_id: entry for order_id, entry in whole.items() if order_id not in spoilt}
    for last in (False, False, False, False, True):
        task = service.world.start("rebuild", lambda: rebuild(service))
        while not task.done:
            if chance.random() < 0.2:
                stored = chance.choice(service.stream.stored)
                worker = service.world.start("project", lambda stored=stored: service.project(stored))
                while not worker.done:
                    service.world.step(worker)
            service.world.step(task, crash=not last and chance.random() < 0.05)
            now = records(service)
            assert {order_id: now.get(order_id) for order_id in kept} == kept
    assert records(service) == whole
    assert rebuild(service).written == 0


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_records_go_forward_beside_the_service(seed: int) -> None:
    """While orders are carried on, no record loses an event, whatever the rebuild and the workers do in between."""
    chance = random.Random(seed)
    service = Service(window=False)
    for number in range(4):
        service.stream.append(created(f"o-{number}", [("MUG-01", 1)], ("tok_ok", "tok_declined")[number % 2]))
    service.deliver_new()
    rebuilding = service.world.start("rebuild", lambda: rebuild(service))
    before = records(service)
    while service.running or service.pending:
        if service.pending and len(service.running) < 4:
            service.start(service.pending.pop(chance.randrange(len(service.pending))))
        if rebuilding.done:
            rebuilding = service.world.start("rebuild", lambda: rebuild(service))
        if chance.random() < 0.5:
            service.world.step(rebuilding, crash=chance.random() < 0.02)
        else:
            service.go_on(chance.randrange(len(service.running)))
        now = records(service)
        for order_id, record in before.items():
            assert record["events"].keys() <= now[order_id]["events"].keys()
        before = now
    while not rebuilding.done:
        service.world.step(rebuilding)
    assert rebuild(service).written == 0
    service.check_end({f"o-{number}" for number in range(4)})


def spoil(service: Service, order_id: str, chance: random.Random) -> None:
    """Delete a record, make it wrong, or make it no record at all."""
    entry = service.orders_bucket.entries.pop(order_id)
    record = json.loads(entry.value)
    match chance.randrange(4):
        case 0:
            return
        case 1:
            record = {**record, "customer_id": "falsified", "total": 1, "items": []}
        case 2:
            record["events"].pop(chance.choice(list(record["events"])))
            record["events"]["confirmed"] = {"sequence": 1, "at": 0, "charge_id": "falsified"}
        case 3:
            record = {"events": {"created": {"sequence": "one"}}, "currency": "NOPE"}
    value = json.dumps(record).encode()
    service.orders_bucket.entries[order_id] = FakeEntry(order_id, value, entry.revision)
