"""Accepting orders with idempotency keys, on a real bucket: one key is one order, whatever goes wrong between."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from operator import and_, or_

import pytest
from cryptography.fernet import Fernet
from google.protobuf.message import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import StoreTimeout
from orders.v1.events_pb2 import OrderCreated
from tasks.accept import Acceptance, new_order_id
from tasks.claims import Claim
from tasks.events import Happened, event_id, usable_order_id
from tasks.idempotency import Requests
from tasks.model import (
    IdempotencyConflict,
    IdempotencyInProgress,
    InvalidOrder,
    OrderArchived,
    OrderIdTaken,
    OrderRequest,
    RequestedItem,
)
from tasks.orders import Orders, Recorded
from tasks.products import Catalogue
from tasks.projection import Projection
from tasks.stock import Stock
from tasks.tokens import Tokens, reference
from tests.tasks.fakes import NO_HEADERS, FakeBucket, Headers

LEASE = 1_000


def now() -> int:
    return time.time_ns() // 1_000_000


class FakeStream:
    """Stands for the stream: keeps what is published, or fails as it is told, before or after."""

    def __init__(self) -> None:
        self.published: list[OrderCreated] = []
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def __call__(
        self, event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS
    ) -> int:
        assert isinstance(event, OrderCreated)
        self.before()
        if event not in self.published:
            self.published.append(event)
        place = 1 + self.published.index(event)
        self.after()
        return place


class InMemory:
    """Buckets by name, as a broker has them, in memory."""

    def __init__(self) -> None:
        self.buckets: dict[str, FakeBucket] = {}

    def bucket(self, name: str, *, ttl: int | None = None) -> FakeBucket:
        return self.buckets.setdefault(name, FakeBucket())


class Front:
    """One front-end process; several share the buckets and the stream."""

    def __init__(
        self, broker: JetStreamBroker | InMemory, stream: FakeStream, clock: Callable[[], int] = now
    ) -> None:
        requests = Requests(broker.bucket("requests", ttl=60_000), lease=LEASE, now=clock)
        stock = Stock(broker.bucket("stock"), {}, clock)
        self.orders = Orders(broker.bucket("orders"))
        self.catalogue = catalogue = Catalogue(broker.bucket("stock")).load()
        projection = Projection(stock, self.orders, catalogue, clock)

        def project(place: int, claim: Claim) -> Recorded | None:
            return projection.project(Happened(stream.published[place - 1], place, 1_000), claim)

        self.tokens = Tokens(broker.bucket("tokens"), [Fernet.generate_key().decode()], ttl=60_000)
        self.acceptance = Acceptance(
            *(requests, stock.claims, catalogue, self.orders, self.tokens, stream, project),
            timeout=2_000,
            now=clock,
        )

    def accept(self, key: str | None, quantity: int = 1, **members: str) -> tuple[str, bool]:
        request = OrderRequest("c-1", [RequestedItem("MUG-01", quantity)], **members)
        accepted = self.acceptance.accept(request, key)
        return accepted.order_id, accepted.repeated


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
def front(broker: JetStreamBroker, stream: FakeStream) -> Front:
    return Front(broker, stream)


def fail() -> None:
    raise StoreTimeout("no acknowledgement")


def test_event_of_an_accepted_order(front: Front, stream: FakeStream) -> None:
    """The event is priced by the catalogue and complete."""
    order_id, repeated = front.accept(None, 2, payment_token="tok")
    (event,) = stream.published
    assert not repeated
    assert (event.order_id, event.customer_id, event.payment_token) == (
        order_id,
        "c-1",
        reference("c-1", "tok"),
    )
    assert front.tokens.find(order_id, event.payment_token) == "tok"
    assert (event.total_amount, event.total_minor, event.currency) == (25.8, 2580, "EUR")
    assert [(i.sku, i.quantity, i.unit_price_minor) for i in event.items] == [("MUG-01", 2, 1290)]
    assert event.HasField("created_at")
    assert event_id(event) == f"{order_id}.created"


def test_without_a_key_each_request_is_an_order(front: Front) -> None:
    """Two equal requests without a key are two orders."""
    assert front.accept(None)[0] != front.accept(None)[0]


def test_same_key_and_body_is_one_order(broker: JetStreamBroker, front: Front, stream: FakeStream) -> None:
    """The second request gets the first one's answer, also from another process."""
    order_id, repeated = front.accept("k")
    assert not repeated
    assert front.accept("k") == (order_id, True)
    assert Front(broker, stream).accept("k") == (order_id, True)
    assert len(stream.published) == 1


def test_same_key_and_other_body_is_refused(front: Front, stream: FakeStream) -> None:
    """A key stands for what it was first used for."""
    front.accept("k", 1)
    with pytest.raises(IdempotencyConflict):
        front.accept("k", 2)
    assert len(stream.published) == 1


