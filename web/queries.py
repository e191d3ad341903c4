"""Reads what a list of orders is asked for out of a query, for the API and for the page.

All that is wrong is found at once. A day (`2026-11-29`) means all of it, in UTC: as `since` from its beginning, as
`until` to its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from tasks.model import MAX_ID_LENGTH, STATUSES, Flaw
from tasks.numbers import whole_number
from tasks.parsing import check_customer_id
from tasks.service import ANY, InvalidOrder, Wanted, is_cursor
from tasks.text import flaw_of

#: The years that every calendar and clock involved can represent.
_DAY: Final = r"(?:19[7-9]\d|2\d{3})-\d\d-\d\d"
_MOMENT: Final = re.compile(
    rf"(?P<day>{_DAY})(?P<time>[Tt ]\d\d:\d\d(?::\d\d(?:\.\d{{1,6}}\d*)?)?(?:[Zz]|[+-]\d\d:\d\d))?", re.ASCII
)
_TIME_TEXT: Final = (
    "must be a time with its zone, such as 2026-11-29T13:00:00Z, or a day, such as 2026-11-29."
)
_STATUS_TEXT: Final = f"must be one of {', '.join(STATUSES)}."


DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100

#: How long a part of a failure can be.
MAX_FAILURE: Final = 100


@dataclass
class Query:
    """What is asked for, as far as it could be read, and what is wrong with it."""

    wanted: Wanted = ANY
    limit: int = DEFAULT_LIMIT
    before: str | None = None
    flaws: list[Flaw] = field(default_factory=list)


def read_query(arguments: Mapping[str, str]) -> Query:
    """Read `limit`, and `customer`, `status`, `since`, `until`, `sku`, `failure` and `before`, where empty is any."""
    flaws: list[Flaw] = []
    limit = whole_number(arguments.get("limit", str(DEFAULT_LIMIT)), 1, MAX_LIMIT)
    if limit is None:
        flaws.append(Flaw("limit", f"must be a whole number from 1 to {MAX_LIMIT}."))
    before = arguments.get("before") or None
    if before is not None and not is_cursor(before):
        flaws.append(Flaw("before", "must be the next cursor of an earlier page, as it was given."))
    customer = status = sku = None
    if given := arguments.get("customer"):
        try:
            customer = check_customer_id(given)
        except InvalidOrder as error:
            flaws.append(Flaw("customer", error.problem))
    if (status := arguments.get("status") or None) and status not in STATUSES:
        flaws.append(Flaw("status", _STATUS_TEXT))
    if (sku := arguments.get("sku") or None) and (flaw := flaw_of(sku, MAX_ID_LENGTH)):
        flaws.append(Flaw("sku", flaw))
    if (failure := arguments.get("failure") or None) and (flaw := flaw_of(failure, MAX_FAILURE)):
        flaws.append(Flaw("failure", flaw))
    since, until = (read_moment(arguments, name, flaws) for name in ("since", "until"))
    wanted = Wanted(
        customer_id=customer,
        status=status,
        since=since,
        until=until,
        sku=sku,
        failure=None if failure is None else failure.casefold(),
    )
    return Query(wanted, limit or DEFAULT_LIMIT, before, flaws)


def read_moment(arguments: Mapping[str, str], name: str, flaws: list[Flaw]) -> int | None:
    """Return a time as milliseconds, None without one or for what is none, which is then among the flaws."""
    text = arguments.get(name)
    if not text:
        return None
    match = _MOMENT.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError(text)
        moment = datetime.fromisoformat(text.strip().upper())
    except ValueError:
        flaws.append(Flaw(name, _TIME_TEXT))
        return None
    if match["time"] is None:
        moment = moment.replace(tzinfo=UTC)
        if name == "until":
            moment += timedelta(days=1)
    return max(0, int(moment.timestamp() * 1000))
