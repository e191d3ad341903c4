"""The pages on which operators look after products, prices and stock; `python -m tasks.sell` does the same.

Each form carries a key, so one that is sent twice changes something once. An import is checked before it is made, and
its text comes back with what is wrong, so that it can be corrected in place.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from flask import Blueprint, Response, request
from markupsafe import Markup, escape

from tasks import app, money
from tasks.assortment import (
    MAX_CATEGORY,
    MAX_NAME,
    MAX_REASON,
    ChangeIdUsed,
    Goods,
    InvalidProduct,
    NoSuchProduct,
    Pieces,
    Wanted,
)
from tasks.catalogue import CURRENCY
from tasks.levels import Adjustment
from tasks.model import Flaw
from tasks.moments import moment_of
from tasks.numbers import whole_number
from tasks.product_files import COLUMNS, InvalidFile, ProductFile, RowDone, RowError
from web.access import needs
from web.acts import acting
from web.export import long_answer
from web.formats import formats
from web.problems import Problem
from web.products import change_id, told
from web.rendering import instant, page, see_other, written_page

blueprint = Blueprint("product_pages", __name__)

#: How many products a page of the list has, and the last page that can be asked for.
PER_PAGE: Final = 50
MAX_PAGE: Final = 10_000

#: How many rows of an import are shown before it is made.
MAX_SHOWN: Final = 500

#: A time in the words for a change.
_MOMENT: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z)", re.ASCII)

_SUBMISSION: Final = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)
_WHOLE: Final = re.compile(r"-?[0-9]{1,10}", re.ASCII)


@blueprint.get("/admin/products")
@needs("operate")
def list_products() -> Response:
    """Show all products, those that are not sold too, and the form for a new one."""
    return _list()


@blueprint.post("/admin/products")
@needs("operate")
def add_product() -> Response:
    """Add a product."""
    form = request.form
    errors: dict[str, str] = {}
    sku = form.get("sku", "").strip()
    wanted = _wanted(form, errors)
    if not errors and app.catalogue().product(sku) is not None:
        errors["sku"] = f"There is a product {sku} already: change it on its own page."
    if not errors:
        _make(sku, wanted, errors)
    return _list(errors=errors, typed=form) if errors else see_other(_address(sku))


@blueprint.get("/admin/products/<path:sku>")
@needs("operate")
def show_product(sku: str) -> Response:
    """Show a product: its prices, its stock, and who changed them."""
    return _show(sku)


@blueprint.post("/admin/products/<path:sku>")
@needs("operate")
def change_product(sku: str) -> Response:
    """Take one of the forms of a product's page."""
    form = request.form
    errors: dict[str, str] = {}
    wanted = _wanted(form, errors)
    if not errors:
        _make(sku, wanted, errors)
    return _show(sku, errors=errors, typed=form) if errors else see_other(_address(sku))


@blueprint.get("/admin/product-import")
@needs("operate")
def show_import() -> Response:
    """Show the form for an import."""
    return page("product_import.html", text="", columns=COLUMNS)


@blueprint.post("/admin/product-import")
@needs("operate")
def import_products() -> Response:
    """Check an import, or make it."""
    upload = request.files.get("file")
    content = upload.read() if upload is not None and upload.filename else b""
    # A browser sends the lines of a form with CR and LF.
    content = content or request.form.get("text", "").replace("\r\n", "\n").encode()
    shown: dict[str, Any] = {"text": content.decode("utf-8-sig", "replace"), "columns": COLUMNS}
    try:
        file = ProductFile(content)
        planned = file.plan(app.assortment())
    except InvalidFile as error:
        return page("product_import.html", status=422, wrong=error.errors, checked=True, **shown)
    if "make" not in request.form or (upload is not None and upload.filename):
        return page(
            "product_import.html",
            rows=planned[:MAX_SHOWN],
            count=len(planned),
            checked=True,
            **shown,
        )
    left_out: list[RowError] = []
    rows = _made(file.make(app.assortment(), acting()), left_out)
    written = written_page("product_import.html", rows=rows, left_out=left_out, made=True, **shown)
    return long_answer(written, "text/html; charset=utf-8")


def _made(rows: Iterable[RowDone | RowError], left_out: list[RowError]) -> Iterator[RowDone]:
    """Yield the rows that were imported, and note those that were not."""
    for one in rows:
        if isinstance(one, RowDone):
            yield one
        else:
            left_out.append(one)


def _wanted(form: Mapping[str, str], errors: dict[str, str]) -> Wanted:
    """Return the change that a form asks for, noting by control what cannot be read."""
    match form.get("act"):
        case "withdraw":
            return Wanted(withdrawn=True)
        case "drop":
            return Wanted(dropped=moment_of(form.get("since", "")) or 0)
        case "stock":
            return Wanted(pieces=_pieces(form, errors))
    price = since = None
    if text := form.get("price", "").strip():
        price = money.from_text(text, CURRENCY)
        if price is None:
            errors["price"] = "Enter a price such as 12.90."
    if text := form.get("from", "").strip():
        since = moment_of(f"{text}Z")
        if since is None:
            errors["from"] = "Choose the time from the calendar."
    if form.get("act") == "price":
        if price is None:
            errors.setdefault("price", "Enter a price such as 12.90.")
        return Wanted(price=price, since=since)
    pieces = _pieces({**form, "pieces": form["stock"]}, errors) if form.get("stock", "").strip() else None
    # A field that is shown empty is meant to be wrong, not to be left out.
    name, category = form.get("name", ""), form.get("category", "").strip() or None
    return Wanted(name=name, category=category, price=price, since=since, pieces=pieces)


