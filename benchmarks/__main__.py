"""`python -m benchmarks`: measures the broker beside its peers and its bounds, and shows what it found."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import floors, plots, report
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.contender import Contender
from benchmarks.measurements import MEASUREMENTS
from benchmarks.measurements.measurement import Measurement, Options
from benchmarks.run import Run, measure, prepare
from benchmarks.servers import REPOSITORY

QUICK = 0.1
# A full run is what the README shows; everything else is put where git does not look.
PUBLISHED = REPOSITORY / "benchmarks" / "results"
UNPUBLISHED = REPOSITORY / ".artifacts" / "benchmarks"


def parser() -> argparse.ArgumentParser:
    names = ", ".join(measurement.name for measurement in MEASUREMENTS)
    peers = ", ".join(contender.name for contender in CONTENDERS)
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument(
        "--quick", action="store_true", help="a tenth of the work, once, without the slow measurements"
    )
    result.add_argument("--only", default="", help=f"measurements, separated by commas: {names}")
    result.add_argument("--peers", default="", help=f"contenders, separated by commas: {peers}")
    result.add_argument("--repeat", type=int, help="repetitions (3; with --quick 1)")
    result.add_argument("--scale", type=float, help="share of the full work (1; with --quick 0.1)")
    result.add_argument(
        "--million", action="store_true", help="also 1,000,000 delayed, and waiting for all peers"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="where all figures are written")
    result.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="write SVG plots and a Markdown table there"
    )
    return result


def choose_contenders(text: str) -> list[Contender]:
    known = {contender.name: contender for contender in CONTENDERS}
    return [known[name] for name in _names(text, known)]


def choose_measurements(text: str, *, quick: bool = False) -> list[Measurement]:
    if quick and not text:
        return [measurement for measurement in MEASUREMENTS if measurement.quick]
    known = {measurement.name: measurement for measurement in MEASUREMENTS}
    return [known[name] for name in _names(text, known)]


def _names(text: str, known: dict[str, Contender] | dict[str, Measurement]) -> list[str]:
    wanted = [name.strip() for name in text.split(",") if name.strip()] or list(known)
    for name in wanted:
        if name not in known:
            raise SystemExit(f"there is no {name!r}; choose from {', '.join(known)}")
    return [name for name in known if name in wanted]


def main(arguments: Sequence[str] | None = None) -> Run:
    given = parser().parse_args(arguments)
    scale = given.scale or (QUICK if given.quick else 1.0)
    repeat = given.repeat or (1 if given.quick else 3)
    console = Console(width=None if sys.stdout.isatty() else max(140, shutil.get_terminal_size().columns))
    run = prepare(choose_contenders(given.peers), console.log)
    complete = scale == 1 and not given.only and not given.peers
    measurements = choose_measurements(given.only, quick=given.quick)
    try:
        measure(run, measurements, repeat, Options(scale, given.million), console.log)
    except KeyboardInterrupt:
        complete = False
        console.print("Stopped; what was measured so far:")
    verdicts = floors.judge(run.outcomes)
    title = report.headline(run, repeat, scale)
    report.show(console, run, verdicts, title)
    folder = PUBLISHED if complete else UNPUBLISHED
    figures, drawings = given.json or folder / "results.json", given.plots or folder
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.write_text(json.dumps(report.as_json(run, verdicts, title, scale), indent=1) + "\n")
    written = plots.write(run, title, drawings)
    (drawings / "results.md").write_text(report.as_markdown(run, title))
    console.print(f"figures: {figures}; {len(written)} plots and results.md: {drawings}")
    return run


if __name__ == "__main__":
    # What is started must be ended, also when the benchmarks are told to stop.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
