"""Attributes that many spans have in common."""

from __future__ import annotations

from typing import Any


class KnownAttributes:
    """What the spans of one kind begin with, and room for it in the form in which it is exported."""

    __slots__ = ("attributes", "encoded")

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.encoded: bytes | None = None
