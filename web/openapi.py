"""Describes the API as OpenAPI 3.1, and serves the description."""

from __future__ import annotations

import json
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from tasks.assortment import MAX_CATEGORY, MAX_NAME, MAX_PIECES, MAX_PRICE, MAX_REASON
from tasks.audit import KINDS as KINDS_OF_ACTS
from tasks.ledger import BACK, WRITTEN_OFF
from tasks.model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, MAX_TEXT, MAX_TOKEN_LENGTH, STATUSES
from web import openapi_webhooks
from web.access import anyone
from web.problems import KINDS, MEDIA_TYPE
from web.queries import DEFAULT_LIMIT, MAX_LIMIT

blueprint = Blueprint("openapi", __name__)

EXAMPLE_ORDER = {"customer_id": "c-42", "items": [{"sku": "MUG-01", "quantity": 2}]}


@blueprint.get("/openapi.json")
@anyone
def description() -> Response:
    """Answer the description of the API."""
    return jsonify(document(is_open=current_app.extensions["settings"].access == "open"))


def document(*, is_open: bool = False) -> dict[str, Any]:
    """Return the OpenAPI document, for a service that is open to its machine or for one that requires sign-in."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Order service",
            "version": "1.0.0",
            "description": (
                "Takes orders and carries each one to confirmed, rejected, cancelled or failed, and from confirmed to "
                "shipped, returned or refunded. "
                "A 202 means that the order is stored; anything else means that it may not be."
            ),
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/api/orders": {"get": _list_orders(), "post": _place_order()},
            "/api/orders.ndjson": {"get": _export_orders("Ndjson", "application/x-ndjson")},
            "/api/orders.csv": {"get": _export_orders("Csv", "text/csv")},
            "/api/orders/{order_id}": {"get": _show_order()},
            "/api/orders/{order_id}/cancel": {"post": _cancel_order()},
            "/api/orders/{order_id}/accept": {"post": _accept_offer()},
            "/api/orders/{order_id}/refunds": {"post": _refund_order()},
            "/api/orders/{order_id}/shipments": {"post": _ship_order()},
            "/api/orders/{order_id}/returns": {"post": _return_order()},
            "/api/payments/events": {"post": _payment_event()},
            "/api/audit": {"get": _list_audit()},
            **openapi_webhooks.paths(),
            "/api/products": {"get": _list_products(), "post": _import_products()},
            "/api/products/{sku}": {
                "get": _show_product(),
                "put": _put_product(),
                "delete": _withdraw_product(),
            },
            "/api/products/{sku}/prices/{since}": {"delete": _drop_price()},
            "/api/products/{sku}/stock": {"post": _change_stock()},
            "/health": {"get": _health("health", "Tell whether this process is connected to NATS")},
            "/health/ready": {"get": _health("ready", "Tell whether this process can take orders")},
            "/health/live": {
                "get": {
                    "operationId": "alive",
                    "summary": "Tell whether this process answers at all",
                    "tags": ["health"],
                    "security": [],
                    "responses": {"200": _json("It does.", {"$ref": "#/components/schemas/Health"})},
                }
            },
        },
        "security": [] if is_open else [{"bearer": []}],
        "components": {
            "schemas": {**_SCHEMAS, **openapi_webhooks.SCHEMAS},
            "responses": _problem_responses(),
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, or a token of the OpenID provider.",
                }
            },
        },
    }


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the operations one after another, with what a page needs to show and try them."""
    found = []
    for path, methods in document["paths"].items():
        for method, operation in sorted(methods.items(), key=lambda entry: entry[0] != "post"):
            content = operation.get("requestBody", {}).get("content", {})
            example = content.get("application/json", {}).get("example")
            found.append(
                {
                    "id": operation["operationId"],
                    "method": method.upper(),
                    "path": path,
                    "summary": operation["summary"],
                    "description": operation.get("description"),
                    "parameters": operation.get("parameters", []),
                    "example": None if example is None else json.dumps(example, indent=2),
                    "responses": [
                        (status, _resolve(document, response)["description"])
                        for status, response in sorted(operation["responses"].items())
                    ],
                }
            )
    return found


