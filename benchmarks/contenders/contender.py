"""The interface of a contender: what the harness starts, and what runs inside its own environment.

A contender has two sides. `Contender` is the harness's: which servers, which worker commands, which packages; it
imports nothing but the standard library. `App` is the library's: it is made inside a driver (the process that
enqueues and keeps the clock) or a worker, both in the contender's own environment.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.servers import Server
from benchmarks.tally import Counter

PROCESSES = 2
THREADS = 8
HOLD_SECONDS = 300.0
RETRY_SECONDS = 60.0
WAIT_SECONDS = 30.0  # the longest that a driver waits for one result


@dataclass(frozen=True)
class Stored:
    """What one stream was given so far: how many messages, and how many bytes of them it has."""

    stream: str
    writes: int
    size: int


class Contender(ABC):
    """One row of the report."""

    name: str
    title: str
    durability: str
    note: str = ""
    environment: str = ""  # its own environment under .venvs; empty: the one that runs the harness
    packages: tuple[str, ...] = ()  # what pip installs there
    distributions: tuple[str, ...] = ()  # whose versions the report shows
    only: tuple[str, ...] = ()  # the measurements that it is made for; empty: all but `orders` and `cluster`
    left_out: Mapping[str, str] = MappingProxyType({})  # measurement -> why this contender is not part of it
    atomic_batches = False  # can store many messages all or none
    fill_threads = 1  # how many enqueue at a time where only the queue is to be filled, or many are delayed
    fills_fast = False  # a million messages are enqueued within a minute or two
    ours = False  # drawn as the one that the report is about
    bound = False  # not a peer: what the machine or a library allows at best
    in_process = False  # its worker runs inside the driver

    python = sys.executable  # what runs it; set by the harness once its environment is there

    def takes(self, measurement: str) -> bool:
        """Whether it is part of a measurement."""
        return (
            measurement in self.only
            if self.only
            else measurement not in ("orders", "cluster", *self.left_out)
        )

    def unavailable(self) -> str | None:
        """Why this contender cannot run here, or None."""
        return None

    def servers(self, store: Path, measurement: str) -> list[Server]:
        """The servers of one trial, not yet started; the broker's own comes first."""
        return []

    def server_versions(self) -> dict[str, str]:
        return {}

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        """The commands that together are one fleet of `processes` × `threads`."""
        return []

    def fleet(self, python: str, processes: int, threads: int) -> list[list[str]]:
        """The commands to run for `processes`; one may die without the others."""
        return [command for _ in range(processes) for command in self.workers(python, 1, threads)]

    def wait_until_settled(self, urls: list[str], timeout: int) -> bool:
        """Waits up to `timeout` ms until the broker has handled all acks; False where it cannot be asked."""
        return False

    def stored(self, servers: list[Server]) -> list[Stored]:
        """What its store has written so far; nothing where it cannot be asked."""
        return []

    @abstractmethod
    def app(self) -> App:
        """The library's side. Imports the library; called in the contender's environment only."""


class App:
    """What a driver does with a contender, and the tasks that its workers run."""

    broker: Any  # what the worker command is pointed at (benchmarks.worker:broker)

    def start(self) -> None:
        """Connects and prepares, so that the first message is not the one that pays for it."""

    def enqueue(self, index: int = -1) -> None:
        """Stores one no-op; returns when the library calls it stored."""
        raise NotImplementedError

    def enqueue_each(self, messages: int, threads: int) -> None:
        """Stores `messages` no-ops one by one, `threads` at a time."""
        if threads == 1:
            for _ in range(messages):
                self.enqueue()
            return

        def part(count: int) -> None:
            for _ in range(count):
                self.enqueue()

        shares = [messages // threads + (1 if rest < messages % threads else 0) for rest in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(part, share) for share in shares]:
                future.result()

    def pump(
        self, take: Callable[[], tuple[int, float] | None], threads: int, *, retry: bool = False
    ) -> None:
        """Stores no-ops one by one, `threads` at a time, as `take` gives them: an index, and when to store it.

        Parameters:
          retry: Try again for a minute when the broker does not take one.
        """

        def part() -> None:
            while (work := take()) is not None:
                index, due = work
                time.sleep(max(0.0, due - time.monotonic()))
                until = time.monotonic() + (RETRY_SECONDS if retry else 0.0)
                while True:
                    try:
                        self.enqueue(index)
                        break
                    except Exception:  # whatever the library raises while its server is away
                        if time.monotonic() >= until:
                            raise
                        time.sleep(0.02)

        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(part) for _ in range(threads)]:
                future.result()

    def enqueue_batch(self, indices: Sequence[int]) -> None:
        """Stores no-ops the fastest way that the library has for many; the default is its only way."""
        for index in indices:
            self.enqueue(index)

    def enqueue_atomic_batch(self, indices: Sequence[int]) -> None:
        """Stores no-ops all or none, as many at a time as the library can."""
        raise NotImplementedError

    def enqueue_delayed(self, indices: Sequence[int], due_ns: int) -> None:
        """Stores no-ops that are due at `due_ns` (monotonic clock)."""
        raise NotImplementedError

    def enqueue_hold(self, index: int) -> None:
        """Stores one message whose first run never ends."""
        raise NotImplementedError

    def ask(self, index: int) -> int:
        """Stores one message and waits for its result, which is `index`."""
        raise NotImplementedError

    def start_worker(self) -> None:
        """Starts the worker of an `in_process` contender."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends connections; bounded."""


class Tasks:
    """The bodies of the tasks, the same for every contender."""

    def __init__(self) -> None:
        self.directory = Path(os.environ["BENCH_TALLY"])
        self.counter = Counter(self.directory)
        self.seconds = float(os.environ.get("BENCH_TASK_SECONDS", "0"))

    def noop(self, index: int, padding: str = "") -> None:
        self.counter.tick(index)
        if self.seconds:
            time.sleep(self.seconds)

    def answer(self, index: int) -> int:
        return index

    def hold(self, index: int) -> None:
        """Its first run marks `index` and never ends; the next one marks `index + 1`."""
        try:
            with (self.directory / "held").open("x") as held:
                held.write(str(os.getpid()))
        except FileExistsError:
            self.counter.tick(index + 1)
            return
        self.counter.tick(index)
        time.sleep(HOLD_SECONDS)


def padding() -> tuple[str, ...]:
    """The further arguments of each no-op: none, or a text that gives it its size."""
    size = int(os.environ.get("BENCH_PADDING", "0"))
    return ("x" * size,) if size else ()


def delay_until(due_ns: int) -> int:
    """Milliseconds from now to `due_ns`."""
    return max(0, (due_ns - time.monotonic_ns()) // 1_000_000)
