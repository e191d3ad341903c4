"""Accepting orders, step by step, on buckets in memory and with clocks of the test's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from google.protobuf.message import Message

from dramatiq_jetstream.errors import StoreTimeout
from tasks import accept
from tasks.accept import new_order_id
from tasks.claims import Claim, digest_of
from tasks.model import (
    IdempotencyConflict,
    InvalidOrder,
    Order,
    OrderIdTaken,
    OrderRequest,
    RequestedItem,
)
from tasks.orders import Recorded
from tasks.products import PREFIX, Price, StoredProduct
from tasks.tokens import reference
from tests.tasks.fakes import NO_HEADERS, Headers
from tests.tasks.test_accepting import FakeStream, Front, InMemory, fail

NOW = 1_763_000_000_000
NO_SUCH = "names no product: there is no 'NOPE' in the catalogue."


class Clock:
    """The time of day in milliseconds, and the seconds of a clock that is never set."""

    def __init__(self) -> None:
        self.now = NOW
        self.seconds = 1_000.0

    def __call__(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accept, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
def memory() -> InMemory:
    return InMemory()


@pytest.fixture
def front(memory: InMemory, stream: FakeStream, clock: Clock) -> Front:
    return Front(memory, stream, clock)


def wanting(*skus: str, **members: str) -> OrderRequest:
    return OrderRequest("c-1", [RequestedItem(sku, 1) for sku in skus], **members)  # type: ignore[arg-type]


def change(memory: InMemory, sku: str, *prices: Price) -> None:
    """Have another process change a product; this one has not heard of it."""
    bucket = memory.bucket("stock")
    stored = bucket.entries.get(f"{PREFIX}{sku}")
    if stored is None:
        product = StoredProduct(sku, ((0, sku),), "", prices)
        bucket.create(f"{PREFIX}{sku}", product.encode())
    else:
        product = StoredProduct.decode(sku, stored.value)
        product = replace(product, prices=(*product.prices, *prices))
        bucket.update(f"{PREFIX}{sku}", product.encode(), revision=stored.revision)


# The event


def test_what_is_published_is_what_was_claimed(
    front: Front, memory: InMemory, stream: FakeStream, clock: Clock
) -> None:
    """Under an id that begins with the time of the request; without a token nothing is kept, and none is named."""
    accepted = front.acceptance.accept(wanting("MUG-01"), None)
    (event,) = stream.published
    assert event.order_id == accepted.order_id
    assert int(accepted.order_id.replace("-", "")[:12], 16) == NOW
    assert event.created_at.ToMilliseconds() == NOW
    assert event.payment_token == ""
    assert memory.bucket("tokens").entries == {}
    assert not accepted.repeated
    assert (accepted.order.status, accepted.order.reason, accepted.order.place) == ("accepted", None, 1)


def test_a_token_is_kept_before_the_event_names_it(front: Front, stream: FakeStream) -> None:
    found: list[str | None] = []
    stream.before = lambda: found.append(front.tokens.find("o-1", reference("c-1", "tok")))
    front.accept(None, order_id="o-1", payment_token="tok")
    assert found == ["tok"]
    assert stream.published[0].payment_token == reference("c-1", "tok")


def test_the_digest_is_that_of_the_content(front: Front, memory: InMemory) -> None:
    """With the token's reference, none without one, and each product once."""
    claims = front.acceptance._claims
    front.acceptance.accept(wanting("MUG-01", "MUG-01", "TEE-01", order_id="o-1"), None)
    front.acceptance.accept(wanting("MUG-01", order_id="o-2", payment_token="tok"), None)
    for order_id, quantities, token in (
        ("o-1", {"MUG-01": 2, "TEE-01": 1}, ""),
        ("o-2", {"MUG-01": 1}, reference("c-1", "tok")),
    ):
        claim = claims.find(order_id)
        assert claim is not None
        assert (claim.digest, claim.customer_id) == (digest_of("c-1", quantities, token), "c-1")


@pytest.mark.parametrize(
    ("elapsed", "timeout"), [(0.0, 2_000), (1.0, 1_000), (1.875, 200), (1_023 / 512, 200), (2.0, None)]
)
def test_the_stream_gets_what_is_left_of_the_time(
    front: Front,
    memory: InMemory,
    stream: FakeStream,
    clock: Clock,
    elapsed: float,
    timeout: int | None,
) -> None:
    """A little at least, while any is left; without any nothing is published."""
    given: list[tuple[int, int | None]] = []

    def publish(event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS) -> int:
        given.append((at, timeout))
        return stream(event, at, timeout=timeout)

    def go_on(where: str) -> None:
        if where.startswith("after update of claim."):
            clock.seconds += elapsed

    front.acceptance._publish = publish
    memory.bucket("stock").pause = go_on
    if timeout is None:
        with pytest.raises(StoreTimeout, match=r"^the order was not accepted within 2000 ms\.$"):
            front.accept(None)
        assert given == []
    else:
        front.accept(None)
        assert given == [(NOW, timeout)]


