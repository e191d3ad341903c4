"""Exports: the orders of the list as a file, a part at a time, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import json
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import repeat
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from waitress.server import create_server

from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.streams import Range
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import app
from tasks import service as order_service
from tasks.audit import Act, Sought
from tasks.listing import OrderList
from tasks.model import HistoryEntry, Order, OrderedItem, Wanted
from tasks.settings import Settings
from tasks.text import harmless
from tests.web.stack import Stack
from web import create_app
from web.export import COLUMNS

DANGEROUS = "=HYPERLINK(\"http://evil\", 'x')"


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_both_kinds_have_the_orders_of_the_list(service: Stack) -> None:
    """Filtered as the list is, newest first; a name that is a formula stays a name."""
    placed = [
        service.order(("MUG-01", 1), ("NOTE-01", 2), customer_id=DANGEROUS),
        service.order(("MUG-01", 1), customer_id=DANGEROUS, payment_token="tok_declined"),
        service.order(("NOTE-01", 1), customer_id=DANGEROUS),
    ]
    ids = [service.final(order["order_id"])["order_id"] for order in reversed(placed)]
    asked = {"customer": DANGEROUS}
    lines = service.get("/api/orders.ndjson", params=asked)
    assert lines.headers["Content-Type"] == "application/x-ndjson"
    assert [json.loads(line)["order_id"] for line in lines.text.splitlines()] == ids
    listed = service.get("/api/orders", params=asked).json()["orders"]
    assert [json.loads(line) for line in lines.text.splitlines()] == listed
    table = service.get("/api/orders.csv", params=asked)
    assert table.headers["Content-Disposition"].startswith('attachment; filename="orders-')
    found = rows(table.text)
    assert tuple(found[0]) == COLUMNS
    assert [row["order_id"] for row in found] == ids
    assert {row["customer_id"] for row in found} == {f"'{DANGEROUS}"}
    assert [row["status"] for row in found] == ["confirmed", "rejected", "confirmed"]
    assert found[2]["items"] == "1 × MUG-01; 2 × NOTE-01"
    assert (found[2]["pieces"], found[2]["currency"]) == ("3", "EUR")
    assert float(found[2]["total_amount"]) == listed[2]["total_amount"]
    for narrowed, wanted in (
        ({"status": "rejected"}, ids[1:2]),
        ({"sku": "NOTE-01"}, [ids[0], ids[2]]),
        ({"failure": "DECLINED"}, ids[1:2]),
        ({"failure": "no such reason"}, []),
        ({"since": listed[1]["history"][0]["at"]}, ids[:2]),
    ):
        found = rows(service.get("/api/orders.csv", params={**asked, **narrowed}).text)
        assert [row["order_id"] for row in found] == wanted, narrowed


def test_a_query_that_cannot_be_read_is_a_problem(service: Stack) -> None:
    """It is refused before the file begins, with all that is wrong."""
    asked = {"since": "soon", "before": "x", "failure": "y" * 101}
    answer = service.get("/api/orders.csv", params=asked)
    assert answer.status_code == 400
    assert {error["field"] for error in answer.json()["errors"]} == set(asked)


@given(st.text(max_size=20))
def test_no_cell_is_a_formula(text: str) -> None:
    """Whatever a text begins with, a cell begins with nothing that a spreadsheet runs, and keeps the text."""
    cell = harmless(text)
    assert not cell.lstrip().startswith(tuple("=+-@＝＋－＠"))
    assert cell[:1] not in ("\t", "\r", "\n")
    assert cell in (text, f"'{text}")


class Many:
    """A store with very many orders, none of which is in memory before it is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def newest_created(self) -> int:
        return self.count

    def range(self) -> Range:
        return Range(1, self.count)

    def created(self, start: int, end: int) -> Iterator[tuple[int, OrderCreated]]:
        for place in range(max(1, start), min(end, self.count + 1)):
            item = OrderItem(sku="MUG-01", quantity=1)
            yield place, OrderCreated(order_id=f"o-{place}", customer_id="c-1", items=[item])

    def find(self, wanted: Wanted, before: int) -> None:
        return None

    def anonymous(self, before: int) -> Iterator[tuple[int, str]]:
        return iter(())

    all = anonymous

    def get(self, order_id: str) -> Order:
        place = int(order_id[2:])
        entry = HistoryEntry("created", datetime.fromtimestamp(place, UTC), {}, place)
        return Order(order_id, "confirmed", "c-1", [OrderedItem("MUG-01", 1, 1290)], 1290, "EUR", [entry])

    def several(self, order_ids: Sequence[str]) -> dict[str, Order]:
        return {order_id: self.get(order_id) for order_id in order_ids}


@pytest.fixture
def front_end() -> Any:
    return create_app(Settings(access="open", host="127.0.0.1"))


@pytest.mark.parametrize(("kind", "orders"), [("csv", 5_000), ("ndjson", 20_000)])
def test_an_export_holds_a_part_at_a_time(
    front_end: Any, monkeypatch: pytest.MonkeyPatch, kind: str, orders: int
) -> None:
    """Very many orders need no more memory than a thousand do, and far less than they would take as a list."""

    def peak(count: int) -> int:
        many = Many(count)
        listed = OrderList(many, many, many)  # type: ignore[arg-type]
        monkeypatch.setattr(order_service, "_list", lambda: listed)
        tracemalloc.start()
        try:
            with front_end.test_client() as client:
                answer = client.get(f"/api/orders.{kind}", buffered=False)
                lines = sum(chunk.count(b"\n") for chunk in answer.iter_encoded())
                answer.close()
            assert lines == count + (kind == "csv")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1_000), peak(orders)
    assert large < 2 * small + 1_000_000
    assert large < 5_000_000


def test_an_export_that_breaks_off_is_noticed(front_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client gets an error, not a file that looks whole."""

    def breaks(*_: object) -> Iterator[Order]:
        for place in range(500, 0, -1):
            yield Many(500).get(f"o-{place}")
        raise BrokerConnectionError("the store went away")

    monkeypatch.setattr(order_service, "export_orders", breaks)
    server = create_server(front_end, host="127.0.0.1", port=0)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.effective_port}/api/orders.ndjson"
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(address, timeout=30)
    finally:
        server.close()


class Acts:
    """An audit with an act that comes again and again."""

    def all(self, sought: Sought) -> Iterator[Act]:
        return repeat(Act("a", "order.cancel", "o-1", "ann", "operator", "api", "", 0), 1_000)


@pytest.mark.parametrize("address", ["/api/orders.csv", "/api/audit?format=csv", "/api/audit?format=ndjson"])
def test_exports_hold_some_threads_only(
    front_end: Any, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Further ones are told when to come back; one that ends or is given up makes room."""
    many = Many(1_000)
    listed = OrderList(many, many, many)  # type: ignore[arg-type]
    monkeypatch.setattr(order_service, "_list", lambda: listed)
    monkeypatch.setattr(app, "audit_log", Acts)
    client = front_end.test_client()
    running = []
    while len(running) < Settings().web_threads:
        answer = client.get(address, buffered=False)
        if answer.status_code != 200:
            break
        running.append(answer)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "10")
    assert 1 <= len(running) < Settings().web_threads / 2
    running.pop().close()
    assert client.get(address, buffered=False).status_code == 200
