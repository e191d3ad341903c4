"""Result round trip: enqueue, run, and the blocking wait for the result, one at a time on an idle fleet."""

from __future__ import annotations

import json

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

PROBES = 500


class Roundtrip(Measurement):
    name = "roundtrip"
    title = "Blocking result round trip"
    figures = (Figure("p50_ms", "p50", "ms", plotted=True), Figure("p99_ms", "p99", "ms", plotted=True))

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        with Trial(contender, self.name) as trial:
            if not contender.in_process:
                trial.start_workers()
                trial.fill(1)
                trial.wait_for(1)
            trial.drive("roundtrip", messages=options.count(PROBES), **_worker(contender))
            took = json.loads((trial.tally.directory / "took").read_text())
        return {"p50_ms": percentile(took, 0.5) * 1e3, "p99_ms": percentile(took, 0.99) * 1e3}


def _worker(contender: Contender) -> dict[str, bool]:
    return {"with_worker": True} if contender.in_process else {}
