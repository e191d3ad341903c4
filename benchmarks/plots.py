"""Draws the plotted figures of a run as SVG bar charts: the median as the bar, the spread as a line over it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from benchmarks.measurements.measurement import Figure
from benchmarks.report import number
from benchmarks.run import Outcome, Run

WIDTH, LABEL, VALUE = 760, 230, 110
BAR, GAP, CASE, TOP, BOTTOM, LINE = 20, 8, 28, 34, 8, 15
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 11px; fill: #57606a }
.bar { fill: #8c959f } .ours { fill: #0969da } .bound { fill: #d0d7de }
.spread { stroke: #24292f; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #8b949e } .bar { fill: #6e7681 } .ours { fill: #4493f8 }
  .bound { fill: #3d444d } .spread { stroke: #e6edf3 }
}
"""


def write(run: Run, title: str, folder: Path) -> list[Path]:
    """One file for each plotted figure; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for outcome in run.outcomes:
        for figure in outcome.measurement.figures:
            if figure.plotted and any(row.values.get(figure.key) for row in outcome.rows):
                plotted = [other for other in outcome.measurement.figures if other.plotted]
                suffix = f"-{figure.key}" if len(plotted) > 1 else ""
                path = folder / f"{outcome.measurement.name}{suffix}.svg"
                path.write_text(chart(outcome, figure, title))
                paths.append(path)
    return paths


def chart(outcome: Outcome, figure: Figure, title: str) -> str:
    """The SVG text of one chart; contenders without a value are not drawn."""
    drawn = [(row, summary) for row in outcome.rows if (summary := row.summary(figure.key)) is not None]
    # A bound far above all others would press them together; its bar ends at the edge, its number says the rest.
    inner = [summary.high for row, summary in drawn if not row.contender.bound]
    longest = max([min(summary.high, max(inner) * 1.3) if inner else summary.high for _, summary in drawn])
    space = WIDTH - LABEL - VALUE

    def width(value: float) -> float:
        return min(1.0, max(0.0, value) / max(longest, 1e-9)) * space

    heading = f"{outcome.measurement.title}, {figure.title} {figure.unit}".strip()
    body = [f'<text class="title" x="8" y="20">{escape(heading)}</text>']
    y = TOP
    for case in outcome.cases():
        if case:
            body.append(f'<text class="small" x="8" y="{y + 18}">{escape(case)}</text>')
            y += CASE
        for row, summary in drawn:
            if row.case != case:
                continue
            kind = "ours" if row.contender.ours else "bound" if row.contender.bound else "bar"
            length = width(summary.median)
            middle = y + BAR / 2
            label = escape(row.contender.title)
            body.append(f'<text x="{LABEL - 8}" y="{middle + 5}" text-anchor="end">{label}</text>')
            body.append(
                f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
            )
            if summary.repetitions > 1:
                low, high = LABEL + width(summary.low), LABEL + width(summary.high)
                body.append(
                    f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
                )
            end = LABEL + max(length, width(summary.high)) + 6
            body.append(f'<text x="{end:.1f}" y="{middle + 5}">{number(summary.median)}</text>')
            y += BAR + GAP
    for line in title.split("; "):
        body.append(f'<text class="small" x="8" y="{y + 14}">{escape(line)}</text>')
        y += LINE
    height = y + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(heading)}">'
        f"<style>{STYLE}</style>{''.join(body)}</svg>\n"
    )
