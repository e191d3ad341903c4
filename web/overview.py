"""The first page of the administration: orders, revenue, failures and time to confirmed as charts, and what sold.

The numbers are counted by the workers (`tasks.figures`), and a few seconds old.
"""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Response, request

from tasks import app, service
from tasks.catalogue import CURRENCY
from tasks.figures import Numbers, Span
from web import charts
from web.access import needs
from web.charts import Series
from web.formats import formats
from web.rendering import page

blueprint = Blueprint("overview", __name__)

HOURS: Final = 48
DAYS: Final = 30

#: How many products are shown.
BEST: Final = 10

#: The shares of orders whose time to confirmed is shown.
_HALF: Final = 0.5
_MOST: Final = 0.95


@blueprint.get("/admin")
@needs("read", of_all=True)
def show() -> Response:
    """Show the figures of the last days, or hours."""
    days, sold = app.figures().days(DAYS)
    by_hour = request.args.get("by") == "hour"
    spans = app.figures().hours(HOURS) if by_hour else days
    total = Numbers()
    for span in spans:
        total.add(span.numbers)
    highest = max((amount for _, _, amount in sold), default=0)
    return page(
        "overview.html",
        by_hour=by_hour,
        hours=HOURS,
        days=DAYS,
        spans=[(_when(span, by_hour), span.numbers) for span in reversed(spans)],
        total=total,
        charts=_charts(spans, by_hour),
        sold=[
            (
                service.product_name(sku) or "Unknown product",
                sku,
                pieces,
                amount,
                charts.share(amount, highest),
            )
            for sku, pieces, amount in sold[:BEST]
        ],
        seconds=_seconds,
        currency=CURRENCY,
        half=_HALF,
        most=_MOST,
    )


def _when(span: Span, by_hour: bool) -> str:
    return formats().hour(span.begins) if by_hour else formats().day(span.begins)


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else formats().seconds(seconds)


def _charts(spans: list[Span], by_hour: bool) -> list[tuple[str, list[Series], str]]:
    """Return the charts: of each its title, what is in it, and its picture."""
    numbers = [span.numbers for span in spans]
    ticks = [_when(spans[place], by_hour) for place in (0, len(spans) // 2, -1)]
    unit = "hour" if by_hour else "day"

    def money(minor: float) -> str:
        return formats().money(round(minor), CURRENCY)

    placed = [Series("placed", "Placed", [one.placed for one in numbers])]
    revenue = [Series("revenue", "Revenue", [one.revenue for one in numbers])]
    failures = [
        Series("rejected", "Rejected", [one.rejected for one in numbers]),
        Series("cancelled", "Cancelled", [one.cancelled for one in numbers]),
        Series("failed", "Failed", [one.failed for one in numbers]),
    ]
    times = [
        Series("half", "Half of the orders", [one.within(_HALF) for one in numbers]),
        Series("most", "95 % of the orders", [one.within(_MOST) for one in numbers]),
    ]
    return [
        ("Orders", placed, charts.bars(f"Orders placed by {unit}", placed, ticks, formats().number)),
        (
            "Revenue, before refunds",
            revenue,
            charts.bars(f"Revenue of confirmed orders, before refunds, by {unit}", revenue, ticks, money),
        ),
        (
            "Failures",
            failures,
            charts.bars(
                f"Orders rejected, cancelled and failed by {unit}", failures, ticks, formats().number
            ),
        ),
        (
            "Time to confirmed",
            times,
            charts.lines(f"Time from placed to confirmed by {unit}", times, ticks, formats().seconds),
        ),
    ]
