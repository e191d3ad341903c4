"""Charts of the last hour as SVG, made on the server: with axes and units, and in words for those who do not see."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import groupby

from markupsafe import Markup, escape

__all__ = ["chart", "sparkline"]

# The whole picture, and the plot in it.
_WIDTH, _HEIGHT = 360, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 354, 10, 108

# How wide a character beside the plot can be: the style sheet has 10 px.
_CHARACTER = 6.6

Values = Sequence[float | None]


def chart(
    label: str, lines: Sequence[tuple[str, Values]], shown: Callable[[float], str], *, bars: bool = False
) -> Markup:
    """A chart of values that are one minute apart, the newest at the right.

    Parameters:
      label: What it shows, in words.
      lines: For each line its kind (a class of the style sheet) and its values; None where there is none.
      shown: Makes the text of a value, with its unit.
      bars: Whether values are bars from zero.
    """
    highest = max((value for _, values in lines for value in values if value is not None), default=0.0)
    top = _round_up(highest)
    parts = []
    beside = [(value, shown(value)) for value in ((0.0, top / 2, top) if highest else (0.0,))]
    # What is longer than the room at the left of the plot widens the picture.
    wider = max(0.0, _CHARACTER * max(len(text) for _, text in beside) - (_LEFT - 6))
    for value, text in beside:
        y, label_text = _y(value, top), escape(text)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label_text}</text>')
    for text, x, anchor in (
        ("60 min ago", _LEFT, "start"),
        ("30", (_LEFT + _RIGHT) / 2, "middle"),
        ("now", _RIGHT, "end"),
    ):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text}</text>')
    for kind, values in lines:
        parts.append(_bars(kind, values, top) if bars else _line(kind, values, top))
    return Markup(
        '<svg class="chart" viewBox="{:.0f} 0 {:.0f} {}" role="img" aria-label="{}">{}</svg>'
    ).format(-wider, _WIDTH + wider, _HEIGHT, label, Markup("".join(parts)))


def sparkline(label: str, values: Values) -> Markup:
    """A small line without axes, for a row of a table that has the number beside it."""
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    step = 118 / max(1, len(values) - 1)
    points = " ".join(
        f"{1 + step * place:.1f},{22 - 20 * (value or 0) / top:.1f}" for place, value in enumerate(values)
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 120 24" role="img" aria-label="{}"><polyline class="line" points="{}"/></svg>'
    ).format(label, points)


def _y(value: float, top: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * (value / top if top else 0)


def _x(place: int, count: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (place + 0.5) / count


def _line(kind: str, values: Values, top: float) -> str:
    found = []
    for is_there, group in groupby(enumerate(values), key=lambda each: each[1] is not None):
        if is_there:
            points = [(_x(place, len(values)), _y(value or 0, top)) for place, value in group]
            if len(points) == 1:
                found.append(
                    f'<circle class="{kind}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="1.8"/>'
                )
            else:
                text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                found.append(f'<polyline class="{kind}" points="{text}"/>')
    return "".join(found)


def _bars(kind: str, values: Values, top: float) -> str:
    width = (_RIGHT - _LEFT) / len(values) * 0.7
    return "".join(
        f'<rect class="{kind}" x="{_x(place, len(values)) - width / 2:.1f}" y="{_y(value, top):.1f}" '
        f'width="{width:.1f}" height="{_BOTTOM - _y(value, top):.1f}"/>'
        for place, value in enumerate(values)
        if value
    )


def _round_up(value: float) -> float:
    """The next number that is easy to read, and whose half is too."""
    if value < sys.float_info.min:  # zero, or so little that its power of ten is not exact
        return 1.0
    unit: float = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 6, 10) if unit * step >= value)
