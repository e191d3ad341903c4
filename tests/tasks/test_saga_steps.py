"""Each step of the saga by itself: what it records, publishes, charges and drops, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message

from orders.v1.events_pb2 import OrderCreated, OrderDeclined, OrderPaid, OrderReserved
from tasks.announcements import event_of, failed_event
from tasks.claims import Claims
from tasks.events import CARRIED_ON, UnusableEvent, key_of, name_of
from tasks.ledger import PricedItem, Record
from tasks.notes import GivenUp, Unsettled
from tasks.ports import Charge, Decline
from tasks.products import PREFIX, Catalogue, Price, StoredProduct
from tasks.saga import OUTCOMES, STEPS, Saga
from tasks.stock import Stock
from tasks.tokens import TokenMissing, reference
from tests.tasks.fakes import NO_HEADERS, FakeBucket, FakeEntry, FakeGateway, Headers, fake_tokens
from tests.tasks.test_saga_properties import created

ORDER = "o-1"
INITIAL = {"MUG-01": 3, "TEE-01": 2}
CREATED = created(ORDER, [("MUG-01", 2), ("TEE-01", 1)])
RESERVED, PAID, DECLINED = (kind(order_id=ORDER) for kind in (OrderReserved, OrderPaid, OrderDeclined))
SEALED = reference("c-1", "tok_ok")
LINES = (PricedItem("MUG-01", 2, 1_290), PricedItem("TEE-01", 1, 2_450))
TOTAL = 2 * 1_290 + 2_450
LONG = "\x00" + 600 * "x"
SHOWN = "\ufffd" + 498 * "x" + "…"


class Bucket(FakeBucket):
    """Notes how the order's record is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def get(self, key: str, *, linearizable: bool = False) -> FakeEntry | None:
        if key == f"order.{ORDER}":
            self.reads.append("linearizable" if linearizable else "plain")
        return super().get(key, linearizable=linearizable)