def test_chosen_order_id_is_a_key_of_its_own(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """An order id that the client chose makes the request repeatable without a key."""
    assert front.accept(None, order_id="o-1") == ("o-1", False)
    assert Front(broker, stream).accept(None, order_id="o-1") == ("o-1", True)
    with pytest.raises(OrderIdTaken):
        front.accept(None, 5, order_id="o-1")
    assert front.accept("order:o-1")[0] != "o-1"


@pytest.mark.parametrize(("key", "chosen"), [("k", None), ("k", "o-1"), (None, "o-1")])
def test_a_repetition_of_an_archived_order_is_told_so(key: str | None, chosen: str | None) -> None:
    """Also in another process, while the first one's lease lasts; nothing is published, and the id is the order's."""
    broker, stream = InMemory(), FakeStream()
    members = {} if chosen is None else {"order_id": chosen}
    order_id, _ = Front(broker, stream).accept(key, **members)
    claim = broker.bucket("stock").get(f"claim.{order_id}")
    assert claim is not None
    closed = Claim.decode(claim.value).archived.encode()
    broker.bucket("stock").update(claim.key, closed, revision=claim.revision)
    broker.bucket("orders").delete(order_id)
    again = Front(broker, stream)
    for _ in range(2):
        with pytest.raises(
            OrderArchived, match=f"^order {order_id} was placed and has left for the archive$"
        ):
            again.accept(key, **members)
    assert key is None or again.acceptance.was_placed(key)
    if chosen is not None:
        with pytest.raises(OrderArchived):
            again.accept("other", 5, **members)
    assert len(stream.published) == 1
    assert order_id not in broker.bucket("orders").entries


@pytest.mark.parametrize("keys", [(None, None), ("a", "b"), (None, "b"), ("a", None)])
def test_an_order_id_has_one_content(
    broker: JetStreamBroker, front: Front, stream: FakeStream, keys: tuple[str | None, str | None]
) -> None:
    """The second order under an id is refused, whatever its key and although the first is not stored yet."""

    def second() -> None:
        for quantity, token in ((9, None), (1, "tok_other")):
            with pytest.raises(OrderIdTaken):
                Front(broker, stream).acceptance.accept(
                    OrderRequest("c-1", [RequestedItem("MUG-01", quantity)], token, order_id="o-1"),
                    keys[1] and f"{keys[1]}{quantity}",
                )

    stream.before = second
    assert front.accept(keys[0], order_id="o-1") == ("o-1", False)
    stream.before = lambda: None
    second()
    assert [event.items[0].quantity for event in stream.published] == [1]


@pytest.mark.parametrize("skew", [-70_000, 3_000, 10**9])
def test_an_accepted_order_is_found_whatever_the_clock(
    broker: JetStreamBroker, stream: FakeStream, skew: int
) -> None:
    """It is readable when it is accepted, under an id that was chosen or made."""
    front = Front(broker, stream, lambda: now() + skew)
    for members in ({}, {"order_id": "o-chosen"}):
        order_id, _ = front.accept(None, **members)
        order = front.orders.get(order_id)
        assert order is not None
        assert (order.status, order.customer_id, order.total) == ("accepted", "c-1", 1_290)


def test_an_order_that_cannot_be_read_back_is_not_accepted(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """The acknowledgement names a place at which another event stands: no 202, and no order."""
    stream.published.append(OrderCreated(order_id="o-1", customer_id="c-9"))
    stream.after = stream.published.reverse
    with pytest.raises(StoreTimeout):
        front.accept(None, order_id="o-1")
    assert front.orders.get("o-1") is None


@pytest.mark.parametrize("moment", ["before", "after"])
def test_retry_after_a_failed_publish(front: Front, stream: FakeStream, moment: str) -> None:
    """No acknowledgement: the next try in the same process publishes the same order at once."""
    setattr(stream, moment, fail)
    with pytest.raises(StoreTimeout):
        front.accept("k")
    setattr(stream, moment, lambda: None)
    order_id, repeated = front.accept("k")
    assert not repeated
    assert {event.order_id for event in stream.published} == {order_id}
    assert front.accept("k") == (order_id, True)


def test_retry_after_a_crash_in_another_process(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """The process died between key and event: another one answers 'in progress' first, then takes over."""

    def die() -> None:
        raise SystemExit

    stream.before = die
    with pytest.raises(SystemExit):
        front.accept("k")
    stream.before = lambda: None
    other = Front(broker, stream)
    with pytest.raises(IdempotencyInProgress) as refusal:
        other.accept("k")
    assert refusal.value.retry_after == 1
    deadline = time.monotonic() + 10
    while True:
        try:
            order_id, repeated = other.accept("k")
            break
        except IdempotencyInProgress:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not repeated
    assert [event.order_id for event in stream.published] == [order_id]


def test_second_request_while_the_first_runs(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """A request with a key that is being worked on is told so, in this process and in another."""
    entered, leave = threading.Event(), threading.Event()

    def linger() -> None:
        entered.set()
        assert leave.wait(30)

    stream.before = linger
    with ThreadPoolExecutor() as pool:
        first = pool.submit(front.accept, "k")
        assert entered.wait(30)
        with pytest.raises(IdempotencyInProgress):
            front.accept("k")
        with pytest.raises(IdempotencyInProgress):
            Front(broker, stream).accept("k")
        leave.set()
        order_id, _ = first.result(10)
    stream.before = lambda: None
    assert front.accept("k") == (order_id, True)
    assert len(stream.published) == 1


def test_forty_requests_at_once(broker: JetStreamBroker, stream: FakeStream) -> None:
    """Forty equal requests through four processes: one order, and every other answer is a repetition or a wait."""
    fronts = [Front(broker, stream) for _ in range(4)]

    def accept(number: int) -> str | None:
        try:
            return fronts[number % 4].accept("k")[0]
        except IdempotencyInProgress:
            return None

    with ThreadPoolExecutor(40) as pool:
        answers = set(pool.map(accept, range(40)))
    assert len(stream.published) == 1
    assert answers - {None} == {stream.published[0].order_id}


def test_unknown_sku_is_refused_before_anything_is_written(front: Front, stream: FakeStream) -> None:
    """A request built by hand is checked as well."""
    with pytest.raises(InvalidOrder, match=r"items\[0\].sku"):
        front.acceptance.accept(OrderRequest("c-1", [RequestedItem("NOPE", 1)]), "k")
    assert stream.published == []
    front.accept("k")


def test_order_ids_are_uuids_of_their_time() -> None:
    """A new id is usable, is a UUID of version 7, and sorts by the milliseconds with which it begins."""
    moments = (1, 1_763_000_000_000, 2**48 - 1)
    ids = [new_order_id(at) for at in moments]
    assert ids == sorted(ids)
    for order_id, at in zip(ids, moments, strict=True):
        found = uuid.UUID(order_id)
        assert usable_order_id(order_id)
        assert (str(found), found.version, found.variant, found.int >> 80) == (order_id, 7, uuid.RFC_4122, at)


def test_order_ids_of_one_moment_differ_in_every_bit() -> None:
    """All 74 bits are random that are neither time nor version nor variant."""
    values = [uuid.UUID(new_order_id(1)).int for _ in range(200)]
    ever = reduce(or_, values)
    always = reduce(and_, values)
    assert (ever ^ always).bit_count() == 74


def test_an_order_that_is_not_accepted_in_time_is_told(front: Front, stream: FakeStream) -> None:
    """The stream gets the time that is left, and what comes later is not confirmed."""
    given: list[int | None] = []

    def late(event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS) -> int:
        given.append(timeout)
        time.sleep(0.3)
        return stream(event, at, timeout=timeout)

    front.acceptance._publish = late  # type: ignore[assignment]
    front.acceptance._timeout = 250
    with pytest.raises(StoreTimeout, match=r"^the order was not accepted within 250 ms\.$"):
        front.accept("k")
    (timeout,) = given
    assert timeout is not None
    assert 1 <= timeout <= 250


def test_the_event_has_the_time_of_the_first_request(broker: JetStreamBroker, stream: FakeStream) -> None:
    """A try after a failed one stores what the first one would have, its time included."""
    clock = iter(range(1_000_000, 2_000_000, 1_000))
    front = Front(broker, stream, lambda: next(clock))
    times: list[int] = []

    def publish(event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS) -> int:
        times.append(at)
        if len(times) == 1:
            fail()
        return stream(event, at, timeout=timeout)

    front.acceptance._publish = publish  # type: ignore[assignment]
    with pytest.raises(StoreTimeout):
        front.accept("k")
    front.accept("k")
    assert times[0] == times[1]
    assert stream.published[0].created_at.ToMilliseconds() == times[0]


def test_a_repetition_shows_the_order_as_it_was_accepted(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """Whatever has become of it since."""
    first = front.acceptance.accept(OrderRequest("c-1", [RequestedItem("MUG-01", 1)]), "k").order
    orders = front.orders
    moved = replace(
        first,
        status="rejected",
        reason="out of stock",
        history=[*first.history, replace(first.history[0], event="rejected")],
    )
    orders.get = lambda _: moved  # type: ignore[method-assign]
    again = front.acceptance.accept(OrderRequest("c-1", [RequestedItem("MUG-01", 1)]), "k")
    assert again.repeated
    assert again.order == first
    assert [entry.event for entry in again.order.history] == ["created"]


def test_what_is_told_of_a_taken_id_and_of_an_unreadable_order(
    broker: JetStreamBroker, front: Front, stream: FakeStream
) -> None:
    """Both name the order."""
    front.accept(None, order_id="o-1")
    with pytest.raises(OrderIdTaken, match=r"^another order has the id o-1$"):
        front.accept(None, 2, order_id="o-1")
    front.acceptance._project = lambda *_: None
    with pytest.raises(StoreTimeout, match=r"^order o-2 is stored and cannot be read as it is now\.$"):
        front.accept(None, order_id="o-2")


def test_a_request_by_key_is_known_as_placed_once_its_order_is_there(front: Front) -> None:
    """Neither a key that was never used nor one whose order was not stored."""
    assert not front.acceptance.was_placed("k")
    front.accept("k")
    assert front.acceptance.was_placed("k")
    assert not front.acceptance.was_placed("other")
