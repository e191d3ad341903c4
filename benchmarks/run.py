"""Runs the trials, interleaved: one repetition of every contender, then the next one.

A contender that fails says why in its row and does not stop the others.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks import environments
from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import Measurement, Options
from benchmarks.processes import BenchmarkError
from benchmarks.servers import REPOSITORY
from benchmarks.statistics import Summary, summarise


@dataclass
class Row:
    """One contender in one case of one measurement, over all repetitions."""

    contender: Contender
    case: str
    values: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""

    def add(self, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.values.setdefault(key, []).append(value)

    def summary(self, key: str) -> Summary | None:
        return summarise(self.values[key]) if self.values.get(key) else None


@dataclass
class Outcome:
    """All rows of one measurement."""

    measurement: Measurement
    rows: list[Row]

    def row(self, contender: str, case: str) -> Row | None:
        for row in self.rows:
            if (row.contender.name, row.case) == (contender, case):
                return row
        return None

    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))


@dataclass
class Run:
    """Everything that one call of the benchmarks found."""

    contenders: list[Contender]
    left_out: dict[str, str]
    versions: dict[str, dict[str, str]]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0


Say = Callable[[str], None]


def prepare(wanted: Sequence[Contender], say: Say) -> Run:
    """Finds out which contenders can run here and in which versions; installs what is missing."""
    usable: list[Contender] = []
    left_out: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for contender in wanted:
        reason = contender.unavailable()
        if reason is None:
            try:
                if contender.packages:
                    say(f"{contender.title}: its environment")
                versions[contender.name] = {**_distributions(contender), **contender.server_versions()}
                usable.append(contender)
            except BenchmarkError as error:
                reason = str(error)
        if reason is not None:
            left_out[contender.name] = reason
            say(f"{contender.title}: left out, {reason}")
    return Run(usable, left_out, versions)


def _distributions(contender: Contender) -> dict[str, str]:
    contender.python = environments.python_of(contender)
    command = [
        contender.python,
        "-m",
        "benchmarks.driver",
        "versions",
        "--names",
        ",".join(contender.distributions),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise BenchmarkError(f"its packages cannot be used: {done.stderr.strip().splitlines()[-1]}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def measure(run: Run, measurements: Sequence[Measurement], repeat: int, options: Options, say: Say) -> None:
    began = time.monotonic()
    try:
        _measure(run, measurements, repeat, options, say)
    finally:
        run.seconds = time.monotonic() - began


def _measure(run: Run, measurements: Sequence[Measurement], repeat: int, options: Options, say: Say) -> None:
    for measurement in measurements:
        rows = [
            Row(contender, case)
            for contender in run.contenders
            if contender.takes(measurement.name)
            for case in measurement.cases(options, contender)
        ]
        run.outcomes.append(Outcome(measurement, rows))
        repetitions = max(min(repeat, measurement.repetitions or repeat), measurement.least_repetitions)
        for number, row in _interleaved(rows, repetitions):
            name = f"{measurement.name} {number}/{repetitions}  {row.contender.title}  {row.case}".rstrip()
            try:
                figures = measurement.run(row.contender, row.case, options)
            except Exception as error:  # noqa: BLE001 - one contender's failure must not cost the others' figures
                row.failed = str(error) or type(error).__name__
                say(f"{name}: {error}")
                continue
            row.add(figures)
            first = next(figure for figure in measurement.figures if figure.key in figures)
            say(f"{name}: {figures[first.key]:,.4g} {first.unit or first.title}")


def _interleaved(rows: Sequence[Row], repetitions: int) -> Iterator[tuple[int, Row]]:
    """Every row once, then every row again; what failed without ever succeeding is not tried again."""
    for number in range(1, repetitions + 1):
        for row in rows:
            if not row.failed or row.values:
                yield number, row
