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
from benchmarks.processes import wait_until
from benchmarks.trial import Trial

LIMIT = 120.0
WORKER, SERVER = "worker killed", "server restarted"


class Recovery(Measurement):
    name = "recovery"
    title = "Recovery after SIGKILL"
    figures = (
        Figure("seconds", "until it runs", "s", plotted=True),
        Figure("server_seconds", "server's start", "s"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [WORKER, SERVER]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        with Trial(contender, self.name, samples=2) as trial:
            # Two fleets: where one process of a fleet dies, Dramatiq ends the others.
            trial.start_workers(processes=1, threads=THREADS)
            trial.start_workers(processes=1, threads=THREADS)
            trial.drive("fill", messages=1)
            trial.wait_for(1)
            return self._worker_killed(trial) if case == WORKER else self._server_restarted(trial)

    def _worker_killed(self, trial: Trial) -> dict[str, float]:
        held = trial.tally.directory / "held"
        trial.drive("hold")
        wait_until(lambda: held.exists() and held.read_text() != "", 30, "the message begins")
        killed = time.monotonic_ns()
        os.kill(int(held.read_text()), signal.SIGKILL)
        return {"seconds": (trial.wait_for_time(1, LIMIT) - killed) / 1e9}

    def _server_restarted(self, trial: Trial) -> dict[str, float]:
        driver = trial.start_driver("first_after_restart")
        wait_until((trial.tally.directory / "prepared").exists, 30, "the driver is connected")
        server = trial.servers[0]
        server.kill()
        began = time.monotonic_ns()
        server.start()
        answered = time.monotonic_ns()
        (trial.tally.directory / "go").touch()
        ran = trial.wait_for_time(1, LIMIT)
        trial.finish_driver(driver, timeout=30)
        return {"seconds": (ran - answered) / 1e9, "server_seconds": (answered - began) / 1e9}