class Gateway(FakeGateway):
    """Notes what it is asked for; the test says what it answers, and what happens meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, str, str]] = []
        self.answer: Charge | Decline | None = None
        self.meanwhile: Callable[[], Any] = lambda: None

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
        self.asked.append((order_id, amount, currency, token))
        answer = self.answer or super().charge(order_id, amount, currency, token)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return answer


class Shop:
    """The steps on stores in memory; the clock stands until the test sets it, and the read model knows nothing."""

    def __init__(self) -> None:
        self.time = 1_000
        self.bucket, self.gateway, self.tokens = Bucket(), Gateway(), fake_tokens()
        self.published: list[tuple[Message, int]] = []
        self.headers: list[dict[str, str]] = []
        self.known: set[tuple[str, str]] = set()

    def now(self) -> int:
        return self.time

    def publish(
        self, event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS
    ) -> int:
        self.published.append((event, at))
        self.headers.append(dict(headers))
        return len(self.published)

    def has_event(self, order_id: str, event: str) -> bool:
        return (order_id, event) in self.known

    def stock(self) -> Stock:
        return Stock(self.bucket, INITIAL, self.now)

    def saga(self, offered_for: int | None = None) -> Saga:
        """The steps in a process that remembers nothing."""
        return Saga(
            *(self.stock(), self.gateway, self.tokens, self.publish, self),
            *(Catalogue(self.bucket).load(), self.now),
            offered_for=offered_for,
        )

    def until(self, state: str) -> Saga:
        """Bring the order to a state, one second for each step; returns the process that did so.

        An order is `paid`, and not confirmed with that, by an earlier version.
        """
        saga = self.saga()
        assert saga.reserve(CREATED) == "held"
        self.time += 1_000
        if state == "paid":
            charge = self.gateway.charge(ORDER, TOTAL, "EUR", "tok_ok")
            assert isinstance(charge, Charge)
            held = saga._stock.find(ORDER)
            assert held is not None
            paid = held.record.forward("paid", self.time, charge_id=charge.charge_id)
            saga._stock.forward(ORDER, held, paid)
            self.tokens.drop(ORDER)
            self.time += 1_000
        elif state == "confirmed":
            assert saga.pay(RESERVED) == "confirmed"
            self.time += 1_000
        self.published.clear()
        self.bucket.reads.clear()
        return saga

    def until_declined(self) -> Saga:
        self.gateway.answer = Decline("card_declined", "no")
        saga = self.until("held")
        assert saga.pay(RESERVED) == "declined"
        self.time += 1_000
        self.published.clear()
        self.bucket.reads.clear()
        return saga

    @property
    def record(self) -> Record:
        return Record.decode(self.bucket.entries[f"order.{ORDER}"].value)

    @property
    def events(self) -> list[str]:
        return [name_of(event) for event, _ in self.published]

    @property
    def token(self) -> str | None:
        return self.tokens.find(ORDER, SEALED)

    @property
    def unsettled(self) -> list[Unsettled]:
        return list(self.stock().notes.unsettled())

    def said(self, state: str, at: int) -> tuple[Message, int]:
        """What is published of a state of the order."""
        return event_of(ORDER, self.record, state), at


HELD = Record("held", {"held": 1_000}, "c-1", LINES, TOTAL, "EUR", SEALED)


@pytest.fixture
def shop() -> Shop:
    return Shop()


# Reserve


def test_reserve_holds_the_items_and_keeps_the_token(shop: Shop) -> None:
    assert shop.saga().reserve(CREATED) == "held"
    assert shop.record == HELD
    assert shop.published == [shop.said("held", 1_000)]
    assert shop.token == "tok_ok"
    assert shop.stock().available() == {"MUG-01": 1, "TEE-01": 1}


def test_an_order_that_is_short_of_stock_is_rejected_and_its_token_dropped(shop: Shop) -> None:
    assert shop.saga().reserve(created(ORDER, [("MUG-01", 4)])) == "rejected"
    reason = "4 × MUG-01 ordered, 3 in stock"
    assert shop.record == Record("rejected", {"rejected": 1_000}, code="OUT_OF_STOCK", reason=reason)
    assert shop.published == [shop.said("rejected", 1_000)]
    assert ORDER not in shop.tokens._bucket.entries  # type: ignore[attr-defined]
    assert shop.stock().available() == INITIAL


def test_reserve_that_is_repeated_holds_nothing_more(shop: Shop) -> None:
    """Its event is published again unless the read model has it."""
    shop.until("held")
    assert shop.saga().reserve(CREATED) == "held"
    assert shop.published == [shop.said("held", 1_000)]
    shop.known = {(ORDER, "reserved")}
    assert shop.saga().reserve(CREATED) == "held"
    assert len(shop.published) == 1
    assert (shop.record, shop.token) == (HELD, "tok_ok")
    assert shop.stock().available() == {"MUG-01": 1, "TEE-01": 1}


@pytest.mark.parametrize("state", ["paid", "confirmed"])
def test_reserve_that_comes_late_publishes_nothing_and_keeps_no_token(shop: Shop, state: str) -> None:
    """Whatever the read model knows."""
    shop.until(state)
    record = shop.record
    assert shop.saga().reserve(CREATED) == state
    assert (shop.published, shop.record, shop.token) == ([], record, None)


def test_an_order_without_a_token_is_none_for_the_tokens(shop: Shop) -> None:
    """Neither is one kept, nor one dropped."""
    free = created(ORDER, [("MUG-01", 1)], token="")
    shop.tokens = None  # type: ignore[assignment]
    assert shop.saga().reserve(free) == "held"
    assert shop.record.payment_token == ""
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.gateway.asked == [(ORDER, 1_290, "EUR", "")]
    assert shop.saga().reserve(free) == "confirmed"


def test_an_id_stands_for_one_order(shop: Shop) -> None:
    """An event with other contents is refused, before and after the first one was done."""
    other = created(ORDER, [("MUG-01", 1)])
    said = r"^order id o-1 stands for an order with other contents than this event's\.$"
    shop.until("held")
    with pytest.raises(UnusableEvent, match=said):
        shop.saga().reserve(other)
    assert (shop.published, shop.record) == ([], HELD)
    with pytest.raises(UnusableEvent, match="other contents"):
        shop.saga().reserve(created(ORDER, [("MUG-01", 2), ("TEE-01", 1)], token="tok_other"))
    assert shop.token == "tok_ok"


@pytest.mark.parametrize(("stored_at", "price"), [(899, 1_290), (900, 1_500), (None, 1_700)])
def test_an_order_of_another_program_costs_what_its_products_did_when_it_was_stored(
    shop: Shop, stored_at: int | None, price: int
) -> None:
    """Now, if that is not known. Its claim has the time at which it was made."""
    catalogue = Catalogue(shop.bucket).load()
    stored = shop.bucket.entries[f"{PREFIX}MUG-01"]
    product = StoredProduct.decode("MUG-01", stored.value)
    product = replace(product, prices=(*product.prices, Price(900, 1_500), Price(1_000, 1_700)))
    shop.bucket.update(stored.key, product.encode(), revision=stored.revision)
    event = OrderCreated()
    event.CopyFrom(created(ORDER, [("MUG-01", 1)]))
    event.total_amount = price / 100
    saga = Saga(shop.stock(), shop.gateway, shop.tokens, shop.publish, shop, catalogue, shop.now)
    assert saga.reserve(event, stored_at) == "held"
    assert shop.record.total == price
    claim = Claims(shop.bucket).find(ORDER)
    assert claim is not None
    assert (claim.at, claim.total) == (1_000, price)


def test_a_token_that_the_front_end_keeps_is_named_by_its_reference(shop: Shop) -> None:
    """One that names none is no token: the order is rejected, and takes nothing."""
    named = created(ORDER, [("MUG-01", 2)], token=SEALED)
    shop.tokens.keep(ORDER, "c-1", "tok_ok")
    assert shop.saga().reserve(named) == "held"
    assert shop.token == "tok_ok"
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.gateway.asked == [(ORDER, 2 * 1_290, "EUR", "tok_ok")]

    other = Shop()
    assert other.saga().reserve(named) == "rejected"
    reason = "payment_token names none that is kept here"
    assert other.record == Record("rejected", {"rejected": 1_000}, code="INVALID", reason=reason)
    assert other.published == [other.said("rejected", 1_000)]
    assert other.stock().available() == INITIAL


# Offer

MANY = created(ORDER, [("MUG-01", 4), ("TEE-01", 1)])
OFFERED = Record(
    "held", {"held": 1_000}, "c-1", (PricedItem("MUG-01", 4, 1_290), LINES[1]), 0, "EUR", SEALED
).offered({"MUG-01": 3, "TEE-01": 1}, {"MUG-01": "Enamel mug", "TEE-01": "T-shirt, organic cotton"}, 61_000)


def test_what_there_is_of_an_order_is_offered_where_offers_are_made(shop: Shop) -> None:
    """Its token is kept for the acceptance. Repeated, the event is published again unless the read model has it."""
    assert shop.saga(60_000).reserve(MANY) == "offered"
    assert shop.record == OFFERED
    assert shop.published == [shop.said("offered", 1_000)]
    assert shop.token == "tok_ok"
    for again in (None, 60_000):
        assert shop.saga(again).reserve(MANY) == "offered"
    assert shop.published == [shop.said("offered", 1_000)] * 3
    shop.known = {(ORDER, "offered")}
    assert shop.saga(60_000).reserve(MANY) == "offered"
    assert len(shop.published) == 3
    assert (shop.record, shop.token) == (OFFERED, "tok_ok")


def test_an_offer_of_nothing_is_made_at_once(shop: Shop) -> None:
    """Zero is a time as well: what there is, is offered, and has expired."""
    assert shop.saga(0).reserve(MANY) == "offered"
    assert shop.record == replace(OFFERED, expires_at=1_000)


def test_an_offer_that_was_accepted_or_cancelled_is_said_all_the_same(shop: Shop) -> None:
    """It may not have been published; of one that was cancelled no token is kept."""
    shop.saga(60_000).reserve(MANY)
    shop.saga().accept_offer(ORDER, "customer")
    shop.published.clear()
    assert shop.saga(60_000).reserve(MANY) == "held"
    assert shop.published == [shop.said("offered", 1_000), shop.said("held", 1_000)]
    assert shop.token == "tok_ok"
    shop.saga().cancel(ORDER, "changed my mind")
    shop.published.clear()
    assert shop.saga(60_000).reserve(MANY) == "cancelled"
    assert shop.published == [shop.said("offered", 1_000)]
    assert shop.token is None


def test_an_offer_is_not_charged(shop: Shop) -> None:
    """Whatever an event says; the record is read again before."""
    shop.saga(60_000).reserve(MANY)
    shop.published.clear()
    shop.bucket.reads.clear()
    for step, event, word in (
        ("pay", RESERVED, "reserved"),
        ("confirm", PAID, "paid"),
        ("release", DECLINED, "declined"),
    ):
        said = rf"^the event says that the order is {word}, but it is offered\.$"
        with pytest.raises(UnusableEvent, match=said):
            getattr(shop.saga(), step)(event)
    assert shop.bucket.reads == ["plain", "linearizable"] * 3
    assert (shop.gateway.asked, shop.published, shop.token) == ([], [], "tok_ok")


@pytest.mark.parametrize("step", ["pay", "confirm"])
def test_a_record_that_seems_to_be_an_offer_still_is_read_again(shop: Shop, step: str) -> None:
    """It was accepted, or paid, and the server that answers first is behind."""
    shop.saga(60_000).reserve(MANY)
    offered = shop.bucket.newest_revision()
    shop.saga().accept_offer(ORDER, "customer")
    if step == "confirm":
        shop.saga().pay(RESERVED)
    behind = [shop.bucket.newest_revision() - offered]
    saga = shop.saga()
    get = shop.bucket.get

    def outdated(key: str, *, linearizable: bool = False) -> FakeEntry | None:
        shop.bucket.behind = lambda: behind.pop() if behind and key == f"order.{ORDER}" else 0
        return get(key, linearizable=linearizable)

    shop.bucket.get = outdated  # type: ignore[method-assign]
    assert getattr(saga, step)(RESERVED if step == "pay" else PAID) in ("paid", "confirmed")
    assert shop.record.total == 3 * 1_290 + 2_450


# Pay


def test_pay_charges_once_confirms_and_drops_the_token(shop: Shop) -> None:
    """One write records both, and each event says what the other one does for it."""
    saga = shop.until("held")
    revision = shop.bucket.newest_revision()
    shop.headers.clear()
    assert saga.pay(RESERVED) == "confirmed"
    assert shop.gateway.asked == [(ORDER, TOTAL, "EUR", "tok_ok")]
    at = {"held": 1_000, "paid": 2_000, "confirmed": 2_000}
    assert shop.record == replace(HELD, state="confirmed", at=at, charge_id="ch_o-1")
    assert shop.bucket.newest_revision() == revision + 1
    assert shop.published == [shop.said("paid", 2_000), shop.said("confirmed", 2_000)]
    assert shop.headers == [{CARRIED_ON: "1"}, {}]
    assert shop.token is None
    assert shop.unsettled == []
    assert shop.bucket.reads == ["plain"]


def test_a_decline_is_recorded_as_it_can_be_shown(shop: Shop) -> None:
    """The gateway's words may be long, or of any characters."""
    saga = shop.until("held")
    shop.gateway.answer = Decline(LONG, LONG)
    assert saga.pay(RESERVED) == "declined"
    at = {"held": 1_000, "declined": 2_000}
    assert shop.record == replace(HELD, state="declined", at=at, code=SHOWN, reason=SHOWN)
    assert shop.published == [shop.said("declined", 2_000)]
    assert shop.token is None
    assert shop.unsettled == []


