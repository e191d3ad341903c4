"""The form that places orders: the catalogue in pages, with search and categories, and what is wrong with the form.

The form keeps what was typed by itself: whatever button is pressed, all its fields are sent, and come back. Quantities
of products that the shown page of the catalogue does not have are carried in hidden fields. So a search or another page
loses nothing, and the server keeps nothing; a script only replaces the part of the page that changes.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from flask import Blueprint, Response, current_app, request

from tasks import service
from tasks.model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, Flaw
from tasks.numbers import whole_number
from tasks.service import InvalidOrder, Product
from tasks.settings import Settings
from web import order_list, words
from web.access import caller, needs
from web.api import accept, idempotency_key
from web.formats import formats
from web.problems import Problem
from web.rendering import page, see_other

blueprint = Blueprint("order_form", __name__)

#: How many products a page of the catalogue has. A catalogue that fits on one needs no search.
SHELF: Final = 24
#: From how many pieces on the form says how many there are left, as a warning.
FEW: Final = 20
#: The category that is no category: what was chosen so far.
CHOSEN: Final = "*"

# The test cards of the gateway's stand-in, by their tokens; a real gateway hands out tokens of its own.
TEST_CARDS: Final = (
    ("tok_visa", "Test card"),
    ("tok_declined", "Test card that is declined"),
    ("tok_insufficient", "Test card without money"),
    ("tok_expired", "Test card that has expired"),
)
# Which symbols static/products.svg has; it is asked by the first part of the sku.
PICTURES: Final = frozenset({"mug", "tee", "note", "bag", "lamp", "kettle", "chair", "print"})
_SUBMISSION: Final = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)
_ITEM_FIELD: Final = re.compile(r"items\[(\d+)\](?:\.(\w+))?")
_MAX_SEARCH: Final = 64


@dataclass
class Form:
    """What was typed into the form, and what is wrong with it."""

    submission: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    customer_id: str = ""
    payment_token: str = ""
    quantities: dict[str, str] = field(default_factory=dict)
    # What products cost in the form that was sent, as text.
    prices: dict[str, str] = field(default_factory=dict)
    # From the id of the form's control to what is wrong with it; "" is the form as a whole.
    errors: dict[str, str] = field(default_factory=dict)
    search: str = ""
    category: str = ""
    page: int = 1

    def quantity(self, sku: str) -> int:
        """How many pieces of a product were chosen; 0 for what is no number."""
        return whole_number(self.quantities.get(sku, ""), 0, MAX_QUANTITY) or 0

    def is_chosen(self, sku: str) -> bool:
        """Whether something was typed as a product's quantity."""
        return self.quantities.get(sku, "") not in ("", "0")


@dataclass(frozen=True)
class Shelf:
    """The page of the catalogue that the form shows.

    Attributes:
      products: What is on it.
      carried: What was chosen and is not on it.
      first: The number of its first product among those that were found.
      found: How many products the search and the category leave.
      categories: How many products each has.
      large: Whether the catalogue needs pages.
    """

    products: list[Product]
    carried: list[Product]
    first: int
    found: int
    total: int
    page: int
    pages: int
    categories: Mapping[str, int]
    large: bool


@blueprint.get("/")
@needs("order")
def home() -> Response:
    """Show the form, the catalogue and the newest orders."""
    return _form_page(Form(), service.products())


@blueprint.post("/")
@needs("order")
def look() -> Response:
    """Show the form again as it was sent, with another part of the catalogue."""
    return _form_page(_read_form(request.form), service.products())


@blueprint.post("/catalogue")
@needs("order")
def catalogue() -> Response:
    """Answer the part of the form that another part of the catalogue changes, for the page's script."""
    form, products = _read_form(request.form), service.products()
    return page("_catalogue.html", **_catalogue(form, products))


@blueprint.post("/orders")
@needs("order")
def place_order() -> Response:
    """Take the form; answer with the way to the order's page, or with the form and what is wrong with it."""
    form, products = _read_form(request.form), service.products()
    items = [
        {"sku": sku, "quantity": whole_number(text, 1, MAX_QUANTITY) or text}
        for sku, text in form.quantities.items()
        if form.is_chosen(sku)
    ]
    body: dict[str, Any] = {"customer_id": form.customer_id, "items": items}
    if form.payment_token:
        body["payment_token"] = form.payment_token
    key = f"form-{form.submission}"
    try:
        order = service.parse_order_json(json.dumps(body).encode(), None, idempotency_key(key))
    except InvalidOrder as error:
        for flaw in error.flaws:
            control, text = _for_people(flaw, items)
            form.errors.setdefault(control, text)
    # One who sends an order again is shown that order, although it took the last pieces.
    if (wrong := _missing(form, products) | _repriced(form, products)) and not service.was_placed(
        idempotency_key(key)
    ):
        form.errors |= {control: text for control, text in wrong.items() if control not in form.errors}
    if form.errors:
        return _form_page(form, products, 422)
    try:
        accepted = accept(order, key)
    except Problem as problem:
        if problem.kind.slug != "idempotency-key-reused":
            raise
        # Came back with the browser's Back button and was changed: that is a new order.
        form.submission = Form().submission
        form.errors[""] = "This form was sent before with other contents. Send it again for a second order."
        return _form_page(form, products, 409)
    return see_other(f"/orders/{quote(accepted.order.order_id, safe='')}")


