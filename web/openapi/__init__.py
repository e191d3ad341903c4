"""Describes the API as OpenAPI 3.1, and serves the description. Each part of the API describes itself beside this."""

from __future__ import annotations

import json
from typing import Any, Final

from flask import Blueprint, Response, current_app, jsonify

from web.access import anyone
from web.openapi import audit, orders, products, webhooks
from web.openapi.parts import answer, ref
from web.problems import KINDS, MEDIA_TYPE

blueprint = Blueprint("openapi", __name__)

#: The parts, in the order in which the page of the API has them.
_PARTS: Final = (orders, audit, webhooks, products)


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
            **{path: methods for part in _PARTS for path, methods in part.paths().items()},
            "/health": {"get": _health("health", "Tell whether this process is connected to NATS")},
            "/health/ready": {"get": _health("ready", "Tell whether this process can take orders")},
            "/health/live": {
                "get": {
                    "operationId": "alive",
                    "summary": "Tell whether this process answers at all",
                    "tags": ["health"],
                    "security": [],
                    "responses": {"200": answer("It does.", ref("Health"))},
                }
            },
        },
        "security": [] if is_open else [{"bearer": []}],
        "components": {
            "schemas": {**_SCHEMAS, **{name: one for part in _PARTS for name, one in part.SCHEMAS.items()}},
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


def _health(operation_id: str, summary: str) -> dict[str, Any]:
    schema = ref("Health")
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["health"],
        "security": [],
        "responses": {"200": answer("Yes.", schema), "503": answer("No.", schema)},
    }


def _problem_responses() -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for kind in KINDS.values():
        response = responses.setdefault(
            f"Problem{kind.status}",
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": ref("Problem")}},
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

_SCHEMAS: dict[str, Any] = {
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
