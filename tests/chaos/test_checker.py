"""The checker finds what a broken build would do: a promise that cannot be broken proves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.books import Books, Event, Placed
from tests.chaos.checker import check
from tests.chaos.faults import BY_NAME
from tests.chaos.trial import run
from tests.chaos.visitors import PRYING


def _event(sequence: int, name: str, order_id: str, **facts: Any) -> Event:
    return Event(sequence, name, order_id, float(sequence), **facts)


@pytest.fixture
def books() -> Books:
    """The books of two orders, one confirmed and one declined, as they should be."""
    events = [
        _event(1, "created", "a", customer_id="c-a", quantities={"MUG-01": 2}),
        _event(2, "created", "b", customer_id="c-b", quantities={"MUG-01": 1}),
        _event(3, "reserved", "a", total=2_000),
        _event(4, "reserved", "b", total=1_000),
        _event(5, "paid", "a", total=2_000),
        _event(6, "declined", "b"),
        _event(7, "confirmed", "a", total=2_000),
        _event(8, "rejected", "b"),
    ]
    log = [
        {"key": "1", "customer_id": "c-a", "order_id": "a", "accepted": True, "answer": "202", "at": 1.0}
        | {"quantities": {"MUG-01": 2}},
        {"key": "2", "customer_id": "c-b", "order_id": "b", "accepted": True, "answer": "202", "at": 2.0},
    ]
    model: dict[str, frozenset[str]] = {
        order: frozenset(event.name for event in events if event.order_id == order) for order in "ab"
    }
    charges = [{"order_id": "a", "status": "captured", "amount": 2_000, "key": "a"}]
    ledger = {
        "a": frozenset({"held", "paid", "confirmed"}),
        "b": frozenset({"held", "declined", "released"}),
    }
    placed = {
        "a": Placed("c-a", (("MUG-01", 2, 1_000),), 2_000),
        "b": Placed("c-b", (("MUG-01", 1, 1_000),), 1_000),
    }
    return Books(
        *(log, events, {"MUG-01": 10}, {"MUG-01": 8}, model, charges, [], {"orders": 0}, ledger),
        placed=placed,
        prices={"MUG-01": [(0, 1_000)]},
    )


def _broken(books: Books) -> set[str]:
    return {verdict.promise for verdict in check(books) if not verdict.kept}


def test_good_books_are_good(books: Books) -> None:
    """Every promise gets a verdict, and all were kept."""
    assert _broken(books) == set()
    assert len(check(books)) == 23


def test_an_ack_before_the_effect_is_found(books: Books) -> None:
    """The event was acked and its worker died: the order goes no further, and nothing waits."""
    events = [event for event in books.events if not (event.order_id == "a" and event.sequence > 3)]
    model = {**books.model, "a": frozenset({"created", "reserved"})}
    broken = _broken(replace(books, events=events, model=model, charges=[]))
    assert "each order has one final status" in broken
    assert "finished + dead letters + waiting = entered" in broken


def test_a_lost_publish_is_found(books: Books) -> None:
    """The client was told 202, and the event was never stored."""
    events = [event for event in books.events if event.order_id != "a"]
    model = {order: names for order, names in books.model.items() if order != "a"}
    broken = _broken(replace(books, events=events, model=model, charges=[], stock_after={"MUG-01": 10}))
    assert "accepted orders are stored" in broken


def test_a_lost_publish_of_a_last_event_is_found(books: Books) -> None:
    """The order was paid, and its confirmation was never stored."""
    events = [event for event in books.events if event.name != "confirmed"]
    model = {**books.model, "a": books.model["a"] - {"confirmed"}}
    broken = _broken(replace(books, events=events, model=model))
    assert {
        "each order has one final status",
        "a confirmed order is charged once, no other at all",
        "stock at the start = stock at the end + confirmed",
    } <= broken


@pytest.mark.parametrize(
    "charge",
    [
        {"order_id": "a", "status": "captured", "amount": 2_000, "key": "other"},
        {"order_id": "b", "status": "captured", "amount": 1_000, "key": "b"},
    ],
)
def test_a_charge_too_many_is_found(books: Books, charge: dict[str, Any]) -> None:
    """A second charge of a confirmed order, and one of an order that was not confirmed."""
    assert "a confirmed order is charged once, no other at all" in _broken(
        replace(books, charges=[*books.charges, charge])
    )


def test_stock_that_does_not_add_up_is_found(books: Books) -> None:
    """Taken twice, not given back, or below zero."""
    assert "stock at the start = stock at the end + confirmed" in _broken(
        replace(books, stock_after={"MUG-01": 6})
    )
    assert "stock at the start = stock at the end + confirmed" in _broken(
        replace(books, stock_before={"MUG-01": 1}, stock_after={"MUG-01": -1})
    )


def test_stock_that_nobody_could_read_is_found(books: Books) -> None:
    """Nothing at the start and nothing at the end would add up to anything."""
    assert "stock at the start = stock at the end + confirmed" in _broken(
        replace(books, stock_before={}, stock_after={})
    )


def test_two_final_statuses_and_two_orders_are_found(books: Books) -> None:
    """An order that is confirmed and rejected, and a request that became two orders."""
    both = replace(books, events=[*books.events, _event(9, "rejected", "a")])
    assert "each order has one final status" in _broken(both)
    second = {**books.log[0], "order_id": "c"}
    assert "a request that is repeated is one order" in _broken(replace(books, log=[*books.log, second]))


def test_what_is_stuck_is_found(books: Books) -> None:
    """Messages that wait, and dead letters that were not replayed."""
    assert "nothing is stuck" in _broken(replace(books, queues={"orders": 3}))
    letter = {"actor": "capture_payment", "reason": "retries exhausted", "error": ""}
    assert "nothing is stuck" in _broken(replace(books, dead=[letter]))


def test_another_order_than_was_accepted_is_found(books: Books) -> None:
    """Two different orders under one id were answered 202, and one is stored."""
    other = {**books.log[0], "quantities": {"MUG-01": 9}}
    assert "an accepted order is the one that was asked for" in _broken(
        replace(books, log=[*books.log, other])
    )


def test_a_step_that_the_ledger_does_not_know_is_found(books: Books) -> None:
    """A forged confirmation is shown, whether its text is or not; so is an order that never was."""
    promise = "what is shown is what the ledger says"
    model = {**books.model, "b": books.model["b"] | {"confirmed"}}
    assert promise in _broken(replace(books, model=model))
    assert promise in _broken(replace(books, model={**books.model, "never": frozenset({"created", "paid"})}))
    assert promise in _broken(replace(books, believed=frozenset({"a"})))


def _moved(order_id: str, amount: int, name: str) -> dict[str, Any]:
    return {"order_id": order_id, "amount": amount, "id": name, "key": f"{order_id}.{name}"}


@pytest.fixture
def returned(books: Books) -> Books:
    """The same books, after the first was refunded in part, shipped, charged back in part, and returned."""
    events = [
        *books.events,
        _event(9, "refund_requested", "a", total=300, about="r-1"),
        _event(10, "refunded", "a", total=300, about="r-1"),
        _event(11, "shipped", "a"),
        _event(12, "charged_back", "a", total=500, about="cb-1"),
        _event(13, "return_requested", "a"),
        _event(14, "refund_requested", "a", total=1_200, about="return"),
        _event(15, "returned", "a", about="back"),
        _event(16, "refunded", "a", total=1_200, about="return"),
    ]
    names = frozenset(event.name for event in events if event.order_id == "a")
    act = {"order_id": "a", "accepted": True}
    return replace(
        books,
        events=events,
        model={**books.model, "a": names},
        ledger={**books.ledger, "a": books.ledger["a"] | {"shipped", "returning", "returned"}},
        refunds=[_moved("a", 300, "r-1"), _moved("a", 1_200, "return")],
        chargebacks=[_moved("a", 500, "cb-1")],
        decided={"a": {"refunds": {"r-1": 300, "return": 1_200}, "chargebacks": {"cb-1": 500}}},
        acts=[
            *({**act, "kind": kind, "key": kind} for kind in ("refund", "ship", "back")),
            {
                "kind": "restock",
                "accepted": True,
                "sku": "MUG-01",
                "pieces": 7,
                "key": "d-1",
                "order_id": "b",
            },
        ],
        adjustments=[("MUG-01", "d-1", 7)],
        stock_after={"MUG-01": 17},
    )


def test_books_with_all_that_can_follow_are_good(returned: Books) -> None:
    """A refund, a shipment, a chargeback, a return and a delivery, as they should be."""
    assert _broken(returned) == set()


def test_what_did_not_go_back_is_found(returned: Books) -> None:
    """The refund of a return was never made; or more went back than was captured."""
    promise = "captured - refunded - charged back is what is owed"
    assert promise in _broken(replace(returned, refunds=returned.refunds[:1]))
    assert promise in _broken(replace(returned, refunds=[*returned.refunds, _moved("a", 1, "x")]))


@pytest.mark.parametrize("book", ["refunds", "chargebacks"])
def test_what_one_book_does_not_have_is_found(returned: Books, book: str) -> None:
    """A refund that was made twice, a chargeback that was not recorded, an event that was never published."""
    promise = "gateway, ledger and stream have the same refunds and chargebacks"
    gateway: list[dict[str, Any]] = getattr(returned, book)
    assert promise in _broken(replace(returned, **{book: [*gateway, gateway[0]]})) or book == "chargebacks"
    assert promise in _broken(replace(returned, **{book: gateway[1:]}))
    decided = {"a": {**returned.decided["a"], book: {}}}
    assert promise in _broken(replace(returned, decided=decided))
    name = "refunded" if book == "refunds" else "charged_back"
    events = [event for event in returned.events if event.name != name]
    assert promise in _broken(replace(returned, events=events))


def test_what_was_promised_and_not_done_is_found(returned: Books) -> None:
    """An accepted cancel, shipment, return, refund or restocking of which nothing came, or twice as much."""
    promise = "what was asked and accepted is carried out"
    for order_id, kind in (("b", "ship"), ("b", "back"), ("none", "cancel"), ("b", "refund")):
        act = {"order_id": order_id, "kind": kind, "key": "k", "accepted": True}
        assert promise in _broken(replace(returned, acts=[act]))
        assert promise not in _broken(replace(returned, acts=[{**act, "accepted": False}]))
    assert promise in _broken(replace(returned, adjustments=[]))
    assert promise in _broken(replace(returned, adjustments=returned.adjustments * 2))


def test_two_ends_after_confirmed_are_found(returned: Books) -> None:
    """Shipped and cancelled; returned and never shipped."""
    promise = "each order has one final status"
    assert promise in _broken(replace(returned, events=[*returned.events, _event(17, "cancelled", "a")]))
    events = [event for event in returned.events if event.name != "shipped"]
    assert promise in _broken(replace(returned, events=events))


def test_goods_of_a_return_are_counted(returned: Books) -> None:
    """Back in stock, or written off, but not as the books say; and a delivery that was not added."""
    promise = "stock at the start = stock at the end + confirmed"
    events = [
        replace(event, about="written off") if event.name == "returned" else event
        for event in returned.events
    ]
    assert promise in _broken(replace(returned, events=events))
    assert promise not in _broken(replace(returned, events=events, stock_after={"MUG-01": 15}))
    assert promise in _broken(replace(returned, stock_after={"MUG-01": 10}))


def test_a_state_of_which_nothing_was_said_is_found(returned: Books) -> None:
    """The ledger has the order as returned, and the stream has no event of that."""
    events = [event for event in returned.events if event.name != "returned"]
    model = {**returned.model, "a": returned.model["a"] - {"returned"}}
    assert "what is shown is what the ledger says" in _broken(replace(returned, events=events, model=model))


def _look(path: str, customers: list[str], **facts: Any) -> dict[str, Any]:
    return {"kind": "look", "path": path, "answer": 200, "signed_in": True, "own": False} | {
        "customers": customers,
        **facts,
    }


@pytest.mark.parametrize(
    "look",
    [
        _look("/api/orders/a", ["c-a"]),
        _look("/orders/a", []),
        _look("/api/orders", ["c-a", PRYING]),
        _look("/api/orders", [], signed_in=False),
        _look("/api/orders/p", [PRYING], signed_in=False, own=True),
        _look("/api/orders/p", [], own=True, answer=404),
    ],
)
def test_a_look_at_what_is_not_theirs_is_found(books: Books, look: dict[str, Any]) -> None:
    """Another's order, alone or in a list, a stranger who sees any, and one's own that is hidden."""
    right = [
        _look("/api/orders", [PRYING]),
        _look("/api/orders/p", [PRYING], own=True),
        _look("/orders/a", [], answer=404),
        _look("/api/orders", [], signed_in=False, answer=401),
    ]
    assert _broken(replace(books, visits=right)) == set()
    assert _broken(replace(books, visits=[*right, look])) == {
        "a customer sees their own orders, and no others"
    }


def test_a_probe_that_gets_no_answer_is_found(books: Books) -> None:
    """One that is refused met a process that was killed."""
    probes = [{"kind": "probe", "answer": answer, "seconds": 1.0} for answer in (200, 503, "ConnectionError")]
    assert _broken(replace(books, visits=probes)) == set()
    lost = {"kind": "probe", "answer": "Timeout", "seconds": 20.0}
    assert _broken(replace(books, visits=[*probes, lost])) == {"probes are answered beside slow clients"}


def test_an_order_that_failed_in_an_outage_is_found(books: Books) -> None:
    """If orders were to wait for the gateway; they go on when their dead letters are replayed, all the same."""
    given_up = _event(9, "failed", "a", error="retries exhausted: GatewayUnavailable: refused")
    model = {**books.model, "a": books.model["a"] | {"failed"}}
    failed = replace(books, events=[*books.events, given_up], model=model)
    assert _broken(failed) == set()
    assert _broken(replace(failed, patient=True)) == {
        "an outage of the gateway fails no order before its time"
    }


@pytest.mark.timeout(500)
def test_a_real_build_that_keeps_and_tells_wrongly_is_found(tmp_path: Path) -> None:
    """The service itself, broken in each place that prices, archives, restores, erases, tells and counts orders."""
    result = run(
        "single",
        [BY_NAME["gateway-slow"]],
        directory=tmp_path,
        seed=1,
        rate=6.0,
        settle=30.0,
        say=print,
        modules=[
            f"tests.chaos.broken_{name}"
            for name in ("prices", "archive", "restore", "erasure", "filter", "deliveries", "figures")
        ],
    )
    broken = {verdict.promise for verdict in result.verdicts if not verdict.kept}
    assert {
        "an order costs what it was placed with",
        "every event is in the stream or in the archive",
        "what comes back from the archive is what left",
        "who was erased is found nowhere, and totals stay",
        "what a webhook asked for is delivered or listed as failed",
        "webhooks are signed, and nothing comes that was not asked for",
        "the figures count what the read model shows",
    } <= broken, "\n".join(verdict.line() for verdict in result.verdicts)


@pytest.mark.timeout(400)
def test_a_real_build_that_believes_strangers_is_found(tmp_path: Path) -> None:
    """The service itself, broken in workers and front end, while strangers meddle and rivals choose the same ids."""
    result = run(
        "single",
        [BY_NAME["gateway-slow"]],
        directory=tmp_path,
        seed=1,
        rate=15.0,
        settle=15.0,
        say=print,
        modules=["tests.chaos.broken_belief"],
        web="tests.chaos.broken_claims",
    )
    broken = {verdict.promise for verdict in result.verdicts if not verdict.kept}
    assert {
        "what is shown is what the ledger says",
        "an accepted order is the one that was asked for",
    } <= broken, "\n".join(verdict.line() for verdict in result.verdicts)


@pytest.mark.timeout(400)
def test_a_real_build_that_charges_and_gives_back_wrongly_is_found(tmp_path: Path) -> None:
    """The service itself, broken where it charges and takes orders back, with a gateway that loses its answers."""
    result = run(
        "single",
        [BY_NAME["gateway-after-charge"]],
        directory=tmp_path,
        seed=1,
        rate=8.0,
        settle=15.0,
        say=print,
        modules=[
            f"tests.chaos.broken_{name}"
            for name in ("double_charge", "refund_keys", "forgotten_refund", "returns", "shipping", "restock")
        ],
        web="tests.chaos.broken_chargebacks",
    )
    broken = {verdict.promise for verdict in result.verdicts if not verdict.kept}
    assert {
        "a confirmed order is charged once, no other at all",
        "captured - refunded - charged back is what is owed",
        "gateway, ledger and stream have the same refunds and chargebacks",
        "what was asked and accepted is carried out",
        "each order has one final status",
        "stock at the start = stock at the end + confirmed",
    } <= broken, "\n".join(verdict.line() for verdict in result.verdicts)