def _resolve(document: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    target: Any = document
    for part in response.get("$ref", "#").split("/")[1:]:
        target = target[part]
    return target if "$ref" in response else response


def _place_order() -> dict[str, Any]:
    return {
        "operationId": "placeOrder",
        "summary": "Place an order",
        "description": (
            "The answer comes after JetStream has stored the order. Prices come from the catalogue. With an "
            "Idempotency-Key the request may be sent again without placing the order twice: always send one, "
            "and send the same request with the same key after a 503 or when no answer came."
        ),
        "tags": ["orders"],
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "One key for one order, for example a UUID.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/OrderRequest"},
                    "example": EXAMPLE_ORDER,
                },
                "application/x-protobuf": {
                    "schema": {
                        "type": "string",
                        "format": "binary",
                        "description": "An orders.v1.OrderCreated message (proto/orders/v1/events.proto).",
                    }
                },
            },
        },
        "responses": {
            "202": {
                "description": "The order is stored. Its address follows it to the end.",
                "headers": {
                    "Location": {"$ref": "#/components/headers/Location"},
                    "Idempotency-Replayed": {"$ref": "#/components/headers/IdempotencyReplayed"},
                },
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Order"}}},
            },
            **_problems(400, 401, 403, 409, 413, 415, 422, 429, 503),
        },
    }


def _list_orders() -> dict[str, Any]:
    return {
        "operationId": "listOrders",
        "summary": "List orders, newest first",
        "tags": ["orders"],
        "parameters": [
            {
                "name": "limit",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            },
            *_filters(),
        ],
        "responses": {
            "200": {
                "description": (
                    "One page. The Link header and next lead to the page after it; a page of chosen orders may have "
                    "fewer than limit, or none, and still have a next one."
                ),
                "headers": {"Link": {"$ref": "#/components/headers/Link"}},
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/OrderPage"}}},
            },
            **_problems(400, 401, 403, 429, 503),
        },
    }


def _export_orders(kind: str, media_type: str) -> dict[str, Any]:
    table = media_type == "text/csv"
    return {
        "operationId": f"exportOrders{kind}",
        "summary": f"Export orders as {'a table' if table else 'one JSON object a line'}",
        "description": (
            "Newest first, written while it is sent; an answer that breaks off is not whole."
            + (
                " Text that a spreadsheet would take for a formula begins with an apostrophe."
                if table
                else ""
            )
        ),
        "tags": ["orders"],
        "parameters": _filters(),
        "responses": {
            "200": {
                "description": "The orders.",
                "content": {media_type: {"schema": {"type": "string"}}},
            },
            **_problems(400, 401, 403, 429, 503),
        },
    }


def _filters() -> list[dict[str, Any]]:
    return [
        _filter("before", "The next of the page before."),
        _filter("customer", "Only this customer's orders; a customer gets only their own anyway."),
        {**_filter("status", "Only orders with this status."), "schema": {"enum": list(STATUSES)}},
        _filter("since", "Placed at this time or later (RFC 3339), or on this day (in UTC) or later."),
        _filter("until", "Placed before this time, or on this day (in UTC) or earlier."),
        _filter("sku", "Only orders with this product."),
        _filter(
            "failure",
            "Only orders that were rejected, cancelled, returned or failed for a reason with this in it.",
        ),
    ]


def _filter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": {"type": "string"}}


def _show_order() -> dict[str, Any]:
    return {
        "operationId": "showOrder",
        "summary": "Show one order",
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "responses": {
            "200": _json("The order as it is now.", {"$ref": "#/components/schemas/Order"}),
            **_problems(401, 403, 404, 429, 503),
        },
    }


def _cancel_order() -> dict[str, Any]:
    return {
        "operationId": "cancelOrder",
        "summary": "Cancel an order",
        "description": (
            "The answer comes after the request is stored. The order then ends as cancelled: its stock is given back, "
            "and so is what was charged for it. Asking again asks for the same. Of an order that was shipped a "
            "customer asks for its return like this, and an operator decides about it."
        ),
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "requestBody": _optional({"reason": _REASON}, {"reason": "ordered by mistake"}),
        "responses": {**_order_accepted(), **_problems(400, 401, 403, 404, 409, 429, 503)},
    }


def _accept_offer() -> dict[str, Any]:
    return {
        "operationId": "acceptOffer",
        "summary": "Accept what is in stock of an order",
        "description": (
            "Of an order that is offered: stock does not cover it, and what there is, is held for it until its offer "
            "expires. That is the order from now on, and what it costs is charged. Asking again changes nothing. "
            "Cancel the order to decline."
        ),
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "responses": {**_order_accepted(), **_problems(401, 403, 404, 409, 429, 503)},
    }


