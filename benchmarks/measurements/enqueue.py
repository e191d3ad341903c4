"""Awaited enqueue, from one thread and from eight: how many no-ops are stored per second.

Each call returns after the contender's own confirmation. Asynchronous libraries run tasks on one loop instead of
threads. Nothing consumes meanwhile.
"""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import DRIVER, Figure, Measurement, Options, driver_figures
from benchmarks.trial import Trial

MESSAGES = 5_000
CASES = {"1 thread": 1, "8 threads": 8}


class Enqueue(Measurement):
    name = "enqueue"
    title = "Awaited enqueue"
    figures = (Figure("per_second", "messages/s", plotted=True), *DRIVER)

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return list(CASES)

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES) // 8 * 8
        with Trial(contender, self.name) as trial:
            before = trial.server_usage()
            figures = trial.drive("enqueue", messages=messages, threads=CASES[case])
            return driver_figures(figures, trial.server_usage().cpu_since(before), messages)
