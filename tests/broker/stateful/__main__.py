"""Random programs for as long as is wanted, of the broker as it is or of a broken build."""

from __future__ import annotations

import argparse
import logging

import pytest

from dramatiq_jetstream.testing import NatsServer

from .broken import BUILDS
from .machine import prepared, search

parser = argparse.ArgumentParser(prog="python -m tests.broker.stateful")
parser.add_argument("examples", type=int, help="how many programs to run at most")
parser.add_argument("--steps", type=int, default=12, help="how many commands a program has at most (12)")
parser.add_argument("--broken", choices=BUILDS, metavar="NAME", help=f"put a fault in: {', '.join(BUILDS)}")
options = parser.parse_args()

logging.disable()
# What was acknowledged survives a kill without fsync.
with NatsServer(sync="2m") as server, prepared(server), pytest.MonkeyPatch.context() as patch:
    if options.broken:
        BUILDS[options.broken].patch(patch)
    search(options.examples, steps=options.steps, derandomize=False)
print(f"{options.examples} programs of at most {options.steps} commands found nothing.")
