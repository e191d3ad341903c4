"""Kill workers of a fleet: `python -m tests.chaos --subject workers --kills 200 --minutes 10`."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from tests.chaos import report
from tests.chaos.directory import directory
from tests.chaos.workers.trial import RELOAD, WAYS, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos --subject workers",
        description="Workers under load are killed one at a time; every attempt is accounted for.",
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0, help="over how long they are spread, at least")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rate", type=float, default=60.0, help="messages a second")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds from a kill to the next attempt")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"how they die; {RELOAD} for reloads instead")
    parser.add_argument(
        "--max-tasks", type=int, help="have the fleet replace workers after this many attempts"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep", type=Path, help="keep logs and stores in this directory")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    print(f"seed {seed}; {report.machine()}", flush=True)
    with directory(options.keep, "workers") as place:
        result = run(
            place,
            kills=options.kills,
            seconds=60 * options.minutes,
            seed=seed,
            processes=options.processes,
            threads=options.threads,
            rate=options.rate,
            ways=options.ways.split(","),
            arguments=[] if options.max_tasks is None else ["--max-tasks", str(options.max_tasks)],
            say=lambda line: print(line, flush=True),
        )
    print("\n".join(result.lines()))
    kept = (
        not result.lost
        and not result.unexplained
        and result.fewest >= options.processes - (options.ways != RELOAD)
        and max(result.waits, default=0.0) <= options.longest
    )
    print("every promise was kept" if kept else "PROMISES WERE BROKEN")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