def _refund_order() -> dict[str, Any]:
    amount = {"type": "integer", "minimum": 1, "description": "In minor units; without it what is left."}
    return {
        "operationId": "refundOrder",
        "summary": "Refund a charge, or a part of it",
        "description": (
            "Needs the scope operate. All refunds of an order together are never more than its charge. The same "
            "Idempotency-Key never refunds twice."
        ),
        "tags": ["orders"],
        "parameters": [
            _ORDER_ID,
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": True,
                "description": "One key for one refund, for example a UUID.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
            },
        ],
        "requestBody": _optional({"amount_minor": amount, "reason": _REASON}, {"amount_minor": 500}),
        "responses": {**_order_accepted(), **_problems(400, 401, 403, 404, 409, 429, 503)},
    }


def _ship_order() -> dict[str, Any]:
    return {
        "operationId": "shipOrder",
        "summary": "Say that the goods of a confirmed order have left",
        "description": (
            "Needs the scope operate. Said again, it changes nothing: the first carrier and number are kept."
        ),
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "requestBody": _optional(
            {"carrier": _SHORT, "tracking": _SHORT}, {"carrier": "DHL", "tracking": "JJD000390007827"}
        ),
        "responses": {**_order_accepted(), **_problems(400, 401, 403, 404, 409, 429, 503)},
    }


def _return_order() -> dict[str, Any]:
    stock = {"enum": [BACK, WRITTEN_OFF], "description": "Whether the goods can be sold again."}
    return {
        "operationId": "returnOrder",
        "summary": "Take back an order that was shipped",
        "description": (
            "Needs the scope operate. The order ends as returned: its goods are in stock again or written off, and "
            "what is left of its charge is refunded."
        ),
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "requestBody": {
            **_optional({"stock": stock, "reason": _REASON}, {"stock": BACK, "reason": "too small"}),
            "required": True,
        },
        "responses": {**_order_accepted(), **_problems(400, 401, 403, 404, 409, 429, 503)},
    }


def _payment_event() -> dict[str, Any]:
    data = {
        "id": _SHORT,
        "order_id": _SHORT,
        "charge_id": {"type": "string"},
        "amount": {"type": "integer", "minimum": 1, "description": "In minor units."},
        "reason": {"type": ["string", "null"]},
    }
    header = {"in": "header", "required": True, "schema": {"type": "string"}}
    return {
        "operationId": "paymentEvent",
        "summary": "Tell of a chargeback",
        "description": (
            "For the payment gateway, which signs what it tells by the Standard Webhooks specification, with "
            "PAYMENT_WEBHOOK_SECRET. What was told before counts once; what is answered with 409 is to be told again."
        ),
        "tags": ["payments"],
        "security": [],
        "parameters": [{"name": f"webhook-{name}", **header} for name in ("id", "timestamp", "signature")],
        "requestBody": _optional(
            {"type": {"type": "string"}, "data": {"type": "object", "properties": data}},
            {
                "type": "chargeback.created",
                "data": {"id": "cb_1", "order_id": "o-1", "charge_id": "ch_1", "amount": 500},
            },
        ),
        "responses": {
            "204": {"description": "It is recorded, or of no interest here."},
            **_problems(400, 401, 409, 503),
        },
    }


def _optional(properties: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"required": False, "content": {"application/json": {"schema": schema, "example": example}}}


def _order_accepted() -> dict[str, Any]:
    return {
        "202": {
            "description": "The request is stored; the order shows what becomes of it.",
            "headers": {"Location": {"$ref": "#/components/headers/Location"}},
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Order"}}},
        }
    }


def _list_products() -> dict[str, Any]:
    return {
        "operationId": "listProducts",
        "summary": "List the catalogue with prices and stock",
        "tags": ["products"],
        "responses": {
            "200": _json(
                "All products.", {"type": "array", "items": {"$ref": "#/components/schemas/Product"}}
            ),
            **_problems(401, 403, 429, 503),
        },
    }


