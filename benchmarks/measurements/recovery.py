"""Recovery: a worker is killed while it runs a message; the server is killed and started again.

After the worker's SIGKILL the clock runs until another worker runs its message; after the server's, from the
moment when it answers again until the first message, enqueued as soon as that succeeds, begins. Every library
keeps its defaults (how long a dead worker keeps its messages, how long a reconnect waits).
"""

from __future__ import annotations

import os
import signal
import time

from benchmarks.contenders.contender import THREADS, Contender
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.processes import BenchmarkError, wait_until
from benchmarks.trial import Trial

UP_TIMEOUT = 60.0
LIMIT, SHORT_LIMIT = 120.0, 45.0
WORKER, SERVER = "worker killed", "server restarted"


class Recovery(Measurement):
    name = "recovery"
    title = "Recovery after SIGKILL"
    quick = False
    figures = (
        Figure("seconds", "until it runs", "s", plotted=True),
        Figure("server_seconds", "server's start", "s"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [WORKER, SERVER]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        with Trial(contender, self.name, samples=2) as trial:
            # Two processes: ours under `fleet work`; with the `dramatiq` command two fleets, because it ends a fleet
            # when one of its processes dies.
            trial.start_fleet(processes=2, threads=THREADS)
            self._wait_for_both(trial)
            limit = LIMIT if options.full else SHORT_LIMIT
            return (
                self._worker_killed(trial, limit) if case == WORKER else self._server_restarted(trial, limit)
            )

    def _wait_for_both(self, trial: Trial) -> None:
        deadline = time.monotonic() + UP_TIMEOUT
        while len(trial.tally.pids()) < 2:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"only one of two processes ran anything within {UP_TIMEOUT:.0f} s")
            trial.require_workers()
            trial.drive("enqueue", messages=100)

    def _worker_killed(self, trial: Trial, limit: float) -> dict[str, float]:
        held = trial.tally.directory / "held"
        trial.drive("hold")
        wait_until(lambda: held.exists() and held.read_text() != "", 30, "the message begins")
        killed = time.monotonic_ns()
        os.kill(int(held.read_text()), signal.SIGKILL)
        return {"seconds": (trial.wait_for_time(1, limit) - killed) / 1e9}

    def _server_restarted(self, trial: Trial, limit: float) -> dict[str, float]:
        driver = trial.start_driver("first_after_restart")
        wait_until((trial.tally.directory / "prepared").exists, 30, "the driver is connected")
        server = trial.servers[0]
        server.kill()
        began = time.monotonic_ns()
        server.start()
        answered = time.monotonic_ns()
        (trial.tally.directory / "go").touch()
        ran = trial.wait_for_time(1, limit)
        trial.finish_driver(driver, timeout=30)
        return {"seconds": (ran - answered) / 1e9, "server_seconds": (answered - began) / 1e9}
