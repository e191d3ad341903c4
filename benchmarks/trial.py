"""One trial: one contender, one measurement, one repetition, with servers and a tally of its own.

Everything that a trial starts ends with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.contenders.contender import PROCESSES, THREADS, Contender
from benchmarks.processes import BenchmarkError, Process, Usage, usage_of, wait_until
from benchmarks.servers import REPOSITORY, Server, settle
from benchmarks.tally import Tally

DRIVER_TIMEOUT = 900.0
STUCK_SECONDS = 45.0


class Trial:
    """The tools that measurements are written with."""

    def __init__(self, contender: Contender, measurement: str, samples: int = 0) -> None:
        self.contender = contender
        self.measurement = measurement
        self.python = contender.python
        self.directory = Path(tempfile.mkdtemp(prefix="bench-"))
        self.tally = Tally(self.directory / "tally", samples)
        self.servers = contender.servers(self.directory, measurement)
        self.helpers: list[Server] = []  # further servers, whose use of the machine counts for no contender
        self.variables: dict[str, str] = {}  # further ones for drivers and workers
        self.workers: list[Process] = []
        self.drivers: list[Process] = []
        self.fleets = 0

    def __enter__(self) -> Trial:
        try:
            for server in self.servers:
                server.start()
            settle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in (*self.drivers, *self.workers):
            process.kill()
        for server in (*self.servers, *self.helpers):
            server.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- processes

    def environment(self) -> dict[str, str]:
        paths = [str(REPOSITORY), str(REPOSITORY / "broker"), str(REPOSITORY / "proto")]
        return {
            "PYTHONPATH": ":".join(paths),
            "BENCH_CONTENDER": self.contender.name,
            "BENCH_MEASUREMENT": self.measurement,
            "BENCH_TALLY": str(self.tally.directory),
            **{server.variable: server.url for server in self.servers},
            **self.variables,
        }

    def start_driver(self, operation: str, **options: Any) -> Process:
        command = [self.python, "-m", "benchmarks.driver", operation]
        for key, value in options.items():
            flag = f"--{key.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        log = self.directory / f"driver-{len(self.drivers)}.log"
        driver = Process(command, log, self.environment())
        self.drivers.append(driver)
        return driver

    def finish_driver(self, driver: Process, timeout: float = DRIVER_TIMEOUT) -> dict[str, float]:
        """Waits for a driver to end; returns its figures."""
        if driver.wait(timeout) != 0:
            raise BenchmarkError(f"the driver failed: {driver.complaint()}")
        for line in reversed(driver.log.read_text().splitlines()):
            if line.startswith("{"):
                figures: dict[str, float] = json.loads(line)
                return figures
        raise BenchmarkError(f"the driver gave no figures: {driver.tail(600)}")

    def drive(self, operation: str, timeout: float = DRIVER_TIMEOUT, **options: Any) -> dict[str, float]:
        return self.finish_driver(self.start_driver(operation, **options), timeout)

    def fill(self, messages: int, timeout: float = DRIVER_TIMEOUT) -> None:
        """Fills the queue with no-ops, the fastest way that the contender has."""
        atomic = {"atomic": True} if self.contender.atomic_batches else {}
        self.drive("fill", timeout, messages=messages, **atomic)

    def start_workers(self, processes: int = PROCESSES, threads: int = THREADS) -> list[Process]:
        """Starts one fleet; returns its commands."""
        return self._start(self.contender.workers(self.python, processes, threads))

    def start_fleet(self, processes: int, threads: int = THREADS) -> list[Process]:
        """Starts processes, each of them able to die without the others; returns their commands."""
        return self._start(self.contender.fleet(self.python, processes, threads))

    def _start(self, commands: list[list[str]]) -> list[Process]:
        fleet = []
        for command in commands:
            log = self.directory / f"worker-{len(self.workers)}.log"
            fleet.append(Process(command, log, self.environment()))
            self.workers.append(fleet[-1])
        return fleet

    def stop_workers(self) -> None:
        for process in self.workers:
            process.kill()
        self.workers.clear()

    def require_workers(self) -> None:
        """Raises when a worker command has ended by itself."""
        for process in self.workers:
            process.require_running()

    def worker_usage(self) -> Usage:
        return usage_of(self.workers)

    def server_usage(self) -> Usage:
        return usage_of([server.process for server in self.servers if server.process is not None])

    def usage_of_servers(self) -> dict[str, Usage]:
        """The use of each server by its name."""
        return {
            server.name: usage_of([server.process]) for server in self.servers if server.process is not None
        }

    def stored_bytes(self) -> int:
        """What the servers' stores take on the disk, as far as it is allocated."""
        total = 0
        for server in self.servers:
            for path in server.store.rglob("*"):
                with contextlib.suppress(OSError):  # removed meanwhile
                    total += path.stat().st_blocks * 512
        return total

    # -- waiting

    def wait_for(self, messages: int, timeout: float = 900.0) -> None:
        """Waits until `count` messages have run; gives up sooner when nothing moves any more."""
        deadline = time.monotonic() + timeout
        seen, moved = -1, time.monotonic()
        while (count := self.tally.read().messages) < messages:
            self.require_workers()
            now = time.monotonic()
            if count != seen:
                seen, moved = count, now
            elif now - moved > STUCK_SECONDS:
                raise BenchmarkError(f"stuck at {count} of {messages} messages: {self._worker_log()}")
            if now > deadline:
                raise BenchmarkError(f"{count} of {messages} messages within {timeout:.0f} s")
            time.sleep(0.02)

    def wait_for_time(self, index: int, timeout: float) -> int:
        """Waits until message `index` has begun; returns when that was."""
        wait_until(lambda: self.tally.times()[index] != 0, timeout, f"message {index} runs", interval=0.005)
        return self.tally.times()[index]

    def _worker_log(self) -> str:
        return self.workers[-1].tail(600) if self.workers else "no workers"
