"""Shows a run: tables for the terminal, Markdown for the README, JSON for machines."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders.contender import PROCESSES, THREADS, Contender
from benchmarks.floors import Verdict
from benchmarks.run import Outcome, Row, Run
from benchmarks.statistics import Summary


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, kernel, Python."""
    model, memory = platform.processor() or platform.machine(), 0
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
        memory = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) // (1024 * 1024)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def headline(run: Run, repeat: int, scale: float) -> str:
    facts = machine()
    size = "full size" if scale == 1 else f"{scale:g} × full size, only good for a first look"
    return (
        f"{datetime.datetime.now(datetime.UTC).date().isoformat()}, {facts['processor']}, {facts['cores']} cores, "
        f"{facts['memory_gib']} GiB, {facts['system']}, Python {facts['python']}; "
        f"{PROCESSES} processes × {THREADS} threads, {repeat} repetitions, {size}, {run.seconds / 60:.0f} minutes"
    )


# -- tables


def show(console: Console, run: Run, verdicts: list[Verdict], title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    console.print(_contenders_table(run))
    for outcome in run.outcomes:
        for case in outcome.cases():
            console.print(_outcome_table(outcome, case))
            for row in outcome.rows:
                if row.case == case and row.failed:
                    console.print(f"  {row.contender.title}: {row.failed}", highlight=False, markup=False)
        for contender, reason in _left_out(run, outcome):
            console.print(f"  left out: {contender.title}, {reason}", highlight=False, markup=False)
    if verdicts:
        console.print(_floors_table(verdicts))


def _left_out(run: Run, outcome: Outcome) -> list[tuple[Contender, str]]:
    name = outcome.measurement.name
    return [
        (contender, contender.left_out[name]) for contender in run.contenders if name in contender.left_out
    ]


def _contenders_table(run: Run) -> Table:
    table = Table(title="Contenders", title_justify="left")
    for column in ("contender", "durability", "versions", "note"):
        table.add_column(column, overflow="fold")
    for contender in run.contenders:
        table.add_row(contender.title, contender.durability, _versions(run, contender.name), contender.note)
    for name, reason in run.left_out.items():
        table.add_row(name, "left out", "", reason)
    return table


def _versions(run: Run, contender: str) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in run.versions[contender].items() if name != "python"
    )


def _outcome_table(outcome: Outcome, case: str) -> Table:
    title = outcome.measurement.title + (f": {case}" if case else "")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("contender")
    for figure in outcome.measurement.figures:
        table.add_column(f"{figure.title} {figure.unit}".strip(), justify="right")
    for row in outcome.rows:
        if row.case == case:
            table.add_row(row.contender.title, *_cells(outcome, row))
    return table


def _cells(outcome: Outcome, row: Row) -> list[str]:
    if row.failed and not row.values:
        return ["failed", *[""] * (len(outcome.measurement.figures) - 1)]
    return [_cell(row.summary(figure.key)) for figure in outcome.measurement.figures]


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    if summary.repetitions == 1:
        return number(summary.median)
    return f"{number(summary.median)} ±{summary.spread:.0%}"


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _floors_table(verdicts: list[Verdict]) -> Table:
    table = Table(title="Floors", title_justify="left", title_style="bold")
    for column in ("what", "floor", "measured", ""):
        table.add_column(column)
    for verdict in verdicts:
        mark = "[green]reached[/green]" if verdict.reached else "[red]missed[/red]"
        table.add_row(verdict.floor.what, verdict.floor.wanted, verdict.text, mark)
    return table


# -- files


def as_json(run: Run, verdicts: list[Verdict], title: str, scale: float) -> dict[str, Any]:
    return {
        "title": title,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "scale": scale,
        "processes": PROCESSES,
        "threads": THREADS,
        "seconds": round(run.seconds),
        "contenders": {
            contender.name: {
                "title": contender.title,
                "durability": contender.durability,
                "note": contender.note,
                "versions": run.versions[contender.name],
            }
            for contender in run.contenders
        },
        "left_out": run.left_out,
        "measurements": [
            {
                "name": outcome.measurement.name,
                "title": outcome.measurement.title,
                "left_out": {contender.name: reason for contender, reason in _left_out(run, outcome)},
                "rows": [_row_json(row) for row in outcome.rows],
            }
            for outcome in run.outcomes
        ],
        "floors": [
            {
                "what": verdict.floor.what,
                "wanted": verdict.floor.wanted,
                "measured": verdict.measured,
                "reached": verdict.reached,
            }
            for verdict in verdicts
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    figures = {}
    for key, values in row.values.items():
        summary = row.summary(key)
        if summary is not None:
            figures[key] = {
                "median": summary.median,
                "low": summary.low,
                "high": summary.high,
                "values": values,
            }
    return {"contender": row.contender.name, "case": row.case, "failed": row.failed, "figures": figures}


def as_markdown(run: Run, title: str) -> str:
    """The figures that are plotted, as tables for the README."""
    parts = [f"{title}.", ""]
    for outcome in run.outcomes:
        figures = [figure for figure in outcome.measurement.figures if figure.plotted]
        if not figures:
            continue
        for case in outcome.cases():
            columns = [f"{figure.title} {figure.unit}".strip() for figure in figures]
            parts += [
                f"**{outcome.measurement.title}{f': {case}' if case else ''}**",
                "",
                f"| | {' | '.join(columns)} |",
                f"| --- |{' ---: |' * len(columns)}",
            ]
            for row in outcome.rows:
                if row.case == case:
                    failed = row.failed and not row.values
                    cells = [row.failed] if failed else [_cell(row.summary(figure.key)) for figure in figures]
                    parts.append(f"| {row.contender.title} | {' | '.join(cells)} |")
            parts.append("")
        left_out = [f"{contender.title} ({reason})" for contender, reason in _left_out(run, outcome)]
        if left_out:
            parts += [f"Left out: {'; '.join(left_out)}.", ""]
    parts += ["| contender | durability | versions | note |", "| --- | --- | --- | --- |"]
    for contender in run.contenders:
        versions = _versions(run, contender.name)
        parts.append(f"| {contender.title} | {contender.durability} | {versions} | {contender.note} |")
    return "\n".join(parts) + "\n"
