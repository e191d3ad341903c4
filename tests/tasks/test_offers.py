"""What there is of an order that stock does not cover is offered, held until its customer decides, and decided once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orders.v1.events_pb2 import OrderOfferAccepted, OrderOffered, OrderReserved
from tasks.deadline import Deadline
from tasks.events import Happened, UnusableEvent, name_of
from tasks.model import Order, Refusal
from tasks.offers import EXPIRED
from tasks.orders import Orders, merge
from tasks.unfinished import UnfinishedOrders
from tasks.webhooks.announcing import Announcer
from tasks.webhooks.deliveries import Delivery
from tasks.webhooks.subscriptions import Subscription
from tests.tasks.fakes import FakeBucket
from tests.tasks.test_compensation import MUG, OFFERED_FOR, Reversing, stop_at
from tests.tasks.test_saga_properties import created, no_waiting

__all__ = ["no_waiting"]

TEE = "TEE-01"


def offered(*items: tuple[str, int], token: str = "tok_ok") -> Reversing:
    """A service with an order of five mugs, of which there are three, that is offered."""
    service = Reversing(window=False, offered_for=OFFERED_FOR)
    service.stream.append(created("o-0", list(items) or [(MUG, 5)], token))
    go_on(service)
    return service


def go_on(service: Reversing) -> None:
    service.deliver_new()
    service.finish()


def shown(service: Reversing, order_id: str = "o-0") -> Order:
    order = Orders(service.orders_bucket).get(order_id)
    assert order is not None
    return order


def published(service: Reversing) -> list[str]:
    return [name_of(one.event) for one in service.stream.stored]


STORIES = (
    (("accept",), "confirmed"),
    (("accept", "customer"), "cancelled"),
    (("customer", "accept"), "cancelled"),
    (("expire",), "cancelled"),
)


@pytest.mark.parametrize(
    ("asks", "state"), STORIES, ids=["accept", "accept-cancel", "cancel-accept", "expire"]
)
def test_cut_at_every_effect(asks: tuple[str, ...], state: str) -> None:
    """Each thing that is asked of an offer, killed at each effect and asked again, ends as if it had not been."""

    def play(cut: int) -> Reversing:
        service = Reversing(window=False, offered_for=OFFERED_FOR)
        service.cut = cut
        service.stream.append(created("o-0", [(MUG, 5)]))
        service.deliver_new()
        service.drain()
        for what in asks:
            service.start(("ask", (what, "o-0")))
            service.drain()
        service.come_to_rest()
        service.check()
        return service

    whole = play(-1)
    assert whole.records()["o-0"].state == state
    for cut in range(1, whole.effects + 1):
        service = play(cut)
        assert service.records()["o-0"].state == state
        assert service.pieces() == whole.pieces()
        assert service.gateway.amounts == whole.gateway.amounts
        assert service.gateway.refunds == whole.gateway.refunds


def test_what_there_is_is_held_until_it_is_accepted_and_charged_then() -> None:
    """Nothing is charged before; a later order gets none of it; what is charged is what was offered."""
    service = offered((MUG, 5), (TEE, 1), ("PRINT-01", 1))
    assert service.gateway.captured == []
    assert service.pieces() == {MUG: 0, TEE: 1, "PRINT-01": 0}
    service.stream.append(created("o-1", [(MUG, 1)]))
    go_on(service)
    assert shown(service, "o-1").status == "rejected"
    order = shown(service)
    assert order.offer is not None
    assert (order.status, order.is_final, order.can_be_accepted) == ("offered", False, True)
    assert [(item.sku, item.ordered, item.quantity) for item in order.offer.items] == [
        (MUG, 5, 3),
        (TEE, 1, 1),
        ("PRINT-01", 1, 1),
    ]
    assert [item.name for item in order.offer.items] == [
        *("Enamel mug", "T-shirt, organic cotton", "Print, signed, limited to 50")
    ]
    assert order.total == 5 * 1_290 + order.items[1].unit_price + order.items[2].unit_price  # type: ignore[operator]
    service.saga().accept_offer("o-0", "customer")
    go_on(service)
    order = shown(service)
    assert order.status == "confirmed"
    assert service.gateway.amounts == {"o-0": order.total}
    assert [(item.sku, item.quantity) for item in order.items] == [(MUG, 3), (TEE, 1), ("PRINT-01", 1)]
    assert [entry.event for entry in order.history] == [
        *("created", "offered", "offer_accepted", "reserved", "paid", "confirmed")
    ]


def test_a_product_of_which_nothing_is_left_is_offered_as_none() -> None:
    """It is not part of what is accepted, and the order is still found by it."""
    service = offered((MUG, 3))  # all there are
    service.stream.append(created("o-1", [(MUG, 1), (TEE, 1)]))
    go_on(service)
    offer = shown(service, "o-1").offer
    assert offer is not None
    assert [(item.sku, item.ordered, item.quantity) for item in offer.items] == [(MUG, 1, 0), (TEE, 1, 1)]
    service.saga().accept_offer("o-1", "customer")
    go_on(service)
    order = shown(service, "o-1")
    assert [item.sku for item in order.items] == [TEE]
    assert order.skus == {MUG, TEE}
    service.come_to_rest()
    service.check()


def test_nothing_at_all_is_a_rejection() -> None:
    """There is nothing to offer, so the order is over, with the reason that it has where no offers are made."""
    service = offered((MUG, 3))
    service.stream.append(created("o-1", [(MUG, 2)]))
    go_on(service)
    order = shown(service, "o-1")
    assert (order.status, order.offer) == ("rejected", None)
    assert order.reason == f"2 × {MUG} ordered, 0 in stock"


def test_without_the_setting_it_is_a_rejection() -> None:
    """Also when a process that makes offers had taken what there is, and died."""
    service = Reversing(window=False, offered_for=OFFERED_FOR)
    event = created("o-0", [(MUG, 5)])
    task = stop_at(service, lambda: service.saga().reserve(event), f"after update of level.{MUG}")
    service.world.step(task, crash=True)
    assert service.pieces()[MUG] == 0
    service.offered_for = None
    assert service.saga().reserve(event) == "rejected"
    assert service.pieces()[MUG] == 3
    assert service.records()["o-0"].reason == f"5 × {MUG} ordered, 3 in stock"


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_took_more_than_was_offered_gives_it_back(killed: bool) -> None:
    """Of two runs one finds a product that came in after the other had not: by itself, or when it was killed."""
    service = Reversing(window=False, offered_for=OFFERED_FOR, sweep_after=0)
    service.stream.append(created("o-1", [(TEE, 2)]))  # all there are
    go_on(service)
    event = created("o-0", [(MUG, 5), (TEE, 1)])
    first = stop_at(service, lambda: service.saga().reserve(event), "before update of order.o-0")
    service.stock().restock(TEE, 1, "came in", by="test", reason="")
    saga = service.saga()
    second = stop_at(service, lambda: saga.reserve(event), f"after update of level.{TEE}")
    while not first.done:
        service.world.step(first)
    assert [line.sku for line in service.records()["o-0"].lines] == [MUG]
    service.check_stock()
    while not second.done:
        service.world.step(second, crash=killed)
    for number in (1, 2):  # with its next changes a process drops notes
        saga._stock.restock(TEE, 1, f"came in, too: {number}", by="test", reason="")
    service.check_stock()
    assert service.pieces()[TEE] == 3


def test_the_first_decision_counts() -> None:
    """Accepted, it is not ended by its deadline; ended, it is not accepted; said twice, it is said once."""
    service = offered()
    for _ in range(2):
        service.saga().accept_offer("o-0", "operator")
    service.skipped = OFFERED_FOR
    assert not service.saga().expire_offer("o-0")
    go_on(service)
    assert shown(service).status == "confirmed"
    assert service.stock().notes.cancel_request("o-0") is None

    service = offered()
    assert not service.saga().expire_offer("o-0"), "its time has not come"
    service.skipped = OFFERED_FOR
    with pytest.raises(Refusal, match="is not held for it any more"):
        service.saga().accept_offer("o-0", "customer")
    assert service.saga().expire_offer("o-0")
    with pytest.raises(Refusal, match="is cancelling already"):
        service.saga().accept_offer("o-0", "customer")
    go_on(service)
    order = shown(service)
    assert (order.status, order.reason) == ("cancelled", EXPIRED)
    assert not service.saga().expire_offer("o-0")
    assert service.gateway.captured == []
    assert service.pieces()[MUG] == 3


@pytest.mark.parametrize("first", ["accept", "expire", "customer"])
@pytest.mark.parametrize("second", ["accept", "expire", "customer"])
def test_one_decision_wherever_two_meet(first: str, second: str) -> None:
    """One comes to each of its effects, the other runs to its end meanwhile, by another clock: one counts, once."""
    stopped = 0
    while True:
        service = offered()
        # What ends the offer has a clock that is ahead of what accepts it.
        clocks = {"expire": OFFERED_FOR}
        running, asked = service.world.start("first", lambda s=service: s.ask(first, "o-0")), 0
        while not running.done and asked <= stopped:
            service.skipped = clocks.get(first, 0)
            service.world.step(running)
            asked += 1
        was_done = running.done
        service.skipped = clocks.get(second, 0)
        service.ask(second, "o-0")
        while not running.done:
            service.skipped = clocks.get(first, 0)
            service.world.step(running)
        service.skipped = 0
        go_on(service)
        service.come_to_rest()
        service.check()
        record = service.records()["o-0"]
        if {first, second} == {"accept", "expire"}:
            assert record.state == ("confirmed" if "o-0" in service.accepted else "cancelled")
        if was_done:
            return
        stopped += 1


def test_what_was_never_offered() -> None:
    """An order that stock covers, and one that is not there."""
    service = offered((MUG, 1))
    for order_id in ("o-0", "nobody"):
        with pytest.raises(Refusal, match=f"Nothing is offered of order {order_id}"):
            service.saga().accept_offer(order_id, "customer")
        assert not service.saga().expire_offer(order_id)


def test_an_acceptance_whose_event_was_lost_is_carried_on() -> None:
    """The process died after it had decided, and its customer did not ask again: what is not settled is looked at."""
    service = offered()
    task = stop_at(
        service, lambda: service.saga().accept_offer("o-0", "customer"), "before publish of offer_accepted"
    )
    service.world.step(task, crash=True)
    assert "offer_accepted" not in published(service)
    service.come_to_rest()
    service.check()
    assert shown(service).status == "confirmed"


def test_an_offer_whose_end_was_not_requested_ends_with_the_next_look() -> None:
    """The process died between the decision and its request."""
    service = offered()
    service.skipped = OFFERED_FOR
    task = stop_at(service, lambda: service.saga().expire_offer("o-0"), "before update of cancel.o-0")
    service.world.step(task, crash=True)
    assert service.records()["o-0"].state == "cancelling"
    service.come_to_rest()
    service.check()
    assert shown(service).status == "cancelled"


def test_a_payment_is_recorded_although_the_acceptance_is_settled_meanwhile() -> None:
    """What looks after the acceptance writes the record again while the gateway decides."""
    service = offered()
    service.saga().accept_offer("o-0", "customer")
    service.stock().notes.unsettle("o-0", 0, 0)  # as if that process had died before it dropped its note
    event = OrderReserved(order_id="o-0")
    task = stop_at(service, lambda: service.saga().pay(event), "after charge of o-0")
    service.saga().settle_order("o-0")
    while not task.done:
        service.world.step(task)
    assert service.records()["o-0"].state == "confirmed"
    go_on(service)
    service.come_to_rest()
    service.check()
    assert shown(service).status == "confirmed"


def test_what_strangers_say_of_offers() -> None:
    """An acceptance, an offer, a reservation that the ledger does not know: nothing happens, and the token stays."""
    service = offered(token="tok_of_somebody")
    for event, step in (
        (OrderOfferAccepted(order_id="o-0", by="forged"), "accept"),
        (OrderReserved(order_id="o-0", customer_id="forged"), "pay"),
    ):
        with pytest.raises(UnusableEvent):
            getattr(service.saga(), step)(event)
    for event in (
        OrderOffered(order_id="o-0", total_minor=1, currency="EUR"),
        OrderOfferAccepted(order_id="o-0", by="forged"),
    ):
        service.stream.append(event)
    go_on(service)
    assert shown(service).status == "offered"
    assert "forged" not in repr(shown(service))
    service.saga().accept_offer("o-0", "customer")
    go_on(service)
    assert shown(service).status == "confirmed"


@given(data=st.data(), accepted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_read_model_depends_on_the_set_of_events_only(data: st.DataObject, accepted: bool) -> None:
    """Projecting the events of an offer in any order, with repetitions, gives the same order."""
    service = offered((MUG, 5), (TEE, 1))
    service.start(("ask", ("accept" if accepted else "expire", "o-0")))
    service.finish()
    events = [Happened(one.event, one.sequence, 1_000 + one.sequence) for one in service.stream.stored]

    def fold(happened: list[Happened]) -> str:
        record: dict[str, Any] | None = None
        for one in happened:
            record = merge(record, one) or record
        return json.dumps(record, sort_keys=True)

    shuffled = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=8))))
    assert fold(list(shuffled)) == fold(events)


def test_the_deadline_ends_offers_and_nothing_else() -> None:
    """Before its time an offer stays; after it the order ends; an order without an offer has its own deadline."""
    service = offered()
    service.stream.append(created("o-1", [(TEE, 1)]))
    service.deliver_new()
    service.pending = [(step, one) for step, one in service.pending if step != "reserve"]
    service.finish()

    def look() -> list[str]:
        orders = Orders(service.orders_bucket)
        unfinished = UnfinishedOrders(service.orders_bucket, FakeBucket(), orders.read)
        saga = service.saga()
        now = service.now
        deadline = Deadline(unfinished, saga.request_cancel, saga.expire_offer, after=10**12, now=now)
        assert deadline.run() == []
        go_on(service)
        return [shown(service, order_id).status for order_id in ("o-0", "o-1")]

    assert look() == ["offered", "accepted"]
    service.skipped = OFFERED_FOR
    assert look() == ["cancelled", "accepted"]
    assert look() == ["cancelled", "accepted"]
    assert published(service).count("cancel_requested") == 1


class Everything:
    """A webhook that wants all events, and what was made for it."""

    def __init__(self) -> None:
        self.bodies: dict[str, dict[str, Any]] = {}

    def refresh(self, since: float | None) -> list[Subscription]:
        return [Subscription("wh-1", "https://receiver.example", (), "", None, "ann", 0)]

    def create(self, delivery: Delivery) -> Delivery:
        self.bodies[delivery.type.removeprefix("order.")] = json.loads(delivery.body)["data"]
        return delivery


def test_webhooks_learn_of_an_offer_and_of_what_was_accepted() -> None:
    """An offer says what there is; from its acceptance on every event is of what was accepted."""
    service = offered((MUG, 5), (TEE, 1))
    service.saga().accept_offer("o-0", "customer")
    go_on(service)
    webhook: Any = Everything()
    announcer = Announcer(
        *(service.stock(), service.catalogue, webhook, webhook, lambda _: None, lambda *_: None, service.now)
    )
    for one in service.stream.stored:
        announcer.announce(Happened(one.event, one.sequence, 1_000 + one.sequence))
    quantities = {
        name: {item["sku"]: item["quantity"] for item in data["items"]}
        for name, data in webhook.bodies.items()
    }
    ordered, accepted = {MUG: 5, TEE: 1}, {MUG: 3, TEE: 1}
    assert quantities == {
        **dict.fromkeys(("created", "offered"), ordered),
        **dict.fromkeys(("offer_accepted", "reserved", "paid", "confirmed"), accepted),
    }
    total = service.records()["o-0"].total
    offer = webhook.bodies["offered"]
    assert [(item["sku"], item["ordered"], item["quantity"]) for item in offer["offer"]] == [
        (MUG, 5, 3),
        (TEE, 1, 1),
    ]
    assert offer["offer"][0]["name"] == "Enamel mug"
    assert offer["detail"]["amount_minor"] == str(total)
    assert webhook.bodies["offer_accepted"]["detail"]["by"] == "customer"
    assert webhook.bodies["confirmed"]["total_minor"] == total
