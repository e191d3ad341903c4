"""The products in the API: what is sold, and for operators what changes that.

A change with an `Idempotency-Key` is made once, however often it is sent. One of the stock needs a key, because it
counts; the others leave a product as it is wanted, and may be sent again anyway.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, TypeVar

from flask import Blueprint, Response, current_app, jsonify, request

from tasks import app, service
from tasks.assortment import FEW, ChangeIdUsed, InvalidProduct, NoSuchProduct, Pieces, Wanted
from tasks.model import Flaw
from tasks.moments import moment_of
from tasks.product_files import InvalidFile, ProductFile, RowDone, RowError, as_flaws
from tasks.stock import StockBusy
from web.access import needs
from web.acts import acting
from web.api import idempotency_key, read_key
from web.export import long_answer
from web.problems import Problem, of_flaws, unavailable
from web.representation import import_json, product_json, stored_product_json

blueprint = Blueprint("products", __name__)

#: How many rows of an import are written at once.
_ROWS: Final = 50

T = TypeVar("T")


@blueprint.get("/api/products")
@needs("order", "read")
def list_products() -> Response:
    """Answer what is sold, with prices and stock."""
    return jsonify([product_json(product) for product in service.products()])


@blueprint.post("/api/products")
@needs("operate")
def import_products() -> Response:
    """Import products, prices and stock from CSV, or say what that would do."""
    key = _key()
    if request.mimetype != "text/csv":
        sent = request.mimetype or "no Content-Type"
        raise Problem(
            "unsupported-media-type",
            f"The file came with {sent!r}: send text/csv.",
            headers={"Accept": "text/csv"},
        )
    dry = request.args.get("dry_run", "false")
    if dry not in ("true", "false"):
        raise of_flaws("malformed-request", [Flaw("dry_run", "must be true or false.")])
    file = told(lambda: ProductFile(request.get_data(), key))
    planned = told(lambda: file.plan(app.assortment()))
    if dry == "true":
        return jsonify(import_json(planned, [], dry_run=True))
    if len(planned) <= FEW:
        rows = list(file.make(app.assortment(), acting()))
        done = [row for row in rows if isinstance(row, RowDone)]
        errors = [row for row in rows if isinstance(row, RowError)]
        return jsonify(import_json(done, errors, dry_run=False))
    rows_done = _written(file.make(app.assortment(), acting()))
    return long_answer(rows_done, "application/json")


def _written(rows: Iterator[RowDone | RowError]) -> Iterator[str]:
    """Yield what `import_json` returns, while the rows are imported."""
    errors: list[RowError] = []
    written = current_app.json.dumps
    yield '{"dry_run": false, "rows": ['
    comma = ""
    while some := list(islice(rows, _ROWS)):
        done = [one for one in some if isinstance(one, RowDone)]
        errors += [one for one in some if isinstance(one, RowError)]
        for row in import_json(done, [], dry_run=False)["rows"]:
            yield f"{comma}{written(row)}"
            comma = ", "
    yield f'], "errors": {written(import_json([], errors, dry_run=False)["errors"])}}}\n'


@blueprint.get("/api/products/<path:sku>")
@needs("operate")
def show_product(sku: str) -> Response:
    """Answer a product with all its prices."""
    return _answer(sku)


@blueprint.put("/api/products/<path:sku>")
@needs("operate")
def put_product(sku: str) -> Response:
    """Add a product, or change it; what the body leaves out stays as it is."""
    key, body, flaws = _key(), _body(), []
    texts: dict[str, str | None] = {}
    for field in ("name", "category", "from"):
        texts[field] = body.get(field)
        if not isinstance(texts[field], str | None):
            flaws.append(Flaw(field, "must be text, or left out."))
    price = body.get("unit_price_minor")
    if not _is_whole(price) and price is not None:
        flaws.append(Flaw("unit_price_minor", "must be a whole number of minor units, or left out."))
    since = None
    if not flaws and (text := texts["from"]) is not None:
        since = moment_of(text)
        if since is None:
            flaws.append(Flaw("from", "must be a time with its zone, such as 2026-12-01T08:00:00Z."))
    if flaws:
        raise of_flaws("malformed-request", flaws)
    return _change(sku, key, Wanted(name=texts["name"], category=texts["category"], price=price, since=since))


@blueprint.delete("/api/products/<path:sku>")
@needs("operate")
def withdraw_product(sku: str) -> Response:
    """Sell a product no more."""
    return _change(sku, _key(), Wanted(withdrawn=True))


@blueprint.delete("/api/products/<path:sku>/prices/<path:since>")
@needs("operate")
def drop_price(sku: str, since: str) -> Response:
    """Drop a planned price."""
    moment = moment_of(since)
    if moment is None:
        raise Problem("not-found", "The address does not name the time of a planned price.")
    return _change(sku, _key(), Wanted(dropped=moment))


@blueprint.post("/api/products/<path:sku>/stock")
@needs("operate")
def change_stock(sku: str) -> Response:
    """Add pieces, or set them to what was counted."""
    key = _key()
    if key is None:
        missing = Flaw("Idempotency-Key", "must name this change of the stock, so that it counts once.")
        raise of_flaws("malformed-request", [missing])
    body = _body()
    flaws = [
        Flaw(field, "must be a whole number of pieces.")
        for field in ("add", "count")
        if body.get(field) is not None and not _is_whole(body[field])
    ]
    reason = body.get("reason", "restock" if body.get("add") is not None else "")
    if not isinstance(reason, str):
        flaws.append(Flaw("reason", "must be text."))
    if flaws:
        raise of_flaws("malformed-request", flaws)
    pieces = Pieces(reason, body.get("add"), body.get("count"))
    return _change(sku, key, Wanted(pieces=pieces))


def told(change: Callable[[], T]) -> T:
    """Make a change; what forbids it becomes a problem."""
    try:
        return change()
    except InvalidProduct as error:
        raise of_flaws("invalid-product", error.flaws) from None
    except InvalidFile as error:
        raise of_flaws("invalid-product", as_flaws(error)) from None
    except NoSuchProduct as error:
        raise Problem("not-found", str(error)) from None
    except ChangeIdUsed:
        raise Problem(
            "idempotency-key-reused",
            "The Idempotency-Key was used before, for another change of this product.",
        ) from None
    except StockBusy as error:
        raise unavailable(f"Others keep changing it: {error}") from None


def change_id(key: str) -> str:
    """Return what a caller's key is called beside the change that it names."""
    return hashlib.sha256(idempotency_key(key).encode()).hexdigest()[:24]


def _change(sku: str, key: str | None, wanted: Wanted) -> Response:
    told(lambda: app.assortment().change(sku, key or secrets.token_hex(6), wanted, acting()))
    return _answer(sku)


def _answer(sku: str) -> Response:
    goods = told(lambda: app.assortment().look(sku))
    if goods.product is None:
        raise Problem("not-found", f"There is no product {sku[:64]!r}.")
    return jsonify(stored_product_json(goods.product, goods.level.pieces, app.now()))


def _key() -> str | None:
    key, flaw = read_key()
    if flaw is not None:
        raise of_flaws("malformed-request", [flaw])
    return None if key is None else change_id(key)


def _body() -> dict[str, Any]:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise of_flaws("malformed-request", [Flaw("body", "must be a JSON object.")])
    return body


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
