"""What many spans have in common."""

from __future__ import annotations

from typing import Any


class Known:
    """What the spans of one operation, queue and actor begin with, and room for it in the form that is exported."""

    __slots__ = ("attributes", "encoded", "queue", "span_name", "templates")

    def __init__(self, span_name: str, queue: str, attributes: dict[str, Any]) -> None:
        self.span_name = span_name
        self.queue = queue
        self.attributes = attributes
        self.encoded: bytes | None = None
        #: For attempts that nobody looked at, by number, outcome and length of the message id.
        self.templates: dict[tuple[int, str | None, int], Any] = {}
