"""Describes the API of orders, and what the payment gateway tells."""

from __future__ import annotations

from typing import Any

from tasks.ledger import BACK, WRITTEN_OFF
from tasks.model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, MAX_TOKEN_LENGTH, STATUSES
from web.openapi.parts import (
    AMOUNT,
    CURRENCY,
    MINOR,
    REASON,
    SHORT,
    TIME,
    answer,
    optional_body,
    problems,
    ref,
    text_filter,
)
from web.queries import DEFAULT_LIMIT, MAX_LIMIT

EXAMPLE_ORDER = {"customer_id": "c-42", "items": [{"sku": "MUG-01", "quantity": 2}]}

_ORDER_ID = {"name": "order_id", "in": "path", "required": True, "schema": {"type": "string"}}


SCHEMAS: dict[str, Any] = {
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
                        "unit_price": {**AMOUNT, "type": ["number", "null"]},
                    },
                },
            },
            "total_amount": AMOUNT,
            "total_minor": MINOR,
            "currency": CURRENCY,
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
                                "unit_price": AMOUNT,
                            },
                        },
                    },
                    "total_amount": AMOUNT,
                    "total_minor": MINOR,
                    "expires_at": {**TIME, "description": "Until when it can be accepted."},
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
                        "at": TIME,
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
            "orders": {"type": "array", "items": ref("Order")},
            "next": {"type": ["string", "null"], "description": "The before of the next page."},
        },
    },
}


def paths() -> dict[str, Any]:
    """Return the paths with their operations."""
    return {
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
    }


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
                    "schema": ref("OrderRequest"),
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
                "content": {"application/json": {"schema": ref("Order")}},
            },
            **problems(400, 401, 403, 409, 413, 415, 422, 429, 503),
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
                "content": {"application/json": {"schema": ref("OrderPage")}},
            },
            **problems(400, 401, 403, 429, 503),
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
            **problems(400, 401, 403, 429, 503),
        },
    }


def _filters() -> list[dict[str, Any]]:
    return [
        text_filter("before", "The next of the page before."),
        text_filter("customer", "Only this customer's orders; a customer gets only their own anyway."),
        {**text_filter("status", "Only orders with this status."), "schema": {"enum": list(STATUSES)}},
        text_filter("since", "Placed at this time or later (RFC 3339), or on this day (in UTC) or later."),
        text_filter("until", "Placed before this time, or on this day (in UTC) or earlier."),
        text_filter("sku", "Only orders with this product."),
        text_filter(
            "failure",
            "Only orders that were rejected, cancelled, returned or failed for a reason with this in it.",
        ),
    ]


def _show_order() -> dict[str, Any]:
    return {
        "operationId": "showOrder",
        "summary": "Show one order",
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "responses": {
            "200": answer("The order as it is now.", ref("Order")),
            **problems(401, 403, 404, 429, 503),
        },
    }


def _cancel_order() -> dict[str, Any]:
    return {
        "operationId": "cancelOrder",
        "summary": "Cancel an order",
        "description": (
            "The answer comes after the request is stored. The order then ends as cancelled: its stock is given back, "
            "and so is what was charged for it. Asking again asks for the same. Of an order that was shipped a "
            "customer asks for its return like this, and an operator decides about it. "
            "An operator has to give a reason."
        ),
        "tags": ["orders"],
        "parameters": [_ORDER_ID],
        "requestBody": optional_body({"reason": REASON}, {"reason": "ordered by mistake"}),
        "responses": {**_accepted(), **problems(400, 401, 403, 404, 409, 429, 503)},
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
        "responses": {**_accepted(), **problems(401, 403, 404, 409, 429, 503)},
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
        "requestBody": optional_body({"amount_minor": amount, "reason": REASON}, {"amount_minor": 500}),
        "responses": {**_accepted(), **problems(400, 401, 403, 404, 409, 429, 503)},
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
        "requestBody": optional_body(
            {"carrier": SHORT, "tracking": SHORT}, {"carrier": "DHL", "tracking": "JJD000390007827"}
        ),
        "responses": {**_accepted(), **problems(400, 401, 403, 404, 409, 429, 503)},
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
            **optional_body({"stock": stock, "reason": REASON}, {"stock": BACK, "reason": "too small"}),
            "required": True,
        },
        "responses": {**_accepted(), **problems(400, 401, 403, 404, 409, 429, 503)},
    }


def _payment_event() -> dict[str, Any]:
    data = {
        "id": SHORT,
        "order_id": SHORT,
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
        "requestBody": optional_body(
            {"type": {"type": "string"}, "data": {"type": "object", "properties": data}},
            {
                "type": "chargeback.created",
                "data": {"id": "cb_1", "order_id": "o-1", "charge_id": "ch_1", "amount": 500},
            },
        ),
        "responses": {
            "204": {"description": "It is recorded, or of no interest here."},
            **problems(400, 401, 409, 503),
        },
    }


def _accepted() -> dict[str, Any]:
    return {
        "202": {
            "description": "The request is stored; the order shows what becomes of it.",
            "headers": {"Location": {"$ref": "#/components/headers/Location"}},
            "content": {"application/json": {"schema": ref("Order")}},
        }
    }