def _list_audit() -> dict[str, Any]:
    export = {"schema": {"type": "string"}}
    return {
        "operationId": "listAudit",
        "summary": "List who did what, newest first, or export it",
        "description": "Needs the scope admin. An export has everything that is looked for, whatever the limit.",
        "tags": ["audit"],
        "parameters": [
            {
                "name": "limit",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            },
            _filter("before", "The next of the page before."),
            {**_filter("kind", "What it was done to."), "schema": {"enum": list(KINDS_OF_ACTS)}},
            _filter("act", "What was done, such as order.cancel."),
            _filter("target", "The id of what it was done to."),
            _filter("who", "The name of who did it, or `customer`."),
            _filter("text", "A part of anything that is recorded."),
            _filter("since", "Begun at this time or later (RFC 3339), or on this day (in UTC) or later."),
            _filter("until", "Begun before this time, or on this day (in UTC) or earlier."),
            {
                **_filter("format", "A page as JSON, or an export."),
                "schema": {"enum": ["json", "ndjson", "csv"], "default": "json"},
            },
        ],
        "responses": {
            "200": {
                "description": "One page, or the export.",
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/AuditPage"}},
                    "application/x-ndjson": export,
                    "text/csv": export,
                },
            },
            **_problems(400, 401, 403, 429, 503),
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
            **_optional(
                {
                    "name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
                    "category": {"type": "string", "minLength": 1, "maxLength": MAX_CATEGORY},
                    "unit_price_minor": {**_MINOR, "minimum": 1, "maximum": MAX_PRICE},
                    "from": {**_TIME, "description": "When the price begins to hold; now without it."},
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
                "schema": _TIME,
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
            **_optional(
                {
                    "add": whole,
                    "count": {**whole, "minimum": 0},
                    "reason": {**_REASON, "maxLength": MAX_REASON},
                },
                {"add": 200, "reason": "delivery 4711"},
            ),
            "required": True,
        },
        "responses": _product(400, 422),
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
            "200": _json("What each row did, or would do.", {"$ref": "#/components/schemas/Import"}),
            **_problems(400, 401, 403, 413, 415, 422, 429, 503),
        },
    }


def _product(*statuses: int) -> dict[str, Any]:
    return {
        "200": _json("The product as it is now.", {"$ref": "#/components/schemas/StoredProduct"}),
        **_problems(401, 403, 404, 413, 429, 503, *statuses),
    }


def _health(operation_id: str, summary: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Health"}
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["health"],
        "security": [],
        "responses": {"200": _json("Yes.", schema), "503": _json("No.", schema)},
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problems(*statuses: int) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in statuses}


def _problem_responses() -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for kind in KINDS.values():
        response = responses.setdefault(
            f"Problem{kind.status}",
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            },
        )
        response["description"] = f"{response['description']} {kind.title}.".strip()
        if kind.status in (409, 429, 503):
            response["headers"] = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}
    return responses


_HEADERS: dict[str, Any] = {
    "Location": {"description": "The address of what was stored.", "schema": {"type": "string"}},
    "IdempotencyReplayed": {
        "description": "Present when an earlier request with this key placed the order.",
        "schema": {"type": "string", "const": "true"},
    },
    "Link": {"description": "The next page, as RFC 8288 writes it.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds to wait before trying again.", "schema": {"type": "string"}},
}

_SKU = {"name": "sku", "in": "path", "required": True, "schema": {"type": "string"}}
_CHANGE_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "One key for one change, for example a UUID: sent again, it changes nothing more.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_ORDER_ID = {"name": "order_id", "in": "path", "required": True, "schema": {"type": "string"}}
_SHORT = {"type": "string", "maxLength": MAX_ID_LENGTH}
_REASON = {"type": "string", "maxLength": MAX_TEXT, "description": "For people to read."}
_AMOUNT = {
    "type": "number",
    "description": (
        "An amount in the currency's own unit (12.90 euros are 12.9), exact to the cent; "
        "the field ending in _minor is the same amount in cents."
    ),
}
_MINOR = {"type": "integer", "description": "The amount in minor units (cents)."}
_CURRENCY = {"type": "string", "description": "ISO 4217.", "examples": ["EUR"]}
_TIME = {"type": "string", "format": "date-time"}

