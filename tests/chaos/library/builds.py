"""Tries the broken builds: `python -m tests.chaos.library.builds [NAME ...]`. Each has to break its promise.

A promise that no mistake can break proves nothing. Each build takes a minute or two, so this is no part of the suite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.chaos.directory import directory
from tests.chaos.library.broken import BREAKS, BREAKS_PROMISE
from tests.chaos.library.faults import BY_NAME
from tests.chaos.library.trial import run

#: The faults without which a mistake does not show.
FAULTS = {"haunt": ("links-lost-long",)}

SEED = 1
RATE = 20.0
SETTLE_SECONDS = 30.0


def finds(name: str) -> bool:
    """Run one broken build and say what of it was found."""
    with directory(None, "single") as place:
        result = run(
            "single",
            [BY_NAME[fault] for fault in FAULTS.get(name, ("nothing", "nothing"))],
            directory=place,
            seed=SEED,
            rate=RATE,
            settle=SETTLE_SECONDS,
            say=lambda _: None,
            broken=(name,),
        )
    found = BREAKS_PROMISE[name] in result.broken
    print(f"{name}: {'found' if found else 'NOT FOUND'}", flush=True)
    for verdict in result.verdicts:
        if not verdict.kept:
            print(f"  {verdict.line()[:300]}", flush=True)
    return found


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - BREAKS.keys():
        print(f"nothing is broken by {', '.join(sorted(unknown))}; there are {', '.join(BREAKS)}")
        return 2
    missed = [name for name in names or BREAKS if not finds(name)]
    print(f"not found: {', '.join(missed)}" if missed else "all were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
