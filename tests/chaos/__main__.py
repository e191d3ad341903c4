"""Random faults under load, then the books are checked: `python -m tests.chaos --minutes 10`.

There are three subjects: the order service, with `--subject library` the library alone, and with `--subject workers`
the workers of one fleet, which are killed one at a time. The seed is printed; with `--seed` the same faults come in the
same order again.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import network, report
from tests.chaos.directory import directory
from tests.chaos.faults import BY_NAME, Fault, mixed, possible
from tests.chaos.fleet import Topology
from tests.chaos.library import __main__ as library
from tests.chaos.network import Network
from tests.chaos.trial import Result, run
from tests.chaos.workers import __main__ as workers

#: Builds that are broken in one place: modules that workers and operators' commands import, and the front end.
BREAKS: dict[str, tuple[list[str], str]] = {
    "belief": (["tests.chaos.broken_belief"], "web"),
    "claims": ([], "tests.chaos.broken_claims"),
    "double-charge": (["tests.chaos.broken_double_charge"], "web"),
    "access": ([], "tests.chaos.broken_access"),
    "waiting": ([], "tests.chaos.broken_waiting"),
    "patience": (["tests.chaos.broken_patience"], "web"),
    "refund-keys": (["tests.chaos.broken_refund_keys"], "web"),
    "forgotten-refund": (["tests.chaos.broken_forgotten_refund"], "web"),
    "returns": (["tests.chaos.broken_returns"], "web"),
    "shipping": (["tests.chaos.broken_shipping"], "web"),
    "restock": (["tests.chaos.broken_restock"], "web"),
    "chargebacks": ([], "tests.chaos.broken_chargebacks"),
    **{
        name: ([f"tests.chaos.broken_{name}"], "web")
        for name in ("prices", "archive", "restore", "erasure", "filter", "deliveries", "figures")
    },
}


def schedule(
    topology: str, names: list[str] | None, seconds: float, choice: random.Random
) -> Iterator[Fault]:
    """Yield faults until the time is over: each alone in random order, then several at once, and again."""
    deadline = time.monotonic() + seconds
    among = possible(topology, names)
    first = True
    while first or time.monotonic() < deadline:
        for fault in choice.sample(among, len(among)):
            if not first and time.monotonic() > deadline:
                return
            yield fault
        if len(among) > 1:
            yield mixed(among)
        first = False


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    subject = argparse.ArgumentParser(add_help=False)
    subject.add_argument(
        "--subject",
        choices=("orders", "library", "workers"),
        default="orders",
        help="what is put to the proof",
    )
    chosen, others = subject.parse_known_args(arguments)
    if chosen.subject == "library":
        return library.main(others)
    if chosen.subject == "workers":
        return workers.main(others)
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Random faults under load; then the books are checked.",
        parents=[subject],
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults are injected, altogether")
    parser.add_argument("--seed", type=int, help="draw the same faults again")
    parser.add_argument("--topology", choices=("single", "cluster", "both"), default="both")
    parser.add_argument("--faults", help=f"only these, separated by commas: {', '.join(BY_NAME)}")
    parser.add_argument("--rate", type=float, default=6.0, help="orders a second")
    parser.add_argument(
        "--settle", type=float, default=60.0, help="seconds within which all must be finished"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes of each of the two worker fleets")
    parser.add_argument("--keep", type=Path, help="keep logs and stores in this directory")
    parser.add_argument(
        "--patient",
        action=argparse.BooleanOptionalAction,
        help="whether orders wait for a gateway that is away",
    )
    parser.add_argument("--broken", choices=BREAKS, help="break the build, to see it found")
    options = parser.parse_args(arguments)

    names = options.faults.split(",") if options.faults else None
    if names and (unknown := set(names) - BY_NAME.keys()):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    print(f"seed {seed}; {report.machine()}; again with: --seed {seed}", flush=True)
    reason = network.available()
    if reason is not None:
        print(f"no network is cut: that {reason}", flush=True)
    topologies: list[Topology] = ["single", "cluster"] if options.topology == "both" else [options.topology]

    results: list[Result] = []
    for number, topology in enumerate(topologies):
        choice = random.Random(f"{seed}.{topology}")
        seconds = 60 * options.minutes / len(topologies)
        with directory(options.keep, topology) as place:
            results.append(
                _run(topology, schedule(topology, names, seconds, choice), place, seed + number, options)
            )
        print("\n".join(report.verdict_lines(results[-1])), flush=True)
    print(f"\n{report.table(results)}\n")
    print(f"written to {os.path.relpath(report.write(results, seed, options.minutes))}")
    kept = all(result.kept for result in results)
    print("every promise was kept" if kept else "PROMISES WERE BROKEN")
    return 0 if kept else 1


def _run(
    topology: Topology, faults: Iterator[Fault], directory: Path, seed: int, options: argparse.Namespace
) -> Result:
    modules, web = BREAKS.get(options.broken, ([], "web"))
    namespaces = Network().open() if topology == "cluster" and network.available() is None else None
    try:
        return run(
            topology,
            faults,
            directory=directory,
            seed=seed,
            rate=options.rate,
            settle=options.settle,
            say=lambda line: print(line, flush=True),
            network=namespaces,
            processes=options.processes,
            patient=options.patient,
            modules=modules,
            web=web,
        )
    finally:
        if namespaces is not None:
            namespaces.close()


if __name__ == "__main__":
    sys.exit(main())