def test_an_order_that_was_stored_too_late_is_not_confirmed(
    front: Front, stream: FakeStream, clock: Clock
) -> None:
    """Nor read back: the client is told that it is not known, and sends its request again."""

    def late() -> None:
        clock.seconds += 2.0

    stream.after = late
    with pytest.raises(StoreTimeout, match=r"^the order was not accepted within 2000 ms\.$"):
        front.accept(None, order_id="o-1")
    assert front.orders.get("o-1") is None
    stream.after = lambda: None
    assert front.accept(None, order_id="o-1") == ("o-1", False)


def test_an_order_that_the_ledger_does_not_confirm_is_not_accepted(front: Front, stream: FakeStream) -> None:
    """Even if the read model has it, or had it a moment ago."""
    places: list[int] = []

    def refuse(place: int, claim: Claim) -> Recorded | None:
        places.append(place)
        return None

    order = front.acceptance.accept(wanting("MUG-01", order_id="o-1"), None).order
    front.acceptance._project = refuse
    front.orders.get = lambda order_id: replace(order, history=[])  # type: ignore[method-assign]
    with pytest.raises(StoreTimeout, match=r"^order o-1 is stored and cannot be read as it is now\.$"):
        front.acceptance.accept(wanting("MUG-01", order_id="o-1"), None)
    assert places == [1]


# Repetitions


def test_a_repetition_publishes_nothing_and_shows_what_the_first_showed(
    front: Front, stream: FakeStream
) -> None:
    """By its key or its id; whatever has become of the order since."""
    for number, (request, key) in enumerate(
        [(wanting("MUG-01"), "k"), (wanting("MUG-01", order_id="o-1"), None)], start=1
    ):
        first = front.acceptance.accept(request, key)
        get = front.orders.get

        def moved(order_id: str) -> Order | None:
            order = get(order_id)  # noqa: B023
            assert order is not None
            rejected = replace(order.history[0], event="rejected")
            return replace(order, status="rejected", reason="short", history=[*order.history, rejected])

        front.orders.get = moved  # type: ignore[method-assign]
        again = front.acceptance.accept(request, key)
        front.orders.get = get  # type: ignore[method-assign]
        assert (first.repeated, again.repeated) == (False, True)
        assert again.order == first.order
        assert again.order.status == "accepted"
        assert len(stream.published) == number


def test_an_order_without_a_place_in_the_stream_is_published_again(front: Front, stream: FakeStream) -> None:
    """It was claimed, and perhaps seen by a step; that it is stored, nothing says."""
    front.acceptance.accept(wanting("MUG-01"), "k")
    get, calls = front.orders.get, []

    def without_place(order_id: str) -> Order | None:
        calls.append(order_id)
        order = get(order_id)
        assert order is not None
        return replace(order, history=[]) if len(calls) < 3 else order

    front.orders.get = without_place  # type: ignore[method-assign]
    published: list[str] = []
    stream.before = lambda: published.append("again")
    assert not front.acceptance.accept(wanting("MUG-01"), "k").repeated
    assert published == ["again"]
    calls.clear()
    assert not front.acceptance.was_placed("k")
    calls += ["", ""]
    assert front.acceptance.was_placed("k")
    assert not front.acceptance.was_placed("other")


def test_a_key_stands_for_one_request(front: Front, stream: FakeStream) -> None:
    """All of it; and what was refused or failed leaves the key free for the same one."""
    stream.before = fail
    with pytest.raises(StoreTimeout):
        front.acceptance.accept(wanting("MUG-01"), "k")
    stream.before = lambda: None
    for other in (wanting("TEE-01"), wanting("MUG-01", payment_token="tok"), wanting("MUG-01", "MUG-01")):
        with pytest.raises(IdempotencyConflict):
            front.acceptance.accept(other, "k")
    order_id, _ = front.accept("k")
    assert [event.order_id for event in stream.published] == [order_id]


def test_the_digest_of_a_request_is_the_same_in_every_version(front: Front) -> None:
    """Two versions run side by side while one replaces the other."""
    request = OrderRequest("c-1", [RequestedItem("MUG-01", 2)], "tok", "o-1")
    said = (
        '{"customer_id": "c-1", "items": [{"quantity": 2, "sku": "MUG-01"}], '
        '"order_id": "o-1", "payment_token": "tok"}'
    )
    assert accept._digest(request) == hashlib.sha256(said.encode()).hexdigest()


