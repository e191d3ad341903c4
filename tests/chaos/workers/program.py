"""The program whose workers are killed: each attempt is two lines in a file; three actors take their process along.

began <id> <pid> <monotonic ns>
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from pathlib import Path

import dramatiq

from dramatiq_jetstream import JetStreamBroker

RUNS = Path(os.environ["CHAOS_RUNS"])

broker = JetStreamBroker(
    os.environ["CHAOS_URL"], ack_wait=int(os.environ["CHAOS_ACK_WAIT"]), max_deliveries=50
)
dramatiq.set_broker(broker)


def note(what: str, key: str) -> None:
    # One short write in append mode is not torn by another process.
    with RUNS.open("a") as runs:
        runs.write(f"{what} {key} {os.getpid()} {time.monotonic_ns()}\n")


@dramatiq.actor(max_retries=0)
def work(key: str, milliseconds: int) -> None:
    """Works for a while, half of it without letting other threads run."""
    note("began", key)
    until = time.monotonic() + milliseconds / 2000
    while time.monotonic() < until:
        sum(range(1_000))
    time.sleep(milliseconds / 2000)
    note("ended", key)


def _first_time(key: str) -> bool:
    try:
        (RUNS.parent / key).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dramatiq.actor(max_retries=0, queue_name="deadly")
def leave(key: str) -> None:
    """Ends its process without a word, the first time."""
    note("began", key)
    if _first_time(key):
        os._exit(3)
    note("ended", key)


@dramatiq.actor(max_retries=0, queue_name="deadly")
def crash(key: str) -> None:
    """Reads where there is no memory, the first time."""
    note("began", key)
    if _first_time(key):
        ctypes.string_at(0)
    note("ended", key)


@dramatiq.actor(max_retries=0, queue_name="deadly")
def hoard(key: str) -> None:
    """Takes memory until there is none, the first time, and ends as C++ does then."""
    note("began", key)
    if _first_time(key):
        resource.setrlimit(
            resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 8,) * 2
        )
        hoarded = []
        try:
            while True:
                hoarded.append(bytearray(16 * 1024 * 1024))
        except MemoryError:
            os.abort()
    note("ended", key)
