"""Random programs for as long as is wanted, of the broker as it is or of a broken build."""

from __future__ import annotations

import argparse
import logging
import sys

import pytest

from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.testing import NatsServer

from .broken import BUILDS, Build
from .machine import IMPATIENCE, Machine, drive, prepared, search

#: How often a program is run before it is said that it shows nothing: a slow machine may be too late to see a fault.
TIMES = 10


def found(build: Build) -> bool:
    """Whether the program that shows a fault shows it in the build that has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "patience", IMPATIENCE)
        build.patch(patch)
        for _ in range(TIMES):
            try:
                drive(build.program)
            except (AssertionError, InvalidOption) as verdict:
                if build.verdict in str(verdict):
                    return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.broker.stateful", description=__doc__)
    parser.add_argument("examples", type=int, nargs="?", help="how many random programs to run at most")
    parser.add_argument("--steps", type=int, default=12, help="how many commands a program has at most (12)")
    parser.add_argument(
        "--broken", choices=BUILDS, metavar="NAME", help=f"put a fault in: {', '.join(BUILDS)}"
    )
    options = parser.parse_args()
    logging.disable()
    missed = []
    # What was acknowledged survives a kill without fsync.
    with NatsServer(sync="2m") as server, prepared(server), pytest.MonkeyPatch.context() as patch:
        if options.examples is None:
            for name in [options.broken] if options.broken else BUILDS:
                seen = found(BUILDS[name])
                print(f"{name}: {'found' if seen else 'NOT FOUND'}", flush=True)
                missed += [] if seen else [name]
        else:
            if options.broken:
                BUILDS[options.broken].patch(patch)
            search(options.examples, steps=options.steps, derandomize=False)
            print(f"{options.examples} programs of at most {options.steps} commands found nothing.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
