"""Batch enqueue: many no-ops handed over at once, the fastest way that each library has."""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import DRIVER, Figure, Measurement, Options, driver_figures
from benchmarks.trial import Trial

MESSAGES = 10_000
EACH, ATOMIC = "each stored by itself", "all or none, 1,000 at a time"


class Batch(Measurement):
    name = "batch"
    title = "Batch enqueue"
    figures = (Figure("per_second", "messages/s", plotted=True), *DRIVER)

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [EACH, ATOMIC] if contender.atomic_batches else [EACH]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            before = trial.server_usage()
            figures = trial.drive("batch", messages=messages, **({"atomic": True} if case == ATOMIC else {}))
            return driver_figures(figures, trial.server_usage().cpu_since(before), messages)
