"""The list of orders, as programs and as people ask for it: filters, search, counts, pages."""

from __future__ import annotations

import html
import re
import secrets
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.web.stack import Stack


@pytest.fixture(scope="module")
def mine(service: Stack) -> dict[str, Any]:
    """Three orders of a customer of their own: two that are confirmed, one that is rejected; newest first."""
    customer = f"c-{secrets.token_hex(4)}"
    placed = [
        service.order(("MUG-01", 1), customer_id=customer),
        service.order(("NOTE-01", 2), ("MUG-01", 1), customer_id=customer),
        service.order(("NOTE-01", 1), customer_id=customer, payment_token="tok_declined"),
    ]
    orders = [service.final(order["order_id"]) for order in reversed(placed)]
    return {"customer": customer, "orders": orders}


def ids(service: Stack, **asked: Any) -> list[str]:
    """Return the ids on all pages of the API's list, followed by its links."""
    found: list[str] = []
    address = f"/api/orders?{urlencode(asked)}"
    while True:
        answer = service.get(address)
        assert answer.status_code == 200, answer.text
        found += [order["order_id"] for order in answer.json()["orders"]]
        if "next" not in answer.links:
            return found
        address = answer.links["next"]["url"]


@pytest.mark.parametrize("limit", [1, 100])
def test_the_api_filters(service: Stack, mine: dict[str, Any], limit: int) -> None:
    """Each filter alone with the customer's, in pages of every size; the links keep what was asked for."""
    customer, orders = mine["customer"], mine["orders"]
    third, second, first = (order["order_id"] for order in orders)
    placed_at = [order["history"][0]["at"] for order in orders]
    day = placed_at[0][:10]
    after = (datetime.fromisoformat(day) + timedelta(days=1)).date().isoformat()

    def found(**asked: Any) -> list[str]:
        return ids(service, customer=customer, limit=limit, **asked)

    assert found() == [third, second, first]
    assert found(status="confirmed") == [second, first]
    assert found(status="rejected") == [third]
    assert found(status="failed") == []
    assert found(sku="MUG-01") == [second, first]
    assert found(sku="NO-SUCH") == []
    assert found(since=placed_at[1]) == [third, second]
    assert found(until=placed_at[1]) == [first]
    assert third in found(since=day)
    assert found(since=after) == []
    assert found(since=placed_at[2], until=placed_at[0], status="confirmed", sku="NOTE-01") == [second]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"status": "lost"}, "status"),
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-02-30"}, "until"),
        ({"until": "2026-01-01T10:00:00"}, "until"),
        ({"customer": "c" * 65}, "customer"),
        ({"sku": "\u202e"}, "sku"),
        ({"before": "x"}, "before"),
        ({"limit": "0"}, "limit"),
    ],
)
def test_a_query_that_cannot_be_read(service: Stack, asked: dict[str, str], field: str) -> None:
    """The problem names the parameter."""
    answer = service.get("/api/orders", params=asked)
    assert answer.status_code == 400
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_all_that_is_wrong_with_a_query_is_said_at_once(service: Stack) -> None:
    """Every parameter that cannot be read is in the errors of one problem."""
    asked = {"limit": "many", "before": "x", "status": "lost", "since": "x", "until": "y", "customer": "\n"}
    answer = service.get("/api/orders", params=asked)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert {error["field"] for error in answer.json()["errors"]} == set(asked)


def test_the_page_filters_and_counts(service: Stack, mine: dict[str, Any]) -> None:
    """The page shows the same, with how many there are of each status; choosing one keeps the other filters."""
    customer = mine["customer"]
    text = service.get("/orders", params={"customer": customer, "status": "rejected"}).text
    assert re.findall(r'data-order="([^"]*)"', text) == [mine["orders"][0]["order_id"]]
    counts = dict(re.findall(r'class="chip"[^>]*>([^<]*?) <span class="count">([^<]*)<', text))
    assert counts == {"All": "3", "Confirmed": "2", "Rejected": "1"}
    links = [html.unescape(link) for link in re.findall(r'class="chip" href="([^"]*)"', text)]
    assert all(f"customer={customer}" in link for link in links)
    assert "http-equiv" not in text


def test_search_finds_parts_of_ids(service: Stack, mine: dict[str, Any]) -> None:
    """A whole order id leads to the order, a part of one or of a customer's id to a list."""
    order_id = mine["orders"][0]["order_id"]
    exact = service.get("/orders", params={"q": order_id}, allow_redirects=False)
    assert (exact.status_code, exact.headers["Location"]) == (303, f"/orders/{order_id}")
    by_end = service.get("/orders", params={"q": order_id[-8:].upper()}).text
    assert re.findall(r'data-order="([^"]*)"', by_end) == [order_id]
    by_customer = service.get("/orders", params={"q": mine["customer"][2:]}).text
    assert len(re.findall(r"data-order=", by_customer)) == 3
    nothing = service.get("/orders", params={"q": "no order has this"})
    assert nothing.status_code == 200
    assert "No order fits." in nothing.text


def test_a_wrong_filter_is_explained_at_its_field(service: Stack) -> None:
    """The page says all at once, in words, and ties each to its control."""
    answer = service.get("/orders", params={"since": "soon", "customer": "c" * 65, "sku": "\u202e"})
    assert answer.status_code == 400
    assert "Choose the first day from the calendar." in answer.text
    for control in ("since", "customer", "sku"):
        tag = re.search(rf'<(?:input|select)[^>]* id="{control}"[^>]*>', answer.text)
        assert tag is not None
        assert f'aria-describedby="{control}-error"' in tag[0]
        assert f'<p class="field-error" id="{control}-error">' in answer.text
        assert f'<a href="#{control}">' in answer.text
