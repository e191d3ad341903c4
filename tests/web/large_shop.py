"""The front end of a shop with 158 products, for gunicorn: `tests.web.large_shop:create_app()`."""

from __future__ import annotations

from flask import Flask

from tasks.catalogue import CATALOGUE, CatalogueEntry
from web import create_app as front_end

CATEGORIES = ("Garden", "Tools", "Toys")
SIZE = 158


def create_app() -> Flask:
    """Return the front end, with products added to the catalogue of this process alone."""
    for number in range(1, SIZE + 1 - len(CATALOGUE)):
        sku = f"EXTRA-{number:03}"
        category = CATEGORIES[number % len(CATEGORIES)]
        stock = 3 if number == 2 else 1_000
        CATALOGUE[sku] = CatalogueEntry(sku, f"Thing no. {number}", 100 * number, stock, category)
    return front_end()
