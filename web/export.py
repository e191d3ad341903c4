"""Orders as a file: NDJSON for programs, CSV for spreadsheets, of as many orders as there are.

The file is written while it is sent, a few hundred orders at a time. A file that breaks off was not finished: its
connection ends without the last chunk, which every client reports.

Spreadsheets run what begins like a formula, and customers choose what they are called. So such a cell of the CSV
begins with an apostrophe; NDJSON has the text as it is.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Final

from flask import Blueprint, Response, current_app, request, stream_with_context

from tasks import service
from tasks.money import MINOR_UNITS
from tasks.service import Order
from tasks.text import harmless
from web.access import caller, needs
from web.api import visible
from web.problems import of_flaws, unavailable
from web.queries import read_query
from web.representation import order_json, timestamp

blueprint = Blueprint("export", __name__)

#: How many orders are written at once.
_CHUNK: Final = 100

COLUMNS: Final = (
    "order_id",
    "status",
    "customer_id",
    "placed_at",
    "changed_at",
    "items",
    "pieces",
    "total_amount",
    "currency",
    "reason",
)


class Exports:
    """How many exports of this process may run at once: each holds a thread."""

    def __init__(self, limit: int) -> None:
        self._slots = threading.BoundedSemaphore(limit)

    def take(self) -> None:
        """Take the place of one export.

        Raises:
          Problem: When all are taken.
        """
        if not self._slots.acquire(blocking=False):
            raise unavailable("Enough exports are running already: ask again when one has ended.", 10)

    def release(self) -> None:
        """Give the place of one export back."""
        self._slots.release()


@blueprint.get("/api/orders.ndjson")
@needs("order", "read")
def as_ndjson() -> Response:
    """Answer all orders that are asked for as one JSON object a line."""
    causes = caller().sees_causes
    write = current_app.json.dumps

    def lines(orders: Iterable[Order]) -> str:
        return "".join(
            f"{write(order_json(order, causes=causes), separators=(',', ':'))}\n" for order in orders
        )

    return _answer(lines, "ndjson", "application/x-ndjson")


@blueprint.get("/api/orders.csv")
@needs("order", "read")
def as_csv() -> Response:
    """Answer all orders that are asked for as a table."""
    causes = caller().sees_causes

    def lines(orders: Iterable[Order]) -> str:
        return _written(_row(order_json(order, causes=causes), order) for order in orders)

    return _answer(lines, "csv", "text/csv; charset=utf-8; header=present", _written([COLUMNS]))


def long_answer(pieces: Iterator[str], content_type: str) -> Response:
    """Return an answer that is written while it is made. It takes the place of an export.

    Raises:
      Problem: When all places are taken.
    """
    exports: Exports = current_app.extensions["exports"]
    exports.take()
    response = Response(stream_with_context(pieces), content_type=content_type)
    response.call_on_close(exports.release)
    # A proxy would have to collect all of it.
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _answer(
    lines: Callable[[Iterable[Order]], str], kind: str, content_type: str, head: str = ""
) -> Response:
    query = read_query({name: text for name, text in request.args.items() if name != "limit"})
    if query.flaws:
        raise of_flaws("malformed-request", query.flaws)
    exports: Exports = current_app.extensions["exports"]
    exports.take()
    try:
        orders = service.export_orders(query.before, visible(query.wanted))
        # Whatever is wrong is found before the answer begins.
        first = list(islice(orders, 1))
    except BaseException:
        exports.release()
        raise

    def written() -> Iterator[str]:
        if head:
            yield head
        left = chain(first, orders)
        while chunk := list(islice(left, _CHUNK)):
            yield lines(chunk)

    response = Response(stream_with_context(written()), content_type=content_type)
    response.call_on_close(exports.release)
    today = datetime.now(UTC).date().isoformat()
    response.headers["Content-Disposition"] = f'attachment; filename="orders-{today}.{kind}"'
    # A proxy would have to collect all of it.
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _row(body: dict[str, object], order: Order) -> list[str]:
    units = MINOR_UNITS[order.currency]
    places = len(str(units)) - 1
    total = f"{order.total / units:.{places}f}"
    times = [timestamp(entry.at) for entry in order.history]
    return [
        harmless(order.order_id),
        order.status,
        harmless(order.customer_id),
        min(times, default=""),
        max(times, default=""),
        harmless("; ".join(f"{item.quantity} × {item.sku}" for item in order.items)),
        str(sum(item.quantity for item in order.items)),
        total,
        order.currency,
        harmless(str(body.get("reason", ""))),
    ]


def _written(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
