"""What it costs to see a fleet: the same drain with each setting of the history, and with workers that stay unseen.

*None* keeps no history. *Failures*, the default, records nothing of these messages, which all succeed. *A tenth* and
*all* record successes. *Unseen* is the default without the writes of presence, of which each process makes one a
second while it works.
"""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.drain import MESSAGES, drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.trial import Trial

#: What each case tells the processes.
VARIABLES = {
    "none": {"BENCH_HISTORY": "none"},
    "failures": {},
    "a tenth": {"BENCH_HISTORY": "0.1"},
    "all": {"BENCH_HISTORY": "all"},
    "unseen": {"BENCH_UNSEEN": "1"},
}


class History(Measurement):
    name = "history"
    title = "Drain with history and presence"
    quick = False
    figures = (Figure("per_second", "messages/s", plotted=True), *CPU)

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return list(VARIABLES) if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            trial.variables |= VARIABLES[case]
            trial.fill(messages)
            return drain(trial, messages)
