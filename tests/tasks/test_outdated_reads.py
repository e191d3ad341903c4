"""Steps in a cluster where one server does not know yet that it is not the leader: it answers with what was."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from dramatiq_jetstream.errors import RevisionConflict
from orders.v1.events_pb2 import OrderDeclined, OrderPaid, OrderReserved
from tasks.events import UnusableEvent, name_of
from tasks.ledger import Record
from tasks.orders import Orders
from tasks.products import Catalogue
from tasks.saga import Saga
from tasks.stock import Stock
from tests.tasks.fakes import FakeBucket, FakeEntry, FakeGateway, FakeStream, fake_tokens
from tests.tasks.test_saga_properties import INITIAL, created

KEY = "order.o-1"


class Deposed(FakeBucket):
    """A bucket where a server that is behind answers first: some reads, and one refusal of a write."""

    def __init__(self) -> None:
        super().__init__()
        self.outdated: list[FakeEntry | None] = []
        self.refuses = False

    def get(self, key: str, *, linearizable: bool = False) -> FakeEntry | None:
        if key == KEY and self.outdated and not linearizable:
            return self.outdated.pop()
        return super().get(key)

    def update(self, key: str, value: bytes, *, revision: int, ttl: int | None = None) -> int:
        stored = super().update(key, value, revision=revision, ttl=ttl)
        if key == KEY and self.refuses:
            self.refuses = False
            raise RevisionConflict(key)
        return stored


class Service:
    def __init__(self, token: str = "tok_ok") -> None:
        self.bucket, self.gateway, self.stream = Deposed(), FakeGateway(), FakeStream()
        self.clock = itertools.count(1_000)
        self.tokens = fake_tokens()
        self.catalogue = Catalogue(FakeBucket()).load()
        self.saga().reserve(created("o-1", [("MUG-01", 2)], token))

    def saga(self) -> Saga:
        """The steps in a process that remembers nothing."""
        now: Callable[[], int] = lambda: next(self.clock)  # noqa: E731
        stock = Stock(self.bucket, INITIAL, now)
        return Saga(
            *(stock, self.gateway, self.tokens, self.stream, Orders(FakeBucket()), self.catalogue, now)
        )

    @property
    def record(self) -> FakeEntry:
        return self.bucket.entries[KEY]

    @property
    def state(self) -> str:
        return Record.decode(self.record.value).state

    @property
    def events(self) -> list[str]:
        return [name_of(stored.event) for stored in self.stream.stored]


PAY = OrderReserved(order_id="o-1")


@pytest.mark.parametrize("outdated", [0, 1])
def test_a_payment_that_is_said_to_be_refused_is_announced(outdated: int) -> None:
    """The record was written, and that is what counts; the event must not be forgotten."""
    service = Service()
    service.bucket.refuses = True
    held = service.record
    service.bucket.outdated = [held] * (outdated + 1)
    service.saga().pay(PAY)

    assert (service.state, service.events) == ("confirmed", ["reserved", "paid", "confirmed"])
    assert service.gateway.captured == ["o-1"]


@pytest.mark.parametrize("missing", [True, False])
def test_a_record_that_is_behind_its_event_is_read_again(missing: bool) -> None:
    """The event is not thrown away for it."""
    service = Service()
    before = None if missing else service.record
    service.saga().pay(PAY)
    service.bucket.outdated = [before]
    service.saga().confirm(OrderPaid(order_id="o-1"))

    assert (service.state, service.events) == ("confirmed", ["reserved", "paid", "confirmed"])


def test_stock_is_given_back_although_the_record_was_behind() -> None:
    service = Service("tok_declined")
    held = service.record
    service.saga().pay(PAY)
    declined = service.record
    service.bucket.outdated = [held, declined]  # the last is read first
    service.saga().release(OrderDeclined(order_id="o-1"))

    assert (service.state, service.events) == ("released", ["reserved", "declined", "rejected"])


def test_an_event_of_an_order_that_never_was_is_still_unusable() -> None:
    with pytest.raises(UnusableEvent):
        Service().saga().confirm(OrderPaid(order_id="o-2"))
