"""The library's chaos from the command line: `python -m tests.chaos --subject library --minutes 10`."""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos import report
from tests.chaos.directory import directory
from tests.chaos.fleet import Topology
from tests.chaos.library.broken import BREAKS
from tests.chaos.library.faults import BY_NAME, Fault, mixed, possible
from tests.chaos.library.trial import Result, run


def schedule(
    topology: str, names: list[str] | None, seconds: float, choice: random.Random
) -> Iterator[Fault]:
    """Yield faults until the time is over: each alone in random order, then several at once, and again."""
    deadline = time.monotonic() + seconds
    among = possible(topology, names)
    while True:
        for number, fault in enumerate(choice.sample(among, len(among)), start=1):
            yield fault
            if time.monotonic() > deadline:
                return
            if number % 4 == 0:
                yield mixed(among, choice)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos --subject library",
        description="Random faults under load on the library alone; then the books are checked.",
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults are injected, altogether")
    parser.add_argument("--seed", type=int, help="draw the same faults again")
    parser.add_argument("--topology", choices=("single", "cluster", "both"), default="both")
    parser.add_argument("--faults", help=f"only these, separated by commas: {', '.join(BY_NAME)}")
    parser.add_argument("--rate", type=float, default=15.0, help="calls a second")
    parser.add_argument("--settle", type=float, default=60.0, help="seconds within which all must be done")
    parser.add_argument("--keep", type=Path, help="keep logs and stores in this directory")
    parser.add_argument("--broken", default="", help=f"break the build, to see it found: {', '.join(BREAKS)}")
    options = parser.parse_args(arguments)

    names = options.faults.split(",") if options.faults else None
    if names and (unknown := set(names) - BY_NAME.keys()):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    broken = tuple(filter(None, options.broken.split(",")))
    if unknown := set(broken) - BREAKS.keys():
        parser.error(f"nothing is broken by {', '.join(sorted(unknown))}; there are {', '.join(BREAKS)}")
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    print(f"seed {seed}; {report.machine()}; again with: --subject library --seed {seed}", flush=True)
    topologies: list[Topology] = ["single", "cluster"] if options.topology == "both" else [options.topology]
    results: list[Result] = []
    for number, topology in enumerate(topologies):
        choice = random.Random(f"{seed}.{topology}")
        seconds = 60 * options.minutes / len(topologies)
        with directory(options.keep, topology) as place:
            result = run(
                topology,
                schedule(topology, names, seconds, choice),
                directory=place,
                seed=seed + number,
                rate=options.rate,
                settle=options.settle,
                say=lambda line: print(line, flush=True),
                broken=broken,
            )
        results.append(result)
        print(f"{topology}: {result.calls} calls, {result.runs} runs, {result.repeated} repeated")
        print("\n".join(f"  {verdict.line()}" for verdict in result.verdicts), flush=True)
    print(f"\n{table(results)}\n")
    print(f"written to {os.path.relpath(_write(results, seed, options.minutes))}")
    kept = all(result.kept for result in results)
    print("every promise was kept" if kept else "PROMISES WERE BROKEN")
    return 0 if kept else 1


def table(results: Sequence[Result]) -> str:
    """Return a markdown table: fault × configuration → stored meanwhile, repeated runs, recovered in."""
    lines = [
        "| Fault | Configuration | Times | Stored meanwhile | Repeated runs | All done after |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        for name in dict.fromkeys(measured.fault for measured in result.measured):
            group = [measured for measured in result.measured if measured.fault == name]
            title = BY_NAME[name].title if name in BY_NAME else "three of these at once"
            lines.append(
                f"| {title} | {report.CONFIGURATION[result.topology]} | {len(group)} | {sum(m.stored for m in group)} "
                f"| {sum(m.repeated for m in group)} | {report.in_words([m.recovered for m in group])} |"
            )
    return "\n".join(lines)


def _write(results: Sequence[Result], seed: int, minutes: float) -> Path:
    report.RESULTS.mkdir(exist_ok=True)
    path = report.RESULTS / f"library-{time.strftime('%Y-%m-%dT%H%M%S')}-{seed}.json"
    document = {
        "seed": seed,
        "minutes": minutes,
        "date": time.strftime("%Y-%m-%d"),
        "machine": report.machine(),
        "results": [result.to_json() for result in results],
    }
    path.write_text(json.dumps(document, indent=1))
    return path


if __name__ == "__main__":
    sys.exit(main())
