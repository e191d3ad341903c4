"""Whole numbers in text from outside: one way to read them, with bounds, for queries, forms and settings."""

from __future__ import annotations

import re

_WHOLE = re.compile(r"[0-9]{1,19}", re.ASCII)


def whole_number(text: str, least: int, most: int) -> int | None:
    """Return the number that a text is, None when it is none or out of bounds.

    A number is up to 19 decimal digits and nothing else: no sign, no exponent, no other script's digits.
    """
    if _WHOLE.fullmatch(text) is None:
        return None
    number = int(text)
    return number if least <= number <= most else None
