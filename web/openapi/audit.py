"""Describes the API of the audit."""

from __future__ import annotations

from typing import Any

from tasks.audit import KINDS
from web.openapi.parts import TIME, problems, ref, text_filter
from web.queries import DEFAULT_LIMIT, MAX_LIMIT

SCHEMAS: dict[str, Any] = {
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
                        "at": TIME,
                        "outcome": {"enum": ["done", "failed", "unfinished"]},
                        "error": {"type": "string"},
                        "detail": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                },
            },
            "next": {"type": ["string", "null"], "description": "The before of the next page."},
        },
    },
}


def paths() -> dict[str, Any]:
    """Return the paths with their operations."""
    return {"/api/audit": {"get": _list_audit()}}


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
            text_filter("before", "The next of the page before."),
            {**text_filter("kind", "What it was done to."), "schema": {"enum": list(KINDS)}},
            text_filter("act", "What was done, such as order.cancel."),
            text_filter("target", "The id of what it was done to."),
            text_filter("who", "The name of who did it, or `customer`."),
            text_filter("text", "A part of anything that is recorded."),
            text_filter("since", "Begun at this time or later (RFC 3339), or on this day (in UTC) or later."),
            text_filter("until", "Begun before this time, or on this day (in UTC) or earlier."),
            {
                **text_filter("format", "A page as JSON, or an export."),
                "schema": {"enum": ["json", "ndjson", "csv"], "default": "json"},
            },
        ],
        "responses": {
            "200": {
                "description": "One page, or the export.",
                "content": {
                    "application/json": {"schema": ref("AuditPage")},
                    "application/x-ndjson": export,
                    "text/csv": export,
                },
            },
            **problems(400, 401, 403, 429, 503),
        },
    }
