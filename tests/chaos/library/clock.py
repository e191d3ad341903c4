"""A clock that may be wrong: in a process of the program, `time.time` and `time.time_ns` are off by what a file says.

The file is read ten times a second, so that a fault can set the clock of a process that runs. What the harness compares
is written with `true_time`, the machine's own clock.
"""

from __future__ import annotations

import time
from pathlib import Path

true_time = time.time
_true_time_ns = time.time_ns

INTERVAL_SECONDS = 0.1


def follow(path: Path) -> None:
    """Have the clock of this process go wrong by as many seconds as `path` says."""
    off, read = 0.0, 0.0

    def seconds_off() -> float:
        nonlocal off, read
        if time.monotonic() - read >= INTERVAL_SECONDS:
            read = time.monotonic()
            try:
                off = float(path.read_text())
            except (OSError, ValueError):  # there is none yet, or it is being written
                off = 0.0
        return off

    time.time = lambda: true_time() + seconds_off()
    time.time_ns = lambda: _true_time_ns() + int(seconds_off() * 1e9)
