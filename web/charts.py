"""Charts as SVG, made on the server: with axes and units, in the colours of the page.

A chart is a picture with a sentence about it. The numbers themselves are in a table beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from markupsafe import Markup

# The whole picture, and the plot in it.
_WIDTH: Final = 360
_HEIGHT: Final = 150
_LEFT: Final = 58
_RIGHT: Final = 352
_TOP: Final = 12
_BOTTOM: Final = 124

# How wide a character beside the plot can be: the style sheet has 11 px.
_CHARACTER: Final = 7.2

# The radius of a point that has no neighbours.
_DOT: Final = 3

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one kind, which is a class of the style sheet; None where there is none."""

    kind: str
    name: str
    values: Values


def bars(label: str, series: Sequence[Series], ticks: Sequence[str], shown: Callable[[float], str]) -> Markup:
    """Return a chart of bars from zero, several kinds on top of each other.

    Parameters:
      label: What it shows, in words.
      ticks: What stands below the first value, the middle and the last one.
      shown: Makes the text of a value, with its unit.
    """
    sums = [
        sum(value or 0 for value in column) for column in zip(*(one.values for one in series), strict=True)
    ]
    top = _round_up(max(sums, default=0))
    width = (_RIGHT - _LEFT) / max(1, len(sums)) * 0.72
    parts = []
    base = [0.0] * len(sums)
    for one in series:
        for place, value in enumerate(one.values):
            if value:
                upper, lower = _y(base[place] + value, top), _y(base[place], top)
                x = _x(place, len(sums)) - width / 2
                parts.append(
                    f'<rect class="{one.kind}" x="{x:.1f}" y="{upper:.1f}" width="{width:.1f}" '
                    f'height="{lower - upper:.1f}"/>'
                )
                base[place] += value
    return _picture(label, parts, top, ticks, shown)


def lines(
    label: str, series: Sequence[Series], ticks: Sequence[str], shown: Callable[[float], str]
) -> Markup:
    """Return a chart of lines that end where there are no values; the parameters are those of `bars`."""
    top = _round_up(max((value for one in series for value in one.values if value is not None), default=0))
    parts = []
    for one in series:
        points = [
            None if value is None else (_x(place, len(one.values)), _y(value, top))
            for place, value in enumerate(one.values)
        ]
        for is_there, group in groupby(points, key=lambda point: point is not None):
            if is_there:
                run = [point for point in group if point is not None]
                parts.append(_dot(one.kind, *run[0]) if len(run) == 1 else _line(one.kind, run))
    return _picture(label, parts, top, ticks, shown)


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _dot(kind: str, x: float, y: float) -> str:
    """Return what a line is that has one point."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_DOT}"/>'


def share(value: float, highest: float) -> Markup:
    """Return a bar for a row of a table that has the number beside it."""
    width = 100 * value / highest if highest else 0
    return Markup(
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect x="0" y="0" width="{:.1f}" height="8"/></svg>'
    ).format(width)


def _picture(
    label: str, parts: Sequence[str], top: float, ticks: Sequence[str], shown: Callable[[float], str]
) -> Markup:
    grid = []
    values = [(value, shown(value)) for value in (0.0, top / 2, top)]
    # What is longer than the room at the left of the plot widens the picture.
    wider = max(0.0, _CHARACTER * max(len(text) for _, text in values) - (_LEFT - 6))
    for value, text in values:
        y = _y(value, top)
        grid.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, _RIGHT, y, y)
        )
        grid.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 3.5, text)
        )
    places = zip(ticks, (_LEFT, (_LEFT + _RIGHT) / 2, _RIGHT), ("start", "middle", "end"), strict=True)
    for text, x, anchor in places:
        grid.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, _HEIGHT - 8, anchor, text)
        )
    return Markup(
        '<svg class="chart" viewBox="{:.0f} 0 {:.0f} {}" role="img" aria-label="{}">{}{}</svg>'
    ).format(-wider, _WIDTH + wider, _HEIGHT, label, Markup("").join(grid), Markup("".join(parts)))


def _x(place: int, count: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (place + 0.5) / max(1, count)


def _y(value: float, top: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value / top


def _round_up(value: float) -> float:
    """Return the next number that is easy to read, and whose half is too."""
    if value < sys.float_info.min:  # zero, or so little that its power of ten is not exact
        return 1.0
    unit: float = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 6, 8, 10) if unit * step >= value)
