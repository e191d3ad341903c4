"""Batch enqueue: many no-ops handed over at once, the fastest way that each library has."""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import DRIVER, Figure, Measurement, Options, driver_figures
from benchmarks.trial import Trial

MESSAGES = 20_000


class Batch(Measurement):
    name = "batch"
    title = "Batch enqueue"
    figures = (Figure("per_second", "messages/s", plotted=True), *DRIVER)

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            before = trial.server_usage()
            figures = trial.drive("batch", messages=messages)
            return driver_figures(figures, trial.server_usage().cpu_since(before), messages)
