"""Idle workers: the memory of four processes of eight threads, supervisor included, and the messages of many consumers.

Pages that processes share are divided among them (proportional set size), so a fleet that forks is not charged twice.
The messages are those that a server receives from and sends to six processes of ours that serve 20 queues with 9
priorities each, so that 1,080 consumers have a request at it (see `benchmarks.idle_consumers`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.contenders.contender import THREADS, Contender
from benchmarks.measurements.measurement import MB, Figure, Measurement, Options
from benchmarks.processes import BenchmarkError, Process, members, wait_until
from benchmarks.trial import Trial

PROCESSES = 4
UP_TIMEOUT = 90.0
SETTLE_SECONDS = 5.0
PLAIN, SUPERVISED, MANY = "dramatiq", "fleet work", "20 queues × 9 priorities"

#: How long messages are counted, and how long that takes at most with all else, in seconds.
COUNT_SECONDS = 60.0
COUNT_TIMEOUT = 240.0


class Idle(Measurement):
    name = "idle"
    title = "Idle workers"
    quick = False
    figures = (
        Figure("megabytes", "all processes", "MB", plotted=True),
        Figure("processes", "processes"),
        Figure("messages_per_second", "of each process", "messages/s"),
        Figure("server_cpu", "server CPU", "of a core"),
        Figure("process_cpu", "each process's CPU", "of a core"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        if contender.name == "jetstream":
            return [PLAIN, SUPERVISED, MANY]
        return [PLAIN, SUPERVISED] if contender.ours else [PLAIN]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        if case == MANY:
            return self._count_messages(contender, max(10.0, COUNT_SECONDS * options.scale))
        with Trial(contender, self.name, samples=1) as trial:
            start = trial.start_fleet if case == SUPERVISED else trial.start_workers
            start(processes=PROCESSES, threads=THREADS)
            self._wait_for_all(trial)
            time.sleep(SETTLE_SECONDS)
            pids = members(trial.workers)
            return {"megabytes": sum(map(_proportional_bytes, pids)) / MB, "processes": float(len(pids))}

    def _count_messages(self, contender: Contender, seconds: float) -> dict[str, float]:
        with Trial(contender, self.name) as trial:
            command = [sys.executable, "-m", "benchmarks.idle_consumers", "--json", "--seconds", str(seconds)]
            program = Process(command, trial.directory / "idle.log", trial.environment())
            trial.drivers.append(program)
            return trial.finish_driver(program, COUNT_TIMEOUT + seconds)

    def _wait_for_all(self, trial: Trial) -> None:
        deadline = time.monotonic() + UP_TIMEOUT
        while len(trial.tally.pids()) < PROCESSES:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"fewer than {PROCESSES} workers ran anything within {UP_TIMEOUT:.0f} s")
            trial.require_workers()
            trial.drive("enqueue", messages=400)
        wait_until(lambda: len(members(trial.workers)) > PROCESSES, 30, "all processes are there")


def _proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError("this system does not tell the proportional set size of a process")
