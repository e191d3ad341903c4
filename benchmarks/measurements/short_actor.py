"""Drain of tasks that wait 5 ms each: where the threads are the bound, and the broker stops mattering.

Sixteen threads do 3,200 such tasks a second at best; `share` says how much of that is reached.
"""

from __future__ import annotations

from benchmarks.contenders.contender import PROCESSES, THREADS, Contender
from benchmarks.measurements.drain import drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.trial import Trial

MESSAGES = 10_000
TASK_SECONDS = 0.005


def share_of_bound(per_second: float) -> float:
    """How much of what all threads can do at best is done."""
    return per_second * TASK_SECONDS / (PROCESSES * THREADS)


class ShortActor(Measurement):
    name = "actor"
    title = "Drain of tasks that wait 5 ms, 2 processes × 8 threads"
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("share", "of what 16 threads can do"),
        *CPU,
    )

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES, least=500)
        with Trial(contender, self.name) as trial:
            trial.variables["BENCH_TASK_SECONDS"] = str(TASK_SECONDS)
            trial.fill(messages)
            result = drain(trial, messages)
        return {**result, "share": share_of_bound(result["per_second"])}