def _form_page(form: Form, products: list[Product], status: int = 200) -> Response:
    settings: Settings = current_app.extensions["settings"]
    if len(products) > SHELF and any(control.startswith("quantity-") for control in form.errors):
        # What is wrong has to be in sight.
        form.search, form.category, form.page = "", CHOSEN, 1
    return page(
        "home.html",
        status=status,
        **_catalogue(form, products),
        total=_total(form, products),
        orders=order_list.newest(),
        test_cards=TEST_CARDS if settings.test_cards else (),
    )


def _catalogue(form: Form, products: list[Product]) -> dict[str, Any]:
    return {
        "form": form,
        "shelf": _shelf(form, products),
        "warnings": _short(form, products),
        "pictures": PICTURES,
        "few": FEW,
        "found_text": _found_text,
        "most": MAX_QUANTITY,
        "chosen": CHOSEN,
    }


def _shelf(form: Form, products: list[Product]) -> Shelf:
    """Return the page of the catalogue that was asked for, or the nearest that there is."""
    found = [product for product in products if _is_wanted(form, product)]
    pages = max(1, -(-len(found) // SHELF))
    number = min(form.page, pages)
    shown = found[(number - 1) * SHELF : number * SHELF]
    on_shelf = {product.sku for product in shown}
    return Shelf(
        products=shown,
        carried=[one for one in products if form.is_chosen(one.sku) and one.sku not in on_shelf],
        first=(number - 1) * SHELF + 1,
        found=len(found),
        total=len(products),
        page=number,
        pages=pages,
        categories=Counter(product.category for product in products),
        large=len(products) > SHELF,
    )


def _found_text(shelf: Shelf) -> str:
    """Return what of the catalogue is in sight, in words."""
    number = formats().number
    if not shelf.found:
        return "No product fits."
    if shelf.pages == 1:
        return f"{number(shelf.found)} product{'' if shelf.found == 1 else 's'}"
    last = shelf.first + len(shelf.products) - 1
    return f"Products {number(shelf.first)} to {number(last)} of {number(shelf.found)}"


def _is_wanted(form: Form, product: Product) -> bool:
    if form.category == CHOSEN:
        return form.is_chosen(product.sku)
    name = product.name.casefold()
    return form.category in ("", product.category) and all(
        word in name for word in form.search.casefold().split()
    )


def _missing(form: Form, products: list[Product]) -> dict[str, str]:
    """Return what `_short` does, unless what there is would be offered."""
    settings: Settings = current_app.extensions["settings"]
    some = any(product.stock for product in products if form.quantity(product.sku))
    return {} if some and settings.offered_for is not None else _short(form, products)


def _short(form: Form, products: list[Product]) -> dict[str, str]:
    """Return for each control with a quantity that is not in stock what to say about it."""
    return {
        f"quantity-{product.sku}": words.too_many(product.name, form.quantity(product.sku), product.stock)
        for product in products
        if form.quantity(product.sku) > product.stock
    }


def _repriced(form: Form, products: list[Product]) -> dict[str, str]:
    """Return for each control with a product whose price is not the one that was shown what to say about it."""
    return {
        f"quantity-{product.sku}": f"{product.name} now costs {formats().money(product.unit_price, product.currency)}. "
        "Place the order again if that is all right."
        for product in products
        if form.is_chosen(product.sku)
        and form.prices.get(product.sku, str(product.unit_price)) != str(product.unit_price)
    }


def _total(form: Form, products: list[Product]) -> tuple[int, str]:
    """Return what the chosen products cost together, and in which currency."""
    total = sum(form.quantity(product.sku) * product.unit_price for product in products)
    return total, next((product.currency for product in products), "")


def _read_form(data: Mapping[str, str]) -> Form:
    submission = data.get("submission", "")
    return Form(
        submission=submission if _SUBMISSION.fullmatch(submission) else Form().submission,
        customer_id=caller().customer_id or data.get("customer_id", "").strip(),
        payment_token=data.get("payment_token", "").strip(),
        quantities={
            name.removeprefix("quantity-"): text.strip()
            for name, text in data.items()
            if name.startswith("quantity-")
        },
        prices={
            name.removeprefix("price-"): text for name, text in data.items() if name.startswith("price-")
        },
        search=data.get("search", "").strip()[:_MAX_SEARCH],
        # A button that was pressed says where to go; hidden fields say where one is.
        category=data.get("show", data.get("showing", "")),
        page=whole_number(data.get("page", data.get("at", "1") if "update" in data else "1"), 1, 10_000) or 1,
    )


def _for_people(flaw: Flaw, items: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the control of the form that a flaw is about, and what to say there to someone who filled it in."""
    number = formats().number
    if match := _ITEM_FIELD.match(flaw.field):
        sku = items[int(match[1])]["sku"]
        name = service.product_name(sku)
        if name is None or match[2] == "sku":
            return (
                "products",
                f"{name or 'One of the products'} is not sold here any more. Choose from the list.",
            )
        return f"quantity-{sku}", f"{name}: enter a whole number from 1 to {number(MAX_QUANTITY)}."
    match flaw.field:
        case "customer_id" if flaw.problem.startswith("must be text"):
            return "customer_id", f"Enter a customer id of 1 to {MAX_ID_LENGTH} characters."
        case "customer_id":
            return "customer_id", f"The customer id {flaw.problem}"
        case "payment_token":
            return "payment_token", "Choose a way to pay from the list."
        case "items" if not items:
            return "products", "Choose at least one product: give it a quantity."
        case "items" if len(items) > MAX_ITEMS:
            return (
                "products",
                f"Choose {number(MAX_ITEMS)} different products at most, not {number(len(items))}.",
            )
        case "items":
            return "products", f"Order {number(MAX_QUANTITY)} pieces at most, of all products together."
    return "", "The order cannot be read: reload the page and fill it in again."