def test_a_request_that_died_before_its_claim_keeps_its_time(
    front: Front, memory: InMemory, stream: FakeStream, clock: Clock
) -> None:
    """The same request, later, places what the first one would have."""

    def die(where: str) -> None:
        if where.startswith("before update of claim."):
            raise SystemExit

    memory.bucket("stock").pause = die
    with pytest.raises(SystemExit):
        front.acceptance.accept(wanting("MUG-01"), "k")
    memory.bucket("stock").pause = lambda where: None
    clock.now += 5_000
    accepted = front.acceptance.accept(wanting("MUG-01"), "k")
    assert stream.published[0].created_at.ToMilliseconds() == NOW
    assert int(accepted.order_id.replace("-", "")[:12], 16) == NOW


def test_another_order_under_an_id_is_refused(front: Front, stream: FakeStream) -> None:
    front.accept(None, order_id="o-1")
    with pytest.raises(OrderIdTaken, match=r"^another order has the id o-1$"):
        front.accept(None, 2, order_id="o-1")
    assert len(stream.published) == 1


# What is offered


def test_what_no_catalogue_can_make_right_is_refused_at_once(front: Front, stream: FakeStream) -> None:
    """The products are not read again for it."""
    looks: list[None] = []
    front.catalogue.refresh = lambda: looks.append(None)  # type: ignore[method-assign]
    items = [RequestedItem("MUG-01", 1), RequestedItem("MUG-01", 0)]
    with pytest.raises(InvalidOrder) as refusal:
        front.acceptance.accept(OrderRequest("c-1", items), None)
    assert (refusal.value.field, refusal.value.problem) == (
        "items[1].quantity",
        "must be a whole number from 1 to 1000, not 0.",
    )
    assert (looks, stream.published) == ([], [])
    with pytest.raises(InvalidOrder) as refusal:
        front.acceptance.accept(wanting("MUG-01", "NOPE"), "k")
    assert (refusal.value.field, refusal.value.problem) == ("items[1].sku", NO_SUCH)
    assert (looks, stream.published) == ([None], [])


def test_a_product_that_is_new_can_be_ordered(front: Front, memory: InMemory, stream: FakeStream) -> None:
    """Before this process has heard of it."""
    change(memory, "CUP-01", Price(NOW - 1, 500), Price(NOW + 1, 900))
    front.acceptance.accept(wanting("CUP-01"), None)
    assert [(item.sku, item.unit_price_minor) for item in stream.published[0].items] == [("CUP-01", 500)]


@pytest.mark.parametrize(("key", "order_id"), [("k", None), (None, "o-1"), ("k", "o-1")])
def test_a_repetition_is_read_with_what_the_order_was_placed_with(
    front: Front, memory: InMemory, stream: FakeStream, key: str | None, order_id: str | None
) -> None:
    """Its product is not sold any more: no other request can have it."""
    request = replace(wanting("MUG-01"), order_id=order_id)
    first = front.acceptance.accept(request, key)
    change(memory, "MUG-01", Price(NOW, None))
    front.catalogue.refresh()
    again = front.acceptance.accept(request, key)
    assert (again.order, again.repeated) == (first.order, True)
    for other_key in ("other", None):
        with pytest.raises(InvalidOrder, match=r"^items\[0\]\.sku: names no product"):
            front.acceptance.accept(wanting("MUG-01"), other_key)
    with pytest.raises(InvalidOrder) as refusal:
        front.acceptance.accept(replace(request, items=wanting("NOPE").items), key)
    assert refusal.value.problem == NO_SUCH
    with pytest.raises(InvalidOrder, match="MUG-01"):
        front.acceptance.accept(replace(request, customer_id="c-2"), key)
    assert len(stream.published) == 1


# Ids


def test_an_order_id_is_its_time_and_ten_random_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six bits of them say version and variant; of a time only 48 bits are there."""
    given: list[int] = []

    def token_bytes(number: int) -> bytes:
        given.append(number)
        return bytes.fromhex("f223e456789abcdef012")[:number]

    monkeypatch.setattr(accept.secrets, "token_bytes", token_bytes)
    assert new_order_id(0x0123456789AB) == "01234567-89ab-7223-a456-789abcdef012"
    assert new_order_id(2**48 + 1) == "00000000-0001-7223-a456-789abcdef012"
    assert given == [10, 10]
