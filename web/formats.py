"""Writes numbers, dates and money for people, in the one locale that LOCALE names.

The pages' scripts write in the same locale (`<html data-locale>`). Times are in UTC, and say so; a script shows them in
the reader's own time zone, and says which one that is. What programs read is written elsewhere
(`web.representation`), the same in every locale.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from functools import cache

from babel import Locale
from babel.dates import format_datetime, format_skeleton, format_time
from babel.numbers import format_currency, format_decimal
from flask import current_app

from tasks.money import MINOR_UNITS
from tasks.settings import Settings


class Formats:
    """How one locale writes."""

    def __init__(self, locale: str) -> None:
        self._locale = Locale.parse(locale)
        #: The locale's name as browsers have it: `en-GB`.
        self.tag = locale.replace("_", "-")

    def number(self, number: float) -> str:
        """Return a number with its separators: 100,000."""
        return format_decimal(number, locale=self._locale)

    def money(self, minor: int, currency: str) -> str:
        """Return an amount of minor units: €12.90."""
        return format_currency(Decimal(minor) / MINOR_UNITS[currency], currency, locale=self._locale)

    def hour(self, moment: datetime) -> str:
        """Return the hour that begins at a time, in UTC: 29 Nov, 13:00."""
        return f"{self.day(moment)}, {format_time(moment.astimezone(UTC), 'short', locale=self._locale)}"

    def day(self, moment: datetime) -> str:
        """Return a day, in UTC: 29 Nov."""
        return format_skeleton("MMMd", moment.astimezone(UTC), locale=self._locale)

    def seconds(self, seconds: float) -> str:
        """Return a span: 340 ms, 2.1 s, 3 min, 2 h."""
        if seconds < 1:
            return f"{self.number(round(seconds * 1000))} ms"
        if seconds < 90:
            return f"{self.number(round(seconds, 1))} s"
        if seconds < 5_400:
            return f"{self.number(round(seconds / 60))} min"
        return f"{self.number(round(seconds / 3_600))} h"

    def moment(self, moment: datetime) -> str:
        """Return a time, with its time zone: 29 Nov 2026, 13:42:45 UTC."""
        return f"{format_datetime(moment.astimezone(UTC), 'medium', locale=self._locale)} UTC"


_formats = cache(Formats)


def formats() -> Formats:
    """Return the formats of the application that serves this request."""
    settings: Settings = current_app.extensions["settings"]
    return _formats(settings.locale)