def _pieces(form: Mapping[str, str], errors: dict[str, str]) -> Pieces | None:
    number, reason = form.get("pieces", "").strip(), form.get("reason", "").strip()
    if _WHOLE.fullmatch(number) is None:
        errors["pieces"] = "Enter a whole number of pieces."
        return None
    if form.get("kind") == "count":
        if not reason:
            errors["reason"] = "Say why the count is corrected."
        return Pieces(reason, counted=int(number))
    return Pieces(reason or "restock", added=int(number))


#: The controls of flaws that have another name.
_CONTROLS: Final = {"unit_price_minor": "price", "add": "pieces", "count": "pieces"}


def _make(sku: str, wanted: Wanted, errors: dict[str, str]) -> None:
    submission = request.form.get("submission", "")
    key = submission if _SUBMISSION.fullmatch(submission) else secrets.token_urlsafe(18)
    try:
        told_of = change_id(f"form-{key}")
        assortment = app.assortment()
        try:
            assortment.change(sku, told_of, wanted, acting())
        except ChangeIdUsed:
            # Came back with the browser's Back button and was changed: that is another change.
            assortment.change(sku, secrets.token_hex(12), wanted, acting())
    except InvalidProduct as error:
        for flaw in error.flaws:
            errors.setdefault(_CONTROLS.get(flaw.field, flaw.field), _for_people(flaw))
    except NoSuchProduct as error:
        raise Problem("not-found", str(error)) from None


def _for_people(flaw: Flaw) -> str:
    field = _CONTROLS.get(flaw.field, flaw.field)
    return f"The {'time' if field == 'from' else field} {flaw.problem}"


def _list(*, errors: dict[str, str] | None = None, typed: Mapping[str, str] | None = None) -> Response:
    now, words = app.now(), request.args.get("q", "").strip()[:MAX_NAME]
    levels = app.stock_store().available()
    found = [
        product
        for product in app.catalogue().products()
        if all(word in f"{product.name} {product.sku}".casefold() for word in words.casefold().split())
    ]
    pages = max(1, -(-len(found) // PER_PAGE))
    number = min(whole_number(request.args.get("page", "1"), 1, MAX_PAGE) or 1, pages)
    shown = found[(number - 1) * PER_PAGE : number * PER_PAGE]
    return page(
        "products.html",
        status=422 if errors else 200,
        products=[
            (product, product.price_at(now), levels.get(product.sku, 0), product.planned_at(now))
            for product in shown
        ],
        found=len(found),
        q=words,
        page=number,
        pages=pages,
        categories=sorted({product.category for product in app.catalogue().products()}),
        currency=CURRENCY,
        most=_MOST,
        errors=errors or {},
        typed=typed or {},
        submission=secrets.token_urlsafe(18),
    )


_MOST: Final = {"name": MAX_NAME, "category": MAX_CATEGORY, "reason": MAX_REASON}


def _show(
    sku: str, *, errors: dict[str, str] | None = None, typed: Mapping[str, str] | None = None
) -> Response:
    goods: Goods = told(lambda: app.assortment().look(sku))
    product, now = goods.product, app.now()
    if product is None:
        raise Problem("not-found", f"There is no product {sku[:64]!r}.")
    return page(
        "product.html",
        status=422 if errors else 200,
        product=product,
        price=product.price_at(now),
        planned=[(_at(one.since), one) for one in product.planned_at(now)],
        stock=goods.level.pieces,
        changes=_changes(goods),
        categories=sorted({one.category for one in app.catalogue().products()}),
        currency=CURRENCY,
        plain=money.to_plain_text,
        most=_MOST,
        errors=errors or {},
        typed=typed or {},
        submission=secrets.token_urlsafe(18),
    )


def _changes(goods: Goods) -> list[dict[str, Any]]:
    """Return what people changed of a product and its stock, newest first."""
    made = [] if goods.product is None else [one for one in goods.product.changes if one.what]
    changes = [(one.at, one.by, one.what) for one in made]
    changes += [(one.at, one.by, _pieces_said(one)) for one in goods.level.adjustments]
    return [
        {"at": _at(at), "by": by, "what": _said(what)} for at, by, what in sorted(changes, reverse=True)[:50]
    ]


def _pieces_said(one: Adjustment) -> str:
    """Return what was changed of the stock: 20 pieces came in: a delivery."""
    number, noun = formats().number(abs(one.pieces)), "piece" if abs(one.pieces) == 1 else "pieces"
    if not one.pieces:
        return f"Stock counted, as it was: {one.reason}"
    return f"{number} {noun} {'came in' if one.pieces > 0 else 'went out'}: {one.reason}"


def _said(what: str) -> Markup:
    """Return what was changed as a sentence, with the times in it as the page shows times."""
    first, *others = _MOMENT.split(what[:1].upper() + what[1:])
    said = escape(first)
    for moment, text in zip(others[::2], others[1::2], strict=True):
        at = moment_of(moment)
        said += (escape(moment) if at is None else instant(at)) + escape(text)
    return said


def _at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _address(sku: str) -> str:
    return f"/admin/products/{quote(sku, safe='')}"
