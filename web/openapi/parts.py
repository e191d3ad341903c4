"""What the parts of the description share: shapes of answers and bodies, and members that several have."""

from __future__ import annotations

from typing import Any

from tasks.model import MAX_ID_LENGTH, MAX_TEXT

SHORT = {"type": "string", "maxLength": MAX_ID_LENGTH}

REASON = {"type": "string", "maxLength": MAX_TEXT, "description": "For people to read."}

AMOUNT = {
    "type": "number",
    "description": (
        "An amount in the currency's own unit (12.90 euros are 12.9), exact to the cent; "
        "the field ending in _minor is the same amount in cents."
    ),
}

MINOR = {"type": "integer", "description": "The amount in minor units (cents)."}

CURRENCY = {"type": "string", "description": "ISO 4217.", "examples": ["EUR"]}

TIME = {"type": "string", "format": "date-time"}


def ref(schema: str) -> dict[str, Any]:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{schema}"}


def answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in JSON."""
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def problems(*statuses: int) -> dict[str, Any]:
    """Return the problems that a request can be answered with, by their statuses."""
    return {str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in statuses}


def optional_body(properties: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    """Return a body in JSON that may be left out."""
    schema = {"type": "object", "properties": properties}
    return {"required": False, "content": {"application/json": {"schema": schema, "example": example}}}


def text_filter(name: str, description: str) -> dict[str, Any]:
    """Return a text of the query that narrows what is answered."""
    return {"name": name, "in": "query", "description": description, "schema": {"type": "string"}}
