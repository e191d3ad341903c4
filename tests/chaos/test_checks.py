"""The checker finds what breaks the promises of prices, archive, erasure, webhooks and figures."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from tests.chaos.books import Books, Event, Placed, Webhooks, Whereabouts
from tests.chaos.checker import check

PRICES = "an order costs what it was placed with"
KEPT = "every event is in the stream or in the archive"
BACK = "what comes back from the archive is what left"
ERASED = "who was erased is found nowhere, and totals stay"
TOLD = "what a webhook asked for is delivered or listed as failed"
SIGNED = "webhooks are signed, and nothing comes that was not asked for"
COUNTED = "the figures count what the read model shows"

SECRET = "whsec_" + base64.b64encode(b"a secret of this test and no other").decode()
NEW = 1_000.0


def _event(sequence: int, name: str, order_id: str, **facts: Any) -> Event:
    return Event(sequence, name, order_id, NEW + sequence, **facts)


def _request(name: str, event: str, order_id: str, **facts: Any) -> dict[str, Any]:
    """A signed request, as the receiver writes it down."""
    body = json.dumps(
        {"type": f"order.{event}", "data": {"order_id": order_id, "total_minor": 2_000, "detail": {}}}
    )
    moment = datetime.fromtimestamp(int(NEW) + 20, UTC)
    headers = {
        "webhook-id": name,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(SECRET).sign(name, moment, body),
    }
    coded = base64.b64encode(body.encode()).decode()
    return {"path": "/h/1", "headers": headers, "body": coded, "answer": 200, "at": NEW + 20} | facts


def _listed(name: str, event: str, order_id: str, state: str) -> dict[str, Any]:
    return {"id": name, "webhook_id": "wh_1", "order_id": order_id, "type": f"order.{event}", "state": state}


@pytest.fixture
def books() -> Books:
    """Two orders, both confirmed; the second, of a person who was erased, is in the archive."""
    events = [
        _event(1, "created", "b", customer_id="p-b", quantities={"MUG-01": 1}, total=1_000),
        _event(2, "reserved", "b", total=1_000),
        _event(3, "confirmed", "b", total=1_000),
        _event(4, "created", "a", customer_id="c-a", quantities={"MUG-01": 2}, total=2_000),
        _event(5, "reserved", "a", total=2_000),
        _event(6, "confirmed", "a", total=2_000),
    ]
    published = {event.sequence: b"%d" % event.sequence for event in events}
    names = frozenset({"created", "reserved", "confirmed"})
    states = frozenset({"held", "paid", "confirmed"})
    charges = [
        {"order_id": order_id, "status": "captured", "amount": amount, "key": order_id}
        for order_id, amount in (("a", 2_000), ("b", 1_000))
    ]
    log = [
        {"key": "1", "kind": "api", "customer_id": "p-b", "order_id": "b", "accepted": True, "at": NEW + 1},
        {"key": "2", "kind": "api", "customer_id": "c-a", "order_id": "a", "accepted": True, "at": NEW + 4},
    ]
    hook = {"path": "/h/1", "id": "wh_1", "secret": SECRET, "events": ["order.confirmed"]}
    figures = {"placed": 2, "confirmed": 2, "revenue": 3_000}
    return Books(
        *(log, events, {"MUG-01": 10}, {"MUG-01": 7}, {"a": names, "b": names}, charges, [], {}),
        ledger={"a": states | {"paid"}, "b": states},
        placed={
            "a": Placed("c-a", (("MUG-01", 2, 1_000),), 2_000),
            "b": Placed("", (("MUG-01", 1, 1_000),), 1_000),
        },
        prices={"MUG-01": [(0, 900), (500_000, 1_000)]},
        whereabouts=Whereabouts(
            published,
            {place: data for place, data in published.items() if place > 3},
            dict.fromkeys((1, 2, 3), b"anonymous"),
            orders=1,
        ),
        webhooks=Webhooks(
            [{**hook, "customer_id": None, "at": NEW}],
            [_request("msg_a", "confirmed", "a"), _request("msg_a", "confirmed", "a", answer=500)],
            [_listed("msg_a", "confirmed", "a", "delivered")],
        ),
        figures=figures,
        shown=dict(figures),
        erased=[{"customer_id": "p-b", "word": "p-b", "orders": ["b"], "certificate": {"certificate": "1"}}],
        jobs=[{"id": "1", "finished_at": 5}],
    )


def _broken(books: Books) -> set[str]:
    return {verdict.promise for verdict in check(books) if not verdict.kept} & {
        *(PRICES, KEPT, BACK, ERASED, TOLD, SIGNED, COUNTED)
    }


def test_good_books_are_good(books: Books) -> None:
    """Nothing is found in books that are as they should be."""
    assert _broken(books) == set()


@pytest.mark.parametrize(
    "placed",
    [
        Placed("c-a", (("MUG-01", 2, 1_001),), 2_002),
        Placed("c-a", (("MUG-01", 2, 1_000),), 2_001),
        Placed("c-a", (("MUG-01", 2, 900), ("MUG-01", 1, 200)), 2_000),
    ],
)
def test_another_price_is_found(books: Books, placed: Placed) -> None:
    """Charged otherwise than placed, lines that are not the total, and a price that held at no time of the order."""
    assert PRICES in _broken(replace(books, placed={**books.placed, "a": placed}))


def test_a_price_of_before_is_found(books: Books) -> None:
    """A price that was changed long before the order was placed does not hold; one of a moment ago may."""
    assert PRICES not in _broken(replace(books, prices={"MUG-01": [(0, 1_000), (999_000, 900)]}))
    assert PRICES in _broken(replace(books, prices={"MUG-01": [(0, 1_000), (900_000, 900)]}))
    assert PRICES in _broken(replace(books, prices={"MUG-01": [(0, 900), (1_010_000, 1_000)]}))


def test_an_event_in_neither_is_found(books: Books) -> None:
    """Gone, changed, or in a file that is damaged; what was erased may be gone, and anonymous."""
    where = books.whereabouts
    assert KEPT in _broken(replace(books, whereabouts=replace(where, stream={5: b"5", 6: b"6"})))
    assert KEPT in _broken(replace(books, whereabouts=replace(where, stream={**where.stream, 4: b"other"})))
    assert KEPT in _broken(replace(books, whereabouts=replace(where, damage=("a sum",))))
    assert KEPT not in _broken(replace(books, whereabouts=replace(where, archive={})))
    assert BACK in _broken(replace(books, whereabouts=replace(where, otherwise=("the ledger of b",))))


def test_what_is_left_of_a_person_is_found(books: Books) -> None:
    """A trace, a customer, another content, no order, no certificate, and an erasure that is not done."""
    for change in (
        {"traces": ["KV_dramatiq-deliveries"]},
        {"placed": {**books.placed, "b": Placed("p-b", (("MUG-01", 1, 1_000),), 1_000)}},
        {"placed": {**books.placed, "b": Placed("", (("MUG-01", 1, 900),), 900)}},
        {"placed": {"a": books.placed["a"]}},
        {"erased": [{**books.erased[0], "certificate": None}]},
        {"jobs": [{"id": "1", "finished_at": 0}]},
    ):
        assert ERASED in _broken(replace(books, **change))  # type: ignore[arg-type]


def _webhooks(books: Books, **changes: Any) -> Books:
    return replace(books, webhooks=replace(books.webhooks, **changes))


def test_what_was_not_told_is_found(books: Books) -> None:
    """Refused by the receiver and not listed as failed, listed as delivered and never accepted, or still waiting."""
    refused = [_request("msg_a", "confirmed", "a", answer=500)]
    assert TOLD in _broken(_webhooks(books, received=refused))
    assert TOLD in _broken(_webhooks(books, received=refused, log=[]))
    failed = [_listed("msg_a", "confirmed", "a", "failed")]
    assert TOLD not in _broken(_webhooks(books, received=refused, log=failed))
    assert TOLD in _broken(_webhooks(books, log=[_listed("msg_a", "confirmed", "a", "pending")]))
    later = [{**books.webhooks.hooks[0], "at": NEW + 100}]
    assert TOLD not in _broken(_webhooks(books, hooks=later, received=[], log=[]))


@pytest.mark.parametrize(
    "request_",
    [
        _request("msg_x", "paid", "a"),
        _request("msg_x", "confirmed", "none"),
        _request("msg_x", "confirmed", "a", headers={"webhook-id": "msg_x"}),
        _request("msg_x", "confirmed", "a", at=NEW + 200),
        _request("msg_x", "confirmed", "a", path="/h/1") | {"headers": _request("y", "paid", "a")["headers"]},
        _request("msg_a", "confirmed", "b"),
    ],
)
def test_a_request_that_was_not_asked_for_is_found(books: Books, request_: dict[str, Any]) -> None:
    """Another type, no order, no signature, an old one, that of another, and two contents under one id."""
    assert SIGNED in _broken(_webhooks(books, received=[*books.webhooks.received, request_]))


def test_a_customer_is_told_of_their_own_orders(books: Books) -> None:
    """A webhook of a customer gets nothing of another's."""
    mine = [{**books.webhooks.hooks[0], "customer_id": "c-a"}]
    assert _broken(_webhooks(books, hooks=mine)) == set()
    assert SIGNED in _broken(_webhooks(books, hooks=[{**mine[0], "customer_id": "c-b"}]))


def test_figures_that_miscount_are_found(books: Books) -> None:
    """One order too many, and money that was not counted."""
    assert COUNTED in _broken(replace(books, figures={**books.figures, "placed": 3}))
    assert COUNTED in _broken(replace(books, figures={"placed": 2, "confirmed": 2}))
