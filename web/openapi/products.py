"""Describes the API of products, prices and stock."""

from __future__ import annotations

from typing import Any

from tasks.assortment import MAX_CATEGORY, MAX_NAME, MAX_PIECES, MAX_PRICE, MAX_REASON
from web.openapi.parts import AMOUNT, CURRENCY, MINOR, REASON, TIME, answer, optional_body, problems, ref

_SKU = {"name": "sku", "in": "path", "required": True, "schema": {"type": "string"}}

_CHANGE_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "One key for one change, for example a UUID: sent again, it changes nothing more.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


SCHEMAS: dict[str, Any] = {
    "Product": {
        "type": "object",
        "required": ["sku", "name", "unit_price", "unit_price_minor", "currency", "stock"],
        "properties": {
            "sku": {"type": "string"},
            "name": {"type": "string"},
            "category": {"type": "string"},
            "unit_price": AMOUNT,
            "unit_price_minor": MINOR,
            "currency": CURRENCY,
            "stock": {"type": "integer", "minimum": 0, "description": "Pieces that can be ordered now."},
        },
    },
    "StoredProduct": {
        "type": "object",
        "required": [
            "sku",
            "name",
            "category",
            "unit_price",
            "unit_price_minor",
            "currency",
            "stock",
            "prices",
        ],
        "properties": {
            "sku": {"type": "string"},
            "name": {"type": "string"},
            "category": {"type": "string"},
            "unit_price": {**AMOUNT, "type": ["number", "null"]},
            "unit_price_minor": {
                "type": ["integer", "null"],
                "description": "The price of one piece now; null while it is not sold.",
            },
            "currency": CURRENCY,
            "stock": {"type": "integer", "minimum": 0, "description": "Pieces that can be ordered now."},
            "prices": {
                "type": "array",
                "description": "Each price with the time from which it holds; null: not sold from then on.",
                "items": {
                    "type": "object",
                    "required": ["from", "unit_price_minor"],
                    "properties": {"from": TIME, "unit_price_minor": {"type": ["integer", "null"]}},
                },
            },
        },
    },
    "Import": {
        "type": "object",
        "required": ["dry_run", "rows", "errors"],
        "properties": {
            "dry_run": {"type": "boolean"},
            "rows": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["line", "sku", "change", "repeated"],
                    "properties": {
                        "line": {"type": "integer"},
                        "sku": {"type": "string"},
                        "change": {"type": "string", "description": "Empty: the product is so already."},
                        "repeated": {"type": "boolean", "description": "An earlier import has done it."},
                    },
                },
            },
            "errors": {
                "type": "array",
                "description": "Rows that became wrong while others changed their products; they were left out.",
                "items": {
                    "type": "object",
                    "required": ["field", "problem"],
                    "properties": {"field": {"type": "string"}, "problem": {"type": "string"}},
                },
            },
        },
    },
}


def paths() -> dict[str, Any]:
    """Return the paths with their operations."""
    return {
        "/api/products": {"get": _list_products(), "post": _import_products()},
        "/api/products/{sku}": {
            "get": _show_product(),
            "put": _put_product(),
            "delete": _withdraw_product(),
        },
        "/api/products/{sku}/prices/{since}": {"delete": _drop_price()},
        "/api/products/{sku}/stock": {"post": _change_stock()},
    }


def _list_products() -> dict[str, Any]:
    return {
        "operationId": "listProducts",
        "summary": "List the catalogue with prices and stock",
        "tags": ["products"],
        "responses": {
            "200": answer("All products.", {"type": "array", "items": ref("Product")}),
            **problems(401, 403, 429, 503),
        },
    }