_SCHEMAS: dict[str, Any] = {
    "OrderRequest": {
        "type": "object",
        "required": ["items"],
        "properties": {
            "customer_id": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_ID_LENGTH,
                "description": "Who orders. One who acts for a single customer may leave it out.",
            },
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_ITEMS,
                "items": {
                    "type": "object",
                    "required": ["sku", "quantity"],
                    "properties": {
                        "sku": {"type": "string", "minLength": 1, "examples": ["MUG-01"]},
                        "quantity": {"type": "integer", "minimum": 1, "maximum": MAX_QUANTITY},
                    },
                },
            },
            "payment_token": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": MAX_TOKEN_LENGTH,
                "description": "What the payment gateway is to charge; the customer's account without it.",
            },
        },
    },
    "Order": {
        "type": "object",
        "required": [
            "order_id",
            "status",
            "customer_id",
            "items",
            "total_amount",
            "total_minor",
            "currency",
            "history",
        ],
        "properties": {
            "order_id": {"type": "string"},
            "status": {"enum": list(STATUSES)},
            "customer_id": {"type": "string"},
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["sku", "quantity", "unit_price"],
                    "properties": {
                        "sku": {"type": "string"},
                        "name": {
                            "type": "string",
                            "description": "What the product was called when it was ordered.",
                        },
                        "quantity": {"type": "integer"},
                        "unit_price": {**_AMOUNT, "type": ["number", "null"]},
                    },
                },
            },
            "total_amount": _AMOUNT,
            "total_minor": _MINOR,
            "currency": _CURRENCY,
            "offer": {
                "type": "object",
                "description": (
                    "What there was of an order that stock did not cover. Once it is accepted, items and total are "
                    "what was offered."
                ),
                "required": ["items", "total_amount", "total_minor", "expires_at"],
                "properties": {
                    "items": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["sku", "ordered", "quantity", "unit_price"],
                            "properties": {
                                "sku": {"type": "string"},
                                "name": {"type": "string"},
                                "ordered": {"type": "integer", "description": "How many were ordered."},
                                "quantity": {"type": "integer", "description": "How many there are."},
                                "unit_price": _AMOUNT,
                            },
                        },
                    },
                    "total_amount": _AMOUNT,
                    "total_minor": _MINOR,
                    "expires_at": {**_TIME, "description": "Until when it can be accepted."},
                },
            },
            "reason": {
                "type": "string",
                "description": "Why it was rejected, cancelled, returned or failed.",
            },
            "waiting_for": {
                "type": "string",
                "description": "What keeps it from going on right now, when that is known.",
                "examples": ["payment provider"],
            },
            "history": {
                "type": "array",
                "description": "What happened to the order, oldest first.",
                "items": {
                    "type": "object",
                    "required": ["event", "at"],
                    "properties": {
                        "event": {"type": "string", "examples": ["created", "reserved", "paid", "confirmed"]},
                        "at": _TIME,
                        "detail": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                },
            },
        },
    },
    "OrderPage": {
        "type": "object",
        "required": ["orders", "next"],
        "properties": {
            "orders": {"type": "array", "items": {"$ref": "#/components/schemas/Order"}},
            "next": {"type": ["string", "null"], "description": "The before of the next page."},
        },
    },
    "AuditPage": {
        "type": "object",
        "required": ["acts", "next"],
        "properties": {
            "acts": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": [
                        "id",
                        "act",
                        "target",
                        "name",
                        "kind",
                        "via",
                        "address",
                        "at",
                        "outcome",
                        "error",
                    ],
                    "properties": {
                        "id": {"type": "string"},
                        "act": {"type": "string", "examples": ["order.cancel"]},
                        "target": {"type": "string"},
                        "name": {"type": "string", "description": "Empty for a customer."},
                        "kind": {"enum": ["operator", "machine", "customer", "open", "service"]},
                        "via": {"enum": ["page", "API", "command", "dashboard", "worker"]},
                        "address": {"type": "string"},
                        "at": _TIME,
                        "outcome": {"enum": ["done", "failed", "unfinished"]},
                        "error": {"type": "string"},
                        "detail": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                },
            },
            "next": {"type": ["string", "null"], "description": "The before of the next page."},
        },
    },
    "Product": {
        "type": "object",
        "required": ["sku", "name", "unit_price", "unit_price_minor", "currency", "stock"],
        "properties": {
            "sku": {"type": "string"},
            "name": {"type": "string"},
            "category": {"type": "string"},
            "unit_price": _AMOUNT,
            "unit_price_minor": _MINOR,
            "currency": _CURRENCY,
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
            "unit_price": {**_AMOUNT, "type": ["number", "null"]},
            "unit_price_minor": {
                "type": ["integer", "null"],
                "description": "The price of one piece now; null while it is not sold.",
            },
            "currency": _CURRENCY,
            "stock": {"type": "integer", "minimum": 0, "description": "Pieces that can be ordered now."},
            "prices": {
                "type": "array",
                "description": "Each price with the time from which it holds; null: not sold from then on.",
                "items": {
                    "type": "object",
                    "required": ["from", "unit_price_minor"],
                    "properties": {"from": _TIME, "unit_price_minor": {"type": ["integer", "null"]}},
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
    "Problem": {
        "type": "object",
        "description": "RFC 9457.",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "errors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["field", "problem"],
                    "properties": {"field": {"type": "string"}, "problem": {"type": "string"}},
                },
            },
        },
    },
    "Health": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"type": "string", "examples": ["ok", "unavailable"]}},
    },
}