def test_pay_that_is_repeated_charges_nothing_more(shop: Shop) -> None:
    """Its events are published again unless the read model has them, and its token dropped once more."""
    shop.until("confirmed")
    record = shop.record
    shop.tokens.keep(ORDER, "c-1", "tok_ok")
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.published == [shop.said("paid", 2_000), shop.said("confirmed", 2_000)]
    shop.known = {(ORDER, "paid")}
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.published[2:] == [shop.said("confirmed", 2_000)]
    assert shop.headers[-1] == {}, "the place of the other one is not known here"
    shop.known |= {(ORDER, "confirmed")}
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert len(shop.published) == 3
    assert (len(shop.gateway.asked), shop.record, shop.token) == (1, record, None)


def test_pay_that_is_repeated_confirms_what_an_earlier_version_left_paid(shop: Shop) -> None:
    """Whether its event was published is not known."""
    shop.until("paid")
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.record.at == {"held": 1_000, "paid": 2_000, "confirmed": 3_000}
    assert shop.published == [shop.said("paid", 2_000), shop.said("confirmed", 3_000)]
    other = Shop()
    other.until("paid")
    other.known = {(ORDER, "paid")}
    assert other.saga().pay(RESERVED) == "confirmed"
    assert other.published == [other.said("confirmed", 3_000)]
    assert len(other.gateway.asked) == 1


