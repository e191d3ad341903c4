"""Idle latency: from the call of enqueue to the start of the task, one message at a time on an idle fleet."""

from __future__ import annotations

import json

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.processes import BenchmarkError
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

PROBES = 500
WARM_UP = 20
GAP = 0.01


class Latency(Measurement):
    name = "latency"
    title = "Idle latency, enqueue to start"
    figures = (Figure("p50_ms", "p50", "ms", plotted=True), Figure("p99_ms", "p99", "ms", plotted=True))

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = WARM_UP + options.count(PROBES)
        with Trial(contender, self.name, samples=messages) as trial:
            if contender.in_process:
                trial.drive("probe", messages=messages, gap=GAP, with_worker=True)
            else:
                trial.start_workers()
                trial.fill(1)  # index 0: the fleet is up when it has run
                trial.wait_for(1)
                trial.drive("probe", messages=messages, gap=GAP)
                trial.wait_for(messages + 1)
            sent = json.loads((trial.tally.directory / "sent").read_text())
            took = [began - called for called, began in zip(sent, trial.tally.times(), strict=True)][WARM_UP:]
        if min(took) < 0:
            raise BenchmarkError("a probe was not run")
        return {"p50_ms": percentile(took, 0.5) / 1e6, "p99_ms": percentile(took, 0.99) / 1e6}
