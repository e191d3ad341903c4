"""Whatever is cancelled, refunded or late, at any moment and killed anywhere, stock and money balance."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tasks.compensation import LATE_MS, NotCancellable, NotRefundable
from tasks.orders import Orders
from tasks.stock import RecordBehind
from tests.tasks.fakes import FakeStored
from tests.tasks.test_saga_properties import Service, created, no_waiting

__all__ = ["no_waiting"]


class Reversing(Service):
    """A service whose steps are tried again when the record cannot be read as it is."""

    skipped = 0

    def now(self) -> int:
        return super().now() + self.skipped

    def step(self, name: str, stored: FakeStored) -> None:
        try:
            super().step(name, stored)
        except RecordBehind:
            self.pending.append((name, stored))

    def ask(self, what: str, order_id: str) -> None:
        """Ask for the end of an order, or for a refund, if that can be."""
        with contextlib.suppress(NotCancellable, NotRefundable, RecordBehind):
            if what in ("customer", "deadline"):
                self.saga().request_cancel(order_id, what)
            elif what == "operator":
                self.saga().cancel(order_id, "asked for")
            else:
                self.saga().request_refund(order_id, what, 300, "")

    def look_again(self) -> None:
        """Do once what the periodic actor has done: settle what is not known to be settled."""
        for one in list(self.stock().notes.unsettled()):
            self.saga().settle_order(one.order_id)
        self.deliver_new()
        self.finish()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_what_was_captured_and_not_refunded_is_what_is_owed(seed: int) -> None:
    """Cancels, refunds and a deadline amid the steps, at once, repeated, killed: one end, stock and money balance."""
    chance = random.Random(seed)
    service = Reversing(window=chance.random() < 0.5, sweep_after=chance.choice([0, 20]))
    order_ids = [f"o-{number}" for number in range(3)]
    for order_id in order_ids:
        token = chance.choice(["tok_ok", "tok_ok", "tok_declined"])
        service.stream.append(created(order_id, [("MUG-01", 1)], token))
    service.deliver_new()
    kinds = ["customer", "operator", "deadline", "r-1", "r-1", "r-2"]
    asks = [(chance.choice(kinds), chance.choice(order_ids)) for _ in range(6)]
    while service.running or service.pending:
        if asks and chance.random() < 0.1:
            what, order_id = asks.pop()
            run = service.world.start(what, lambda what=what, order_id=order_id: service.ask(what, order_id))
            service.running.append((run, ("ask", (what, order_id))))  # type: ignore[arg-type]
        elif service.pending and len(service.running) < 4:
            service.start(service.pending.pop(chance.randrange(len(service.pending))))
        if not service.running:
            continue
        position = chance.randrange(len(service.running))
        name, asked = service.running[position][1]
        crash = chance.random() < 0.05
        service.go_on(position, crash=crash)
        if crash and name == "ask" and service.pending and service.pending[-1] == (name, asked):
            service.pending.pop()  # one who asked and got no answer asks again
            asks.append(asked)  # type: ignore[arg-type]
    for what, order_id in asks:
        service.ask(what, order_id)
    service.deliver_new()
    service.finish()
    service.look_again()
    service.skipped = LATE_MS
    service.look_again()

    assert list(service.stock().notes.unsettled()) == []
    refunded: Counter[str] = Counter()
    for charge_id, amount in service.gateway.refunds.values():
        refunded[charge_id] += amount
    for order_id, record in service.records().items():
        assert record.state in ("confirmed", "released", "rejected", "cancelled")
        captured = record.total if order_id in service.gateway.captured else 0
        back = refunded[f"ch_{order_id}"]
        if record.state == "confirmed":
            assert back == sum(refund.amount for refund in record.refunds) <= captured
        else:
            assert back == captured
        order = Orders(service.orders_bucket).get(order_id)
        assert order is not None
        assert order.status in {
            "confirmed": ("confirmed", "refunded"),
            "released": ("rejected",),
        }.get(record.state, (record.state,))
        assert {f"refunded.{refund.key}" for refund in record.refunds} == {
            f"refunded.{entry.detail['refund']}" for entry in order.history if entry.event == "refunded"
        }
    service.check_stock()
