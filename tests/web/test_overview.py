"""The overview: charts and numbers of all orders, for those who may see all of them."""

from __future__ import annotations

import html
import json
import re
from xml.etree import ElementTree

from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.polling import eventually
from tests.web.stack import Stack
from web.charts import Series, bars, lines


def totals(text: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)}


def test_the_overview_counts_every_order_once(service: Stack) -> None:
    """The numbers are those of an export of all orders, by day and by hour."""
    ordered = [service.order(), service.order(payment_token="tok_declined")]
    for order in ordered:
        service.final(order["order_id"])

    def agrees() -> None:
        exported = [json.loads(line) for line in service.get("/api/orders.ndjson").text.splitlines()]
        confirmed = [
            one for one in exported if any(event["event"] == "confirmed" for event in one["history"])
        ]
        revenue = f"€{sum(one['total_minor'] for one in confirmed) / 100:,.2f}"
        for address in ("/admin", "/admin?by=hour"):
            shown = totals(service.get(address).text)
            assert shown["Orders placed"] == f"{len(exported):,}"
            assert shown["Revenue, before refunds"] == revenue

    eventually(lambda: agrees() or True, timeout=60, interval=0.5)
    text = service.get("/admin").text
    assert text.count('<svg class="chart"') == 4
    assert "Enamel mug" in text
    assert len(re.findall(r'<th scope="row">\d', text)) == 30


VALUES = st.lists(st.none() | st.floats(0, 1e12), min_size=1, max_size=40)


@given(VALUES, st.text(max_size=10))
@example([1e-323], "")
def test_a_chart_is_a_picture_with_words(values: list[float | None], label: str) -> None:
    """Whatever the values, the SVG can be read, says what it shows, and draws nothing outside of itself."""
    label = "".join(character for character in label if character.isprintable())
    series = [Series("placed", "Placed", values), Series("failed", "Failed", values[::-1])]
    for draw in (bars, lines):
        picture = ElementTree.fromstring(
            draw(label, series, ("a", "<b>", "c"), lambda value: f"<{value:.0f}>")
        )
        assert picture.get("aria-label") == label
        for bar in picture.iter("rect"):
            top, height = float(bar.get("y", 0)), float(bar.get("height", 0))
            assert 0 <= top <= top + height <= 124.2
        for line in picture.iter("polyline"):
            assert len(line.get("points", "").split()) >= 2


def test_a_single_point_is_shown() -> None:
    """A line without neighbours on either side is a dot where its value is."""
    drawn = lines("Time", [Series("half", "Half", [None, 3.0, None])], ("a", "b", "c"), str)
    (dot,) = ElementTree.fromstring(drawn).iter("circle")
    assert dot.get("class") == "half"
    assert float(dot.get("r", 0)) > 1
