"""What telemetry costs: the same drain without it, with it switched off, and with an exporter to a sink.

*Without* never calls `configure_telemetry`. *Off* calls it and no endpoint is configured, as in a program that has
telemetry and runs where nobody collects it. *On* exports every span and metric, and the messages carry the trace of
the program that enqueued them.
"""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.drain import MESSAGES, drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.servers import Sink
from benchmarks.trial import Trial

WITHOUT, OFF, ON = "without", "off", "on"


class Telemetry(Measurement):
    name = "telemetry"
    title = "Drain with telemetry"
    quick = False
    figures = (Figure("per_second", "messages/s", plotted=True), *CPU)

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [WITHOUT, OFF, ON] if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            if case != WITHOUT:
                trial.variables["BENCH_TELEMETRY"] = "1"
            if case == ON:
                sink = Sink(trial.directory / "sink")
                trial.helpers.append(sink)
                sink.start()
                trial.variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = sink.url
            trial.fill(messages)
            return drain(trial, messages)
