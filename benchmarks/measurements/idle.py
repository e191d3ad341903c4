"""Idle memory: what four worker processes of eight threads take when there is nothing to do, supervisor included.

Pages that processes share are divided among them (proportional set size), so a fleet that forks is not charged twice.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.contenders.contender import THREADS, Contender
from benchmarks.measurements.measurement import MB, Figure, Measurement, Options
from benchmarks.processes import BenchmarkError, members, wait_until
from benchmarks.trial import Trial

PROCESSES = 4
UP_TIMEOUT = 90.0
SETTLE_SECONDS = 5.0
PLAIN, SUPERVISED = "dramatiq", "fleet work"


class Idle(Measurement):
    name = "idle"
    title = "Memory of four idle workers"
    quick = False
    figures = (Figure("megabytes", "all processes", "MB", plotted=True), Figure("processes", "processes"))

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [PLAIN, SUPERVISED] if contender.ours else [PLAIN]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        with Trial(contender, self.name, samples=1) as trial:
            start = trial.start_fleet if case == SUPERVISED else trial.start_workers
            start(processes=PROCESSES, threads=THREADS)
            self._wait_for_all(trial)
            time.sleep(SETTLE_SECONDS)
            pids = members(trial.workers)
            return {"megabytes": sum(map(_proportional_bytes, pids)) / MB, "processes": float(len(pids))}

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
