"""What telemetry costs: the same drain without it, and instrumented, with traces that are sampled and that are not.

*Without* is not instrumented. The others are, on OpenTelemetry's SDK as it is, and the messages carry the trace of the
program that enqueued them. *Not sampled*: that program decided that its trace is not recorded, as most do that sample.
*Sampled*: every span is exported, to a sink. Neither exports metrics; *metrics* exports them alone.
"""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.drain import MESSAGES, drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.servers import Sink
from benchmarks.trial import Trial

WITHOUT, NOT_SAMPLED, SAMPLED, METRICS = "without", "not sampled", "sampled", "metrics"

#: What a case tells every process besides the endpoint.
VARIABLES = {
    NOT_SAMPLED: {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "parentbased_always_off"},
    SAMPLED: {"OTEL_TRACES_EXPORTER": "otlp"},
    METRICS: {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "parentbased_always_off"},
}


class Telemetry(Measurement):
    name = "telemetry"
    title = "Drain with telemetry"
    quick = False
    figures = (Figure("per_second", "messages/s", plotted=True), *CPU)

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [WITHOUT, *VARIABLES] if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            if case != WITHOUT:
                sink = Sink(trial.directory / "sink")
                trial.helpers.append(sink)
                sink.start()
                trial.variables |= {
                    "BENCH_TELEMETRY": "1",
                    "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url,
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                    **VARIABLES[case],
                }
            trial.fill(messages)
            return drain(trial, messages)
