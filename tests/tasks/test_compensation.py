"""Offered, accepted, cancelled, refunded, shipped, returned, charged back, restocked or late, whenever, and killed
anywhere: stock and money balance, and each order has one end.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from orders.v1.events_pb2 import OrderShipped
from tasks.events import UnusableEvent, name_of
from tasks.ledger import BACK, WRITTEN_OFF
from tasks.model import Refusal
from tasks.offers import EXPIRED
from tasks.orders import Orders
from tasks.refunds import LATE_MS, NotChargedBack
from tasks.stock import RecordBehind
from tests.tasks.fakes import FakeStored, Task
from tests.tasks.test_saga_properties import Service, created, no_waiting

__all__ = ["no_waiting"]

MUG = "MUG-01"

#: For how long something is offered, in milliseconds.
OFFERED_FOR = 1_000_000

#: The statuses that each final state of the ledger may show as.
SHOWN = {
    "confirmed": {"confirmed", "refunded"},
    "shipped": {"shipped", "refunded"},
    "released": {"rejected"},
    "rejected": {"rejected"},
    "cancelled": {"cancelled"},
    "returned": {"returned"},
}


class Reversing(Service):
    """A service of which something is asked meanwhile; what was asked and not answered is asked again."""

    skipped = 0
    effects = 0
    cut = -1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        #: The orders whose acceptance was answered.
        self.accepted: set[str] = set()

    def now(self) -> int:
        return super().now() + self.skipped

    def start(self, delivery: tuple[str, Any]) -> None:
        step, asked = delivery
        if step != "ask":
            super().start(delivery)
            return
        self.running.append((self.world.start("ask", lambda: self.ask(*asked)), delivery))

    def ask(self, what: str, order_id: str) -> None:
        """Ask something of an order, if it can be."""
        saga = self.saga()
        with contextlib.suppress(Refusal, RecordBehind):
            match what:
                case "customer" | "deadline":
                    saga.request_cancel(order_id, what)
                case "operator":
                    saga.cancel(order_id, "asked for")
                case "accept":
                    saga.accept_offer(order_id, "customer")
                    self.accepted.add(order_id)
                case "expire":
                    self.skipped = max(self.skipped, OFFERED_FOR)
                    saga.expire_offer(order_id)
                case "ship":
                    saga.request_shipment(order_id, "by hand", "1")
                case "sent":  # another service says so
                    self.send(OrderShipped(order_id=order_id, carrier="elsewhere"))
                case "back" | "written_off":
                    saga.request_return(order_id, what, "broken")
                case "bank":
                    self.tell_of_chargeback(order_id, 500)
                case "restock":
                    self.stock().restock(MUG, 2, f"for {order_id}", by="test", reason="")
                case _:
                    saga.request_refund(order_id, what, 300, "")

    def send(self, event: OrderShipped) -> None:
        """Publish an event as another program does, under an id of its own."""
        self.stream.stored.append(FakeStored(event, len(self.stream.stored) + 1))

    def tell_of_chargeback(self, order_id: str, amount: int) -> None:
        """Have the bank take money back, and the gateway tell of it."""
        taken = self.gateway.charge_back(order_id, f"cb-{order_id}", amount)
        if taken is not None:
            self.saga().charge_back(order_id, f"ch_{order_id}", replace(taken, at=self.now()))

    def check_stock(self) -> None:
        """Hold the stock against what orders hold; where one thing is done after the other, at the end alone."""
        if not self.effects or not (self.running or self.pending):
            super().check_stock()

    def drain(self) -> None:
        """Run everything to its end, one thing after the other; cut it at one effect."""
        while self.running or self.pending:
            if not self.running:
                self.start(self.pending.pop(0))
            self.effects += 1
            self.go_on(0, crash=self.effects == self.cut)

    def come_to_rest(self) -> None:
        """Do what time does, twice: tell again what was not taken, settle what may not be settled, end offers."""
        for late in (0, LATE_MS):
            self.skipped += late
            for order_id in self.records():
                self.saga().expire_offer(order_id)
            for charge_id, _ in list(self.gateway.chargebacks.values()):
                order_id = charge_id.removeprefix("ch_")
                with contextlib.suppress(NotChargedBack):
                    self.tell_of_chargeback(order_id, 0)
            for one in list(self.stock().notes.unsettled()):
                self.saga().settle_order(one.order_id)
            self.deliver_new()
            self.finish()

    def check(self) -> None:
        """Hold ledger, gateway, stream and read model against each other."""
        assert list(self.stock().notes.unsettled()) == []
        self.check_stock()
        self.check_notes()
        for order_id, record in self.records().items():
            charge = f"ch_{order_id}"
            captured = self.gateway.amounts.get(order_id, 0)
            refunded = sum(amount for one, amount in self.gateway.refunds.values() if one == charge)
            taken = {key: amount for key, (one, amount) in self.gateway.chargebacks.items() if one == charge}
            owed = captured - refunded - sum(taken.values())
            assert refunded == sum(refund.payable for refund in record.refunds)
            assert {one.id: one.amount for one in record.chargebacks} == taken
            if record.state in ("confirmed", "shipped"):
                assert captured == record.total
                assert owed >= 0
            else:
                assert owed == 0, f"{order_id} is {record.state}, and {owed} of its charge are left"
            self._check_shown(order_id)
            self._check_offer(order_id)

    def _check_offer(self, order_id: str) -> None:
        """Hold an order against what was offered of it: an acceptance that was answered is kept."""
        record, order = self.records()[order_id], Orders(self.orders_bucket).get(order_id)
        assert order is not None
        assert order_id not in self.accepted or "accepted" in record.at
        assert ("offered" in record.at) == (order.offer is not None)
        history = [entry.event for entry in order.history]
        assert ("offer_accepted" in history) == ("accepted" in record.at)
        if order.offer is None:
            return
        assert "accepted" not in record.at or record.reason != EXPIRED
        there = {item.sku: item.quantity for item in order.offer.items if item.quantity}
        assert there == {line.sku: line.quantity for line in record.lines}
        assert order.offer.total == record.total == sum(one.quantity * one.unit_price for one in record.lines)
        assert any(item.quantity < item.ordered for item in order.offer.items)
        if "accepted" in record.at:
            assert {item.sku: item.quantity for item in order.items} == there
            assert order.total == record.total

    def _check_shown(self, order_id: str) -> None:
        record, order = self.records()[order_id], Orders(self.orders_bucket).get(order_id)
        assert order is not None
        assert order.status in SHOWN[record.state]
        names = [name_of(one.event) for one in self.stream.stored if one.event.order_id == order_id]  # type: ignore[attr-defined]
        assert len({"rejected", "cancelled", "returned"} & set(names)) == (
            record.state not in ("confirmed", "shipped")
        )
        assert not {"shipped", "cancelled"} <= record.at.keys()
        history = [entry.event for entry in order.history]
        assert ("shipped" in history) == ("shipped" in record.at)
        assert ("returned" in history) == (record.state == "returned")
        made = {refund.key: refund.payable for refund in record.refunds if refund.payable}
        shown = [entry.detail for entry in order.history if entry.event == "refunded"]
        assert {one["refund"]: int(one["amount_minor"]) for one in shown} == made
        shown = [entry.detail for entry in order.history if entry.event == "charged_back"]
        assert {one["chargeback_id"]: int(one["amount_minor"]) for one in shown} == {
            one.id: one.amount for one in record.chargebacks
        }


#: What is asked of an order one after the other, in most cases.
STORIES = (
    *(("ship", "back"), ("sent", "written_off"), ("r-1", "bank", "ship", "customer", "back")),
    *(("customer",), ("bank", "operator"), ("r-1", "sent", "bank", "written_off"), ()),
    *(("accept", "accept", "ship", "back"), ("accept", "accept", "r-1"), ("accept", "expire", "customer")),
)
KINDS = (
    *("customer", "operator", "deadline", "r-1", "r-1", "r-2"),
    *("ship", "ship", "sent", "sent", "back", "written_off", "bank", "bank", "restock"),
    *("accept", "accept", "accept", "expire"),
)


def told(order_ids: list[str], chance: random.Random) -> list[tuple[str, str]]:
    """Draw a story for each order, tell them at once, and let a few other things be asked in between."""
    stories = {order_id: list(chance.choice(STORIES)) for order_id in order_ids}
    asks = []
    while left := [order_id for order_id in order_ids if stories[order_id]]:
        order_id = chance.choice(left)
        asks.append((stories[order_id].pop(0), order_id))
    for _ in range(4):
        asks.insert(chance.randint(0, len(asks)), (chance.choice(KINDS), chance.choice(order_ids)))
    return asks


def act(service: Reversing, asks: list[tuple[str, str]], chance: random.Random) -> None:
    """Ask for things amid the steps, which run at once and are killed, until all have come to their end."""
    while service.running or service.pending or asks:
        if asks and (chance.random() < 0.03 or not (service.running or service.pending)):
            service.start(("ask", asks.pop(0)))
        elif service.pending and len(service.running) < 4:
            service.start(service.pending.pop(chance.randrange(len(service.pending))))
        if service.running:
            crash, waiting = chance.random() < 0.05, len(service.pending)
            service.go_on(chance.randrange(len(service.running)), crash=crash)
            # One who asked and got no answer asks again, or does not.
            if len(service.pending) > waiting and service.pending[-1][0] == "ask" and chance.random() < 0.5:
                service.pending.pop()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_what_was_captured_and_not_given_back_is_what_is_owed(seed: int) -> None:
    """All that can be asked, amid the steps, at once, repeated, killed: one end, stock and money balance."""
    note(f"seed {seed}")
    chance = random.Random(seed)
    service = Reversing(
        window=chance.random() < 0.5,
        sweep_after=chance.choice([0, 20]),
        offered_for=chance.choice([None, OFFERED_FOR]),
    )
    order_ids = [f"o-{number}" for number in range(3)]
    for order_id in order_ids:
        token = chance.choice(["tok_ok", "tok_ok", "tok_declined"])
        pieces = chance.choice([1, 1, 2] if service.offered_for is None else [1, 2, 3])
        tees = [("TEE-01", 1)] if service.offered_for and chance.random() < 0.5 else []
        service.stream.append(created(order_id, [(MUG, pieces), *tees], token))
    service.deliver_new()
    act(service, told(order_ids, chance), chance)
    # Most customers accept what they are offered.
    offers = [order_id for order_id, record in service.records().items() if record.state == "offered"]
    act(service, [("accept", order_id) for order_id in offers if chance.random() < 0.7], chance)
    service.come_to_rest()
    service.check()


SCENARIOS = (
    ("ship", "back"),
    ("sent", "customer", "written_off"),
    ("r-1", "bank", "ship", "back"),
    ("bank", "operator"),
    ("customer", "restock"),
)


@pytest.mark.parametrize("asks", SCENARIOS, ids="-".join)
def test_cut_at_every_effect(asks: tuple[str, ...]) -> None:
    """Each thing that is asked, killed at each of its effects and asked again, ends as if it had not been killed."""

    def play(cut: int) -> Reversing:
        service = Reversing(window=False, offered_for=OFFERED_FOR)
        service.cut = cut
        service.stream.append(created("o-0", [(MUG, 1)]))
        service.deliver_new()
        service.drain()
        for what in asks:
            service.start(("ask", (what, "o-0")))
            service.drain()
        service.come_to_rest()
        service.check()
        return service

    whole = play(-1)
    state = whole.records()["o-0"].state
    assert state == {"back": "returned", "written_off": "returned"}.get(asks[-1], "cancelled")
    for cut in range(1, whole.effects + 1):
        service = play(cut)
        assert service.records()["o-0"].state == state
        assert service.pieces() == whole.pieces()
        assert service.gateway.refunds == whole.gateway.refunds


def confirmed(total: int = 1) -> Reversing:
    """A service with an order of mugs that is confirmed."""
    service = Reversing(window=False)
    service.stream.append(created("o-0", [(MUG, total)]))
    service.deliver_new()
    service.finish()
    return service


def test_a_refund_that_was_decided_is_cut_by_a_chargeback() -> None:
    """The bank takes back a part of what is to be refunded: the rest goes back, under another key."""
    service = confirmed()
    saga = service.saga()
    saga.request_refund("o-0", "r-1", None, "")
    service.tell_of_chargeback("o-0", 500)
    service.deliver_new()
    service.finish()
    assert service.gateway.refunds == {"o-0.r-1-790": ("ch_o-0", 790)}
    service.come_to_rest()
    service.check()


def test_a_refund_whose_answer_was_lost_is_not_made_again_after_a_chargeback() -> None:
    """The gateway made it before the bank came: it says so, and the refund is recorded as it was made."""
    service = confirmed()
    service.saga().request_refund("o-0", "r-1", 1_000, "")
    service.gateway.refund("ch_o-0", 1_000, "EUR", "o-0.r-1")  # its answer is lost
    service.tell_of_chargeback("o-0", 500)
    service.deliver_new()
    service.finish()
    service.come_to_rest()
    service.check()
    assert service.gateway.refunds == {"o-0.r-1": ("ch_o-0", 1_000)}
    assert service.gateway.chargebacks == {"cb-o-0": ("ch_o-0", 290)}


def test_a_chargeback_of_which_nothing_was_told_is_looked_up() -> None:
    """The gateway refuses the refund; it is asked why, and what is left goes back."""
    service = confirmed()
    assert service.gateway.charge_back("o-0", "cb-o-0", 500) is not None
    service.saga().request_refund("o-0", "r-1", None, "")
    service.deliver_new()
    service.finish()
    service.come_to_rest()
    service.check()
    assert service.gateway.left("ch_o-0") == 0


def test_a_chargeback_is_never_more_than_what_is_left() -> None:
    """Of another charge, of more than was captured, or of more than was not refunded: nothing is recorded."""
    service = confirmed()
    saga = service.saga()
    taken = service.gateway.charge_back("o-0", "cb-1", 500)
    assert taken is not None
    with pytest.raises(NotChargedBack, match="not known to have a charge"):
        saga.charge_back("o-0", "ch_other", taken)
    with pytest.raises(NotChargedBack, match="1291 cannot be charged back of 1290"):
        saga.charge_back("o-0", "ch_o-0", replace(taken, amount=1_291))
    for _ in range(2):
        saga.charge_back("o-0", "ch_o-0", taken)
    with pytest.raises(NotChargedBack, match="791 cannot be charged back of 790"):
        saga.charge_back("o-0", "ch_o-0", replace(taken, id="cb-2", amount=791))
    with pytest.raises(Refusal, match=r"7\.90 EUR can be refunded, not 7\.91 EUR"):
        saga.request_refund("o-0", "r-1", 791, "")


def test_another_service_ships_what_is_confirmed_alone() -> None:
    """Its event is refused for an order that is unknown, not confirmed, or cancelled."""
    service = confirmed()
    service.saga().reserve(created("o-1", [(MUG, 1)]))
    for order_id, state in (("o-1", "held"), ("nobody", "unknown")):
        with pytest.raises(UnusableEvent, match=f"is {state}, and only what is confirmed"):
            service.saga().ship(OrderShipped(order_id=order_id))
    service.saga().cancel("o-0", "")
    with pytest.raises(UnusableEvent, match="is cancelled"):
        service.saga().ship(OrderShipped(order_id="o-0"))


def test_another_services_event_is_published_once_more() -> None:
    """With the time of the ledger, which is what is shown; what it says later changes nothing."""
    service = confirmed()
    for carrier in ("DHL", "DHL", "another"):
        service.send(OrderShipped(order_id="o-0", carrier=carrier, tracking="\x1b[31m1"))
        service.deliver_new()
        service.finish()
    order = Orders(service.orders_bucket).get("o-0")
    assert order is not None
    (shipped,) = [entry for entry in order.history if entry.event == "shipped"]
    assert shipped.detail["carrier"] == "DHL"
    assert "\x1b" not in shipped.detail["tracking"]
    ours = [
        one
        for one in service.stream.stored
        if isinstance(one.event, OrderShipped) and one.event.HasField("shipped_at")
    ]
    assert len(ours) == 1
    service.check()


def test_what_was_shipped_is_returned_instead_of_cancelled() -> None:
    """A customer asks for it, an operator says what becomes of the goods, and says so once."""
    service = confirmed()
    saga = service.saga()
    with pytest.raises(Refusal, match="was not shipped"):
        saga.request_return("o-0", BACK)
    saga.request_shipment("o-0")
    with pytest.raises(Refusal, match="return it, and say"):
        saga.request_cancel("o-0", "operator")
    saga.request_cancel("o-0", "customer", "too large")
    service.deliver_new()
    service.finish()
    order = Orders(service.orders_bucket).get("o-0")
    assert order is not None
    assert order.waits_for_return
    saga.request_return("o-0", WRITTEN_OFF)
    saga.request_return("o-0", WRITTEN_OFF)
    with pytest.raises(Refusal, match="already, and written_off"):
        saga.request_return("o-0", BACK)
    service.deliver_new()
    service.finish()
    service.come_to_rest()
    service.check()
    assert service.records()["o-0"].state == "returned"
    assert service.pieces()[MUG] == 2


def test_a_return_whose_event_was_lost_is_carried_out() -> None:
    """The process died after it had decided: what is not settled is looked at again."""
    service = confirmed()
    service.saga().request_shipment("o-0")
    service.deliver_new()
    service.finish()
    service.saga().request_return("o-0", BACK)
    service.stream.stored.pop()
    service.come_to_rest()
    service.check()
    assert service.records()["o-0"].state == "returned"


def stop_at(service: Reversing, run: Callable[[], object], where: str) -> Task:
    """Start something and let it go on until it stands at an effect."""
    task = service.world.start("run", lambda: (run(), None)[1])
    while where not in task.where:
        service.world.step(task)
        assert not task.done, f"it ended without {where}"
    return task


@pytest.mark.parametrize("lost", ["event", "message"])
@pytest.mark.parametrize("state", ["accepted", "held", "confirmed"])
def test_a_cancel_that_was_lost_is_carried_out(state: str, lost: str) -> None:
    """Its process died before it published, or its message was purged, and the order was paid: it ends all the same."""
    service = Reversing(window=False)
    event = created("o-0", [(MUG, 1)])
    service.claim(event)
    service.stream.append(event)
    if state == "held":
        service.step("reserve", service.stream.stored[0])
    elif state == "confirmed":
        service.deliver_new()
        service.finish()
    if lost == "event":
        task = stop_at(
            service,
            lambda: service.saga().request_cancel("o-0", "customer"),
            "before publish of cancel_requested",
        )
        service.world.step(task, crash=True)
    else:
        service.saga().request_cancel("o-0", "customer")
    service.deliver_new()
    service.pending = [one for one in service.pending if one[0] != "undo"]
    service.finish()
    assert service.records()["o-0"].state == "confirmed"
    service.come_to_rest()
    service.check()
    assert service.records()["o-0"].state == "cancelled"
    assert service.gateway.refunds == {"o-0.cancel": ("ch_o-0", 1290)}
    order = Orders(service.orders_bucket).get("o-0")
    assert order is not None
    assert {"cancel_requested", "cancelled", "refunded"} <= {entry.event for entry in order.history}


def test_a_cancel_of_what_is_being_settled_is_carried_out() -> None:
    """A process that settles the order drops the note before the request is there; the one that asks dies."""
    service = confirmed()
    task = stop_at(
        service,
        lambda: service.saga().request_cancel("o-0", "customer"),
        "before update of cancel.o-0",
    )
    service.saga().settle_order("o-0")
    assert list(service.stock().notes.unsettled()) == []
    while "before publish" not in task.where:
        service.world.step(task)
        assert not task.done
    service.world.step(task, crash=True)
    service.come_to_rest()
    service.check()
    assert service.records()["o-0"].state == "cancelled"


def test_a_note_goes_with_no_decision_under_way() -> None:
    """A shipment is noted and not recorded when the order is settled; its process dies before it publishes anything."""
    service = confirmed()
    task = stop_at(service, lambda: service.saga().request_shipment("o-0"), "after update of refund.o-0")
    service.saga().settle_order("o-0")
    while not (task.where == "after update of order.o-0" and "shipped" in service.records()["o-0"].at):
        service.world.step(task)
        assert not task.done
    service.world.step(task, crash=True)
    service.come_to_rest()
    service.check()
    assert service.records()["o-0"].state == "shipped"


def test_a_chargeback_while_goods_are_put_back() -> None:
    """It changes the record of the return; the return ends all the same, with its goods in stock once."""
    service = confirmed()
    saga = service.saga()
    saga.request_shipment("o-0")
    saga.request_return("o-0", BACK)
    service.deliver_new()
    (stored,) = [one for one in service.stream.stored if name_of(one.event) == "return_requested"]
    task = stop_at(service, lambda: service.saga().bring_back(stored.event), "before update of order.o-0")  # type: ignore[arg-type]
    service.tell_of_chargeback("o-0", 100)
    while not task.done:
        service.world.step(task)
    assert service.records()["o-0"].state == "returned"
    service.finish()
    service.come_to_rest()
    service.check()
