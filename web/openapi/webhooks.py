"""Describes the API of webhooks; a part of the description."""

from __future__ import annotations

from typing import Any

from tasks.webhooks.addresses import MAX_URL
from tasks.webhooks.subscriptions import EVENT_TYPES, MAX_DESCRIPTION
from web.openapi.parts import TIME, answer, problems, ref
from web.webhooks import DEFAULT_LIMIT, MAX_LIMIT

_SECRET = {
    "type": "string",
    "description": "Shown this once: it verifies what is sent.",
    "examples": ["whsec_…"],
}
_WEBHOOK_ID = {"name": "webhook_id", "in": "path", "required": True, "schema": {"type": "string"}}
_DELIVERY_ID = {**_WEBHOOK_ID, "name": "delivery_id"}

_PAGE: list[dict[str, Any]] = [
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    },
    {
        "name": "before",
        "in": "query",
        "description": "The next of the page before.",
        "schema": {"type": "string"},
    },
]

_MEMBERS: dict[str, Any] = {
    "url": {
        "type": "string",
        "maxLength": MAX_URL,
        "description": "Where events are sent: an https address on the public Internet.",
    },
    "events": {
        "type": "array",
        "items": {"enum": list(EVENT_TYPES)},
        "description": "The types of events that are sent; empty: all.",
    },
    "description": {"type": "string", "maxLength": MAX_DESCRIPTION},
}
_EXAMPLE = {"url": "https://example.com/orders", "events": ["order.confirmed", "order.rejected"]}

SCHEMAS: dict[str, Any] = {
    "Webhook": {
        "type": "object",
        "required": ["id", "url", "events", "description", "customer_id", "enabled", "created_at"],
        "properties": {
            "id": {"type": "string"},
            **_MEMBERS,
            "customer_id": {
                "type": ["string", "null"],
                "description": "Whose orders' events are sent; null: those of all orders.",
            },
            "enabled": {"type": "boolean"},
            "created_at": TIME,
            "disabled_because": {"type": "string", "description": "Present when this service disabled it."},
            "failing": {
                "type": "object",
                "description": "Present while the newest attempts have failed.",
                "required": ["since", "failures", "error"],
                "properties": {
                    "since": TIME,
                    "failures": {"type": "integer"},
                    "error": {"type": "string"},
                },
            },
        },
    },
    "Delivery": {
        "type": "object",
        "required": ["id", "order_id", "type", "at", "state", "attempts"],
        "properties": {
            "id": {"type": "string", "description": "The webhook-id that the receiver gets."},
            "order_id": {"type": "string"},
            "type": {"type": "string", "examples": ["order.confirmed"]},
            "at": {**TIME, "description": "When the event happened."},
            "state": {"enum": ["pending", "delivered", "failed"]},
            "reason": {"type": "string", "description": "Why no request was sent, when it failed so."},
            "next_at": {**TIME, "description": "When it is tried next, while it is pending."},
            "attempts": {
                "type": "array",
                "description": "The newest attempts, oldest first.",
                "items": {
                    "type": "object",
                    "required": ["at", "milliseconds", "status", "answer"],
                    "properties": {
                        "at": TIME,
                        "milliseconds": {"type": "integer"},
                        "status": {"type": ["integer", "null"], "description": "Null without an answer."},
                        "answer": {
                            "type": "string",
                            "description": "The beginning of the answer, or why there was none.",
                        },
                    },
                },
            },
        },
    },
}