def test_pay_that_is_repeated_after_a_decline_says_so_until_the_order_is_rejected(shop: Shop) -> None:
    shop.until_declined()
    assert shop.saga().pay(RESERVED) == "declined"
    assert shop.published == [shop.said("declined", 2_000)]
    shop.saga().release(DECLINED)
    shop.published.clear()
    assert shop.saga().pay(RESERVED) == "released"
    assert shop.published == []
    assert len(shop.gateway.asked) == 1


def test_an_order_that_was_cancelled_is_not_charged(shop: Shop) -> None:
    """Not by the process either that remembers it as held."""
    saga = shop.until("held")
    shop.saga().cancel(ORDER, "changed my mind")
    shop.tokens.keep(ORDER, "c-1", "tok_ok")
    shop.published.clear()
    assert saga.pay(RESERVED) == "cancelled"
    assert (shop.gateway.asked, shop.published, shop.token) == ([], [], None)


@pytest.mark.parametrize("answer", [Charge("ch_o-1"), Decline("card_declined", "no")])
def test_a_charge_that_was_overtaken_by_a_cancel_is_owed(shop: Shop, answer: Charge | Decline) -> None:
    """It is looked at at once; a decline leaves the note of the cancel as it was."""
    saga = shop.until("held")
    shop.gateway.answer = answer
    shop.gateway.meanwhile = lambda: shop.saga().cancel(ORDER, "changed my mind")
    assert saga.pay(RESERVED) == "cancelled"
    assert "paid" not in shop.events
    assert "declined" not in shop.events
    looked_at = 0 if isinstance(answer, Charge) else 2_000
    assert shop.unsettled == [Unsettled(ORDER, 2_000, looked_at)]
    assert shop.token is None


