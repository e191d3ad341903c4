"""What each piece is worth that is there for speed alone: a drain and an awaited enqueue with all of them, and without
one of them at a time (see `ablations`)."""

from __future__ import annotations

from benchmarks.ablations import PIECES, VARIABLE
from benchmarks.contenders.contender import Contender
from benchmarks.measurements import enqueue
from benchmarks.measurements.drain import MESSAGES, drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.trial import Trial

COMPLETE = "complete"


class Ablation(Measurement):
    name = "ablation"
    title = "Without one piece at a time"
    quick = False
    least_repetitions = 5
    figures = (
        Figure("per_second", "drain, messages/s"),
        CPU[0],
        Figure("enqueued_per_second", "awaited enqueue, one thread, messages/s"),
        Figure("client_cpu_us", "client CPU", "µs/msg"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [COMPLETE, *PIECES] if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            _take_away(trial, case)
            trial.fill(messages)
            drained = drain(trial, messages)
        messages = options.count(enqueue.MESSAGES)
        with Trial(contender, self.name) as trial:
            _take_away(trial, case)
            enqueued = trial.drive("enqueue", messages=messages)
        return {
            **{key: drained[key] for key in ("per_second", "worker_cpu_us") if key in drained},
            "enqueued_per_second": enqueued["per_second"],
            "client_cpu_us": enqueued["driver_cpu"] / messages * 1e6,
        }


def _take_away(trial: Trial, case: str) -> None:
    if case != COMPLETE:
        trial.variables[VARIABLE] = case
