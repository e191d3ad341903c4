"""Times in text from outside: a moment with its zone, or a day."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_MOMENT: Final = re.compile(
    r"(?:19[7-9]\d|2\d{3})-\d\d-\d\d"
    r"(?P<time>[Tt ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?P<zone>[Zz]|[+-]\d\d:\d\d))?",
    re.ASCII,
)


def moment_of(text: str) -> int | None:
    """Return a time in milliseconds: `2026-12-01T08:00:00Z`, or `2026-12-01`, which is its beginning in UTC.

    None for anything else, a time without its zone too.
    """
    match = _MOMENT.fullmatch(text.strip())
    if match is None:
        return None
    try:
        moment = datetime.fromisoformat(text.strip().upper())
    except ValueError:
        return None
    if match["time"] is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int(moment.timestamp() * 1000))