def test_a_charge_that_was_overtaken_is_noted_although_the_cancel_was_cut(shop: Shop) -> None:
    """It had no time to note that money may have to go back."""
    saga = shop.until("held")
    shop.gateway.meanwhile = lambda: shop.stock().cancel(ORDER, 2_000, "")
    assert saga.pay(RESERVED) == "cancelled"
    assert shop.unsettled == [Unsettled(ORDER, 2_000, 0)]


def test_a_charge_that_another_run_recorded_first_is_owed_to_nobody(shop: Shop) -> None:
    saga = shop.until("held")
    shop.gateway.meanwhile = lambda: shop.saga().pay(RESERVED)
    assert saga.pay(RESERVED) == "confirmed"
    assert shop.unsettled == []
    assert shop.events == ["paid", "confirmed", "paid", "confirmed"]


@pytest.mark.parametrize("answer", [Charge("ch_o-1"), Decline("card_declined", "no")])
def test_a_payment_is_recorded_although_the_record_is_written_again_meanwhile(
    shop: Shop, answer: Charge | Decline
) -> None:
    """It stays as it is, and was held all the time."""

    def touch() -> None:
        stock = shop.stock()
        found = stock.find(ORDER)
        assert found is not None
        stock.forward(ORDER, found, replace(found.record, tracking="touched"))

    saga = shop.until("held")
    shop.gateway.answer, shop.gateway.meanwhile = answer, touch
    state = "confirmed" if isinstance(answer, Charge) else "declined"
    assert saga.pay(RESERVED) == state
    assert (shop.record.state, shop.record.at[state], shop.record.tracking) == (state, 2_000, "touched")
    assert shop.unsettled == []
    assert len(shop.gateway.asked) == 1


@pytest.mark.parametrize(("state", "said"), [("paid", ["paid"]), ("confirmed", ["paid", "confirmed"])])
def test_a_cancel_after_the_payment_leaves_its_events_to_be_published(
    shop: Shop, state: str, said: list[str]
) -> None:
    """Of an order that was never confirmed only the payment, and it calls the steps that it always called."""
    shop.until(state)
    shop.saga().cancel(ORDER, "changed my mind")
    shop.published.clear()
    shop.headers.clear()
    assert shop.saga().pay(RESERVED) == "cancelled"
    assert shop.published == [shop.said(one, 2_000) for one in said]
    assert shop.headers[0] == ({} if state == "paid" else {CARRIED_ON: "1"})


