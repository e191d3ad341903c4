"""Money as whole minor units (cents), and the one place where it meets floating point and decimal notation.

Binary floating point cannot hold 0.10, so a sum of prices is only ever computed in integers. A float that
comes from outside is compared through its shortest decimal notation, which is what its sender wrote.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_EVEN, Decimal

_AMOUNT = re.compile(r"([0-9]{1,12})(?:\.([0-9]+))?", re.ASCII)

#: Minor units in one major unit of each currency that the catalogue may use.
MINOR_UNITS = {"EUR": 100, "USD": 100, "GBP": 100, "CHF": 100, "JPY": 1}


def from_float(amount: float, currency: str) -> int | None:
    """Return the nearest whole number of minor units, or None when `amount` is not finite.

    Nearest, because a producer that adds doubles arrives at 59.970000000000006 and means 59.97.
    """
    if not math.isfinite(amount):
        return None
    scaled = Decimal(repr(float(amount))) * MINOR_UNITS[currency]
    return int(scaled.to_integral_value(rounding=ROUND_HALF_EVEN))


def to_float(minor: int, currency: str) -> float:
    """Return the amount in major units, as the events' `total_amount` carries it."""
    return minor / MINOR_UNITS[currency]  # the division is rounded once, to the float nearest to the amount


def from_text(text: str, currency: str) -> int | None:
    """Return the minor units of an amount that a person wrote, such as `12.90`; None when it is none.

    A decimal point and no other separator, no sign, and no more decimals than the currency has.
    """
    decimals = len(str(MINOR_UNITS[currency])) - 1
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or len(match[2] or "") > decimals:
        return None
    return int(match[1]) * MINOR_UNITS[currency] + int((match[2] or "").ljust(decimals, "0") or "0")


def to_plain_text(minor: int, currency: str) -> str:
    """Return the amount as `from_text` reads it: `1290.00`."""
    decimals = len(str(MINOR_UNITS[currency])) - 1
    return f"{Decimal(minor).scaleb(-decimals):.{decimals}f}"


def to_text(minor: int, currency: str) -> str:
    """Return the amount for people: `59.97 EUR`."""
    digits = len(str(MINOR_UNITS[currency])) - 1
    return f"{Decimal(minor).scaleb(-digits):,.{digits}f} {currency}"