def _import_products() -> dict[str, Any]:
    return {
        "operationId": "importProducts",
        "summary": "Import products, prices and stock from CSV",
        "description": (
            "Needs the scope operate. The first line names the columns: sku, and any of name, category, price, from, "
            "add, count, reason, withdraw. When a row is wrong nothing is imported, and errors names every line. "
            "The same file is imported once; with an Idempotency-Key, each key is."
        ),
        "tags": ["products"],
        "parameters": [
            {
                "name": "dry_run",
                "in": "query",
                "description": "Say what the import would do, and change nothing.",
                "schema": {"type": "string", "enum": ["true", "false"], "default": "false"},
            },
            _CHANGE_KEY,
        ],
        "requestBody": {"required": True, "content": {"text/csv": {"schema": {"type": "string"}}}},
        "responses": {
            "200": answer("What each row did, or would do.", ref("Import")),
            **problems(400, 401, 403, 413, 415, 422, 429, 503),
        },
    }


def _show_product() -> dict[str, Any]:
    return {
        "operationId": "showProduct",
        "summary": "Show a product with all its prices",
        "description": "Needs the scope operate.",
        "tags": ["products"],
        "parameters": [_SKU],
        "responses": _product(),
    }


def _put_product() -> dict[str, Any]:
    return {
        "operationId": "putProduct",
        "summary": "Add a product, or change it",
        "description": (
            "Needs the scope operate. What is left out stays as it is; a new product needs a name and a price. "
            "Orders that were accepted keep the name and price that they were placed with."
        ),
        "tags": ["products"],
        "parameters": [_SKU, _CHANGE_KEY],
        "requestBody": {
            **optional_body(
                {
                    "name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
                    "category": {"type": "string", "minLength": 1, "maxLength": MAX_CATEGORY},
                    "unit_price_minor": {**MINOR, "minimum": 1, "maximum": MAX_PRICE},
                    "from": {**TIME, "description": "When the price begins to hold; now without it."},
                },
                {"name": "Enamel mug", "category": "Kitchen", "unit_price_minor": 1290},
            ),
            "required": True,
        },
        "responses": _product(400, 422),
    }


def _withdraw_product() -> dict[str, Any]:
    return {
        "operationId": "withdrawProduct",
        "summary": "Withdraw a product",
        "description": (
            "Needs the scope operate. It is not sold any more, its planned prices go; orders keep it. "
            "A new price sells it again."
        ),
        "tags": ["products"],
        "parameters": [_SKU, _CHANGE_KEY],
        "responses": _product(400, 422),
    }


def _drop_price() -> dict[str, Any]:
    return {
        "operationId": "dropPrice",
        "summary": "Drop a planned price",
        "description": "Needs the scope operate. A price that holds already stays.",
        "tags": ["products"],
        "parameters": [
            _SKU,
            {
                "name": "since",
                "in": "path",
                "required": True,
                "description": "When the price would begin to hold, as the product shows it.",
                "schema": TIME,
            },
            _CHANGE_KEY,
        ],
        "responses": _product(400, 422),
    }


def _change_stock() -> dict[str, Any]:
    whole = {"type": "integer", "minimum": -MAX_PIECES, "maximum": MAX_PIECES}
    return {
        "operationId": "changeStock",
        "summary": "Add pieces of a product, or correct their count",
        "description": (
            "Needs the scope operate. `add` is what came in, or is taken away; `count` is what was counted, without "
            "what orders hold, and needs a reason. The same Idempotency-Key counts once."
        ),
        "tags": ["products"],
        "parameters": [_SKU, {**_CHANGE_KEY, "required": True}],
        "requestBody": {
            **optional_body(
                {
                    "add": whole,
                    "count": {**whole, "minimum": 0},
                    "reason": {**REASON, "maxLength": MAX_REASON},
                },
                {"add": 200, "reason": "delivery 4711"},
            ),
            "required": True,
        },
        "responses": _product(400, 422),
    }


def _product(*statuses: int) -> dict[str, Any]:
    return {
        "200": answer("The product as it is now.", ref("StoredProduct")),
        **problems(401, 403, 404, 413, 429, 503, *statuses),
    }
