"""Counts what workers have run, through shared memory files, at the same small cost for every contender.

A trial has one directory. Each worker process maps one file of its own there (`<pid>.count`), in which each of
its threads owns one slot: how many messages it ran, and when the first and the last of them began. Nothing is
locked and nothing is written to a socket, so counting costs about a microsecond per message. `times` is one file
for the whole trial with one slot per message: when it began (monotonic nanoseconds, comparable between
processes of one machine), 0 if it never did.

Standard library only: this runs in every contender's environment.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SLOTS = 64
FIELDS = 3  # count, first, last
SIZE = SLOTS * FIELDS * 8


def _map(path: Path, size: int) -> memoryview:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        return memoryview(mmap.mmap(descriptor, size)).cast("q")
    finally:
        os.close(descriptor)


class Counter:
    """The worker's side. Made once per process, after the fork."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pid = 0

    def _open(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                return
            self._view = _map(self.directory / f"{os.getpid()}.count", SIZE)
            times = self.directory / "times"
            self._times = _map(times, times.stat().st_size) if times.exists() else None
            self._taken = 0
            self._local = threading.local()
            self._pid = os.getpid()

    def tick(self, index: int = -1) -> None:
        """One message began; `index` is its place in `times`, if it has one."""
        now = time.monotonic_ns()
        if self._pid != os.getpid():
            self._open()
        slot = getattr(self._local, "slot", None)
        if slot is None:
            with self._lock:
                slot = self._local.slot = (self._taken % SLOTS) * FIELDS
                self._taken += 1
            self._view[slot + 1] = now
        self._view[slot] += 1
        self._view[slot + 2] = now
        if index >= 0 and self._times is not None:
            self._times[index] = now


@dataclass(frozen=True)
class Count:
    """What has run so far: how many, and when the first and the last of them began."""

    messages: int
    first_ns: int
    last_ns: int

    @property
    def seconds(self) -> float:
        return (self.last_ns - self.first_ns) / 1e9

    @property
    def per_second(self) -> float:
        return (self.messages - 1) / self.seconds if self.messages > 1 and self.seconds > 0 else 0.0


class Tally:
    """The harness's side: one directory, read while the workers write."""

    def __init__(self, directory: Path, samples: int = 0) -> None:
        self.directory = directory
        self.samples = samples
        directory.mkdir(parents=True, exist_ok=True)
        if samples:
            _map(directory / "times", samples * 8).release()

    def read(self) -> Count:
        messages, firsts, lasts = 0, [], []
        for path in self.directory.glob("*.count"):
            values = memoryview(path.read_bytes()).cast("q")
            for slot in range(0, len(values), FIELDS):
                if values[slot]:
                    messages += values[slot]
                    firsts.append(values[slot + 1])
                    lasts.append(values[slot + 2])
        return Count(messages, min(firsts, default=0), max(lasts, default=0))

    def pids(self) -> dict[int, int]:
        """Messages run so far by each worker process."""
        counts = {}
        for path in self.directory.glob("*.count"):
            values = memoryview(path.read_bytes()).cast("q")
            counts[int(path.stem)] = sum(values[slot] for slot in range(0, len(values), FIELDS))
        return counts

    def times(self) -> list[int]:
        """When each message began, 0 for those that did not."""
        if not self.samples:
            return []
        return memoryview((self.directory / "times").read_bytes()).cast("q").tolist()
