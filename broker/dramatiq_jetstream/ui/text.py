"""Numbers, times and sizes as people read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup

__all__ = ["FILTERS", "duration", "number", "size"]


def number(value: float | None) -> str:
    """A count with thousands separated; a rate with as many decimals as it needs."""
    if value is None:
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def duration(milliseconds: float | None) -> str:
    """A length of time in its two largest units."""
    if milliseconds is None:
        return "–"
    if milliseconds < 1_000:
        return f"{max(0, round(milliseconds))} ms"
    seconds = milliseconds / 1_000
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, length, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def size(value: float | None) -> str:
    """A number of bytes."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1_000 or unit == "GB":
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1_000
    raise AssertionError("unreachable: the last unit takes everything")


def moment(milliseconds: float | None) -> Markup | str:
    """A time, in UTC until a script shows it in the reader's zone."""
    if not milliseconds:
        return "–"
    at = datetime.fromtimestamp(milliseconds / 1_000, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), f"{at:%Y-%m-%d %H:%M:%S} UTC"
    )


def since(milliseconds: float | None) -> str:
    """How long ago a time is."""
    return "–" if not milliseconds else duration(max(0, time.time() * 1_000 - milliseconds))


def until(milliseconds: float | None) -> str:
    """How far away a time is."""
    if not milliseconds:
        return "–"
    left = milliseconds - time.time() * 1_000
    return "now" if left <= 0 else f"in {duration(left)}"


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "number": number,
    "duration": duration,
    "size": size,
    "moment": moment,
    "since": since,
    "until": until,
}