def paths() -> dict[str, Any]:
    """Return the paths with their operations."""
    return {
        "/api/webhooks": {
            "get": _operation(
                "listWebhooks",
                "List webhooks",
                {
                    "200": answer("One page, newest first.", _list_of("webhooks", "Webhook", "next")),
                    **problems(400),
                },
                *_PAGE,
                description="A customer's own; an operator's are all. The other operations keep to the same.",
            ),
            "post": _operation(
                "makeWebhook",
                "Make a webhook",
                {
                    "201": {
                        **answer("The webhook, with its secret.", _with_secret()),
                        "headers": {"Location": {"$ref": "#/components/headers/Location"}},
                    },
                    **problems(400, 409, 422),
                },
                description=(
                    "A customer's webhook gets the events of that customer's orders, an operator's those of all "
                    "orders. What is sent follows the Standard Webhooks specification."
                ),
                body=_body(_MEMBERS, _EXAMPLE, "url"),
            ),
        },
        "/api/webhooks/{webhook_id}": {
            "get": _operation(
                "showWebhook",
                "Show one webhook",
                {"200": answer("The webhook as it is now.", ref("Webhook")), **problems(404)},
                _WEBHOOK_ID,
            ),
            "patch": _operation(
                "changeWebhook",
                "Change a webhook",
                {"200": answer("The webhook as it is now.", ref("Webhook")), **problems(400, 404, 422)},
                _WEBHOOK_ID,
                description="What is left out stays. Events that happen while it is disabled are not sent later.",
                body=_body({**_MEMBERS, "enabled": {"type": "boolean"}}, {"enabled": True}),
            ),
            "delete": _operation(
                "removeWebhook",
                "Remove a webhook",
                {"204": {"description": "It is removed."}, **problems(404)},
                _WEBHOOK_ID,
            ),
        },
        "/api/webhooks/{webhook_id}/secret": {
            "post": _operation(
                "rotateWebhookSecret",
                "Make a new secret",
                {
                    "200": answer(
                        "The new secret.",
                        {"type": "object", "required": ["secret"], "properties": {"secret": _SECRET}},
                    ),
                    **problems(404),
                },
                _WEBHOOK_ID,
                description="The old one signs beside it for a day.",
            )
        },
        "/api/webhooks/{webhook_id}/deliveries": {
            "get": _operation(
                "listWebhookDeliveries",
                "List the deliveries of a webhook",
                {
                    "200": answer(
                        "One page, what changed last first.", _list_of("deliveries", "Delivery", "next")
                    ),
                    **problems(400, 404),
                },
                _WEBHOOK_ID,
                *_PAGE,
            )
        },
        "/api/webhooks/{webhook_id}/deliveries/send-failed": {
            "post": _operation(
                "sendFailedWebhookDeliveries",
                "Send all deliveries again that have failed",
                {
                    "202": answer(
                        "They will be sent, each with the same webhook-id.",
                        {"type": "object", "required": ["run"], "properties": {"run": {"type": "integer"}}},
                    ),
                    **problems(404, 409),
                },
                _WEBHOOK_ID,
            )
        },
        "/api/webhooks/{webhook_id}/deliveries/{delivery_id}/send": {
            "post": _operation(
                "sendWebhookDelivery",
                "Send a delivery again",
                {
                    "202": answer("It will be sent, with the same webhook-id.", ref("Delivery")),
                    **problems(404, 409),
                },
                _WEBHOOK_ID,
                _DELIVERY_ID,
            )
        },
    }


def _operation(
    operation_id: str,
    summary: str,
    responses: dict[str, Any],
    *parameters: dict[str, Any],
    description: str | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": operation_id, "summary": summary, "tags": ["webhooks"]}
    if description is not None:
        operation["description"] = description
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = body
    return {**operation, "responses": {**responses, **problems(401, 403, 429, 503)}}


def _body(properties: dict[str, Any], example: dict[str, Any], *required: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _with_secret() -> dict[str, Any]:
    secret = {"type": "object", "required": ["secret"], "properties": {"secret": _SECRET}}
    return {"allOf": [ref("Webhook"), secret]}


def _list_of(name: str, schema: str, *more: str) -> dict[str, Any]:
    properties: dict[str, Any] = {name: {"type": "array", "items": ref(schema)}}
    properties |= {each: {"type": ["string", "null"]} for each in more}
    return {"type": "object", "required": list(properties), "properties": properties}