def test_a_token_that_is_gone_declines_nothing(shop: Shop) -> None:
    """A run that could not record its charge may have dropped it; the step waits."""
    shop.until("held")
    shop.tokens.drop(ORDER)
    with pytest.raises(TokenMissing, match=r"^the payment token of order o-1 is not kept any more\.$"):
        shop.saga().pay(RESERVED)
    assert (shop.gateway.asked, shop.published, shop.record) == ([], [], HELD)


@pytest.mark.parametrize("behind", [0, 1])
def test_a_token_that_another_run_has_used_is_found_to_be_used(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    """By its record, which is read again from a server that is not behind, if need be."""
    shop.until("held")
    find = shop.tokens.find

    def used(order_id: str, named: str) -> str | None:
        monkeypatch.setattr(shop.tokens, "find", find)
        shop.saga().pay(RESERVED)
        shop.published.clear()
        shop.bucket.reads.clear()
        late = [1] * behind  # writes: the last one was the payment
        shop.bucket.behind = lambda: late.pop() if late else 0
        return find(order_id, named)

    monkeypatch.setattr(shop.tokens, "find", used)
    assert shop.saga().pay(RESERVED) == "confirmed"
    assert shop.published == [shop.said("paid", 2_000), shop.said("confirmed", 2_000)]
    assert shop.bucket.reads == ["plain", *["linearizable"] * behind]
    assert len(shop.gateway.asked) == 1


# Confirm


def test_confirm_goes_on_from_what_the_process_remembers(shop: Shop) -> None:
    """Without a read; another process reads once."""
    saga = shop.until("paid")
    assert saga.confirm(PAID) == "confirmed"
    assert shop.bucket.reads == []
    assert shop.record.at == {"held": 1_000, "paid": 2_000, "confirmed": 3_000}
    assert shop.record.state == "confirmed"
    assert shop.published == [shop.said("confirmed", 3_000)]

    other = Shop()
    other.until("paid")
    assert other.saga().confirm(PAID) == "confirmed"
    assert other.bucket.reads == ["plain"]


def test_a_process_that_remembers_an_order_as_held_reads_it_to_confirm(shop: Shop) -> None:
    saga = shop.until("held")
    shop.saga().pay(RESERVED)
    assert saga.confirm(PAID) == "confirmed"


def test_a_refund_of_a_paid_order_is_kept_when_it_is_confirmed(shop: Shop) -> None:
    """It was decided since this process wrote the record."""
    saga = shop.until("paid")
    shop.saga().request_refund(ORDER, "r-1", 100, "scratched")
    assert saga.confirm(PAID) == "confirmed"
    assert [refund.key for refund in shop.record.refunds] == ["r-1"]
    assert shop.record.state == "confirmed"


@pytest.mark.parametrize("shipped", [False, True])
def test_confirm_that_is_repeated_says_what_it_said(shop: Shop, shipped: bool) -> None:
    """Unless the read model has it."""
    shop.until("confirmed")
    if shipped:
        shop.saga().request_shipment(ORDER)
    shop.published.clear()
    assert shop.saga().confirm(PAID) == ("shipped" if shipped else "confirmed")
    assert shop.published == [shop.said("confirmed", 2_000)]
    shop.known = {(ORDER, "confirmed")}
    shop.saga().confirm(PAID)
    assert len(shop.published) == 1


def test_an_order_that_was_cancelled_after_its_payment_is_not_confirmed(shop: Shop) -> None:
    """And nothing is wrong with the event."""
    saga = shop.until("paid")
    shop.saga().cancel(ORDER, "changed my mind")
    shop.published.clear()
    assert saga.confirm(PAID) == "cancelled"
    assert shop.published == []
    assert "confirmed" not in shop.record.at


# Release


def test_release_gives_the_items_back_and_rejects_the_order(shop: Shop) -> None:
    saga = shop.until_declined()
    assert saga.release(DECLINED) == "released"
    assert shop.bucket.reads == ["plain"], "it remembers the decline, and the stock looks for it"
    assert shop.record.at == {"held": 1_000, "declined": 2_000, "released": 3_000}
    assert shop.published == [shop.said("released", 3_000)]
    assert shop.stock().available() == INITIAL


def test_release_that_is_repeated_gives_nothing_more_back(shop: Shop) -> None:
    """Its event is published again unless the read model has it, whatever the reason says."""
    shop.until_declined().release(DECLINED)
    shop.published.clear()
    assert shop.saga().release(DECLINED) == "released"
    assert shop.published == [shop.said("released", 3_000)]
    shop.known = {(ORDER, "rejected")}
    assert shop.saga().release(DECLINED) == "released"
    assert len(shop.published) == 1
    assert shop.stock().available() == INITIAL


# Events of strangers


@pytest.mark.parametrize(
    ("step", "event", "word"),
    [("pay", RESERVED, "reserved"), ("confirm", PAID, "paid"), ("release", DECLINED, "declined")],
)
def test_an_event_of_an_order_that_never_was_is_refused(
    shop: Shop, step: str, event: Message, word: str
) -> None:
    """After a look at a server that is not behind."""
    said = rf"^order o-1 is {word}, says the event, but was never created\.$"
    with pytest.raises(UnusableEvent, match=said):
        getattr(shop.saga(), step)(event)
    assert shop.bucket.reads == ["plain", "linearizable"]


@pytest.mark.parametrize(
    ("state", "step", "event", "word"),
    [
        ("held", "confirm", PAID, "paid"),
        ("held", "release", DECLINED, "declined"),
        ("paid", "release", DECLINED, "declined"),
        ("confirmed", "release", DECLINED, "declined"),
    ],
)
def test_an_event_that_the_record_contradicts_is_refused(
    shop: Shop, state: str, step: str, event: Message, word: str
) -> None:
    """It changes nothing, and nothing is said."""
    shop.until(state)
    record = shop.record
    said = rf"^the event says that the order is {word}, but it is {state}\.$"
    with pytest.raises(UnusableEvent, match=said):
        getattr(shop.saga(), step)(event)
    assert (shop.published, shop.record) == ([], record)


def test_an_order_whose_payment_was_declined_is_not_confirmed(shop: Shop) -> None:
    shop.until_declined()
    with pytest.raises(UnusableEvent, match=r"^the event says that the order is paid, but it is declined\.$"):
        shop.saga().confirm(PAID)
    assert shop.published == []


# Given up


def test_a_step_that_was_given_up_is_said_once_with_its_first_error(shop: Shop) -> None:
    """In words that can be shown. Given up again, it says the same."""
    saga = shop.until("held")
    saga.fail(ORDER, "pay", LONG, "m-1")
    said = failed_event(ORDER, "pay", GivenUp(2_000, SHOWN, "m-1")), 2_000
    assert shop.published == [said]
    shop.time += 1_000
    shop.saga().fail(ORDER, "pay", "something else", "m-2")
    assert shop.published == [said, said]
    shop.saga().fail(ORDER, "confirm", "something else", "m-3")
    assert {key_of(event) for event, _ in shop.published} == {"failed.pay", "failed.confirm"}
    shop.saga().fail("o-2", "pay", "its own", "m-4")
    assert shop.published[-1] == (failed_event("o-2", "pay", GivenUp(3_000, "its own", "m-4")), 3_000)


@pytest.mark.parametrize(
    ("step", "outcome"), [(step, outcome) for step in OUTCOMES for outcome in sorted(OUTCOMES[step])]
)
def test_a_step_whose_order_is_past_it_has_not_failed(shop: Shop, step: str, outcome: str) -> None:
    """One outcome of those that it may have is enough, of this order."""
    shop.known = {(ORDER, outcome)}
    shop.saga().fail(ORDER, step, "a repetition", "m-1")
    assert shop.published == []
    shop.saga().fail("o-2", step, "the first time", "m-1")
    assert shop.events == ["failed"]


def test_every_actor_does_a_step_that_can_be_given_up(shop: Shop) -> None:
    """A refund has failed whatever is known of others."""
    assert set(STEPS.values()) == set(OUTCOMES)
    shop.known = {(ORDER, name) for name in ("refunded", "refund_requested", "cancelled", "confirmed")}
    shop.saga().fail(ORDER, "refund", "the gateway is down", "m-1")
    assert shop.events == ["failed"]
