"""No-op drain: the queue is filled first, then the workers start.

The clock runs from the first message that begins to the last one, so the start of Python does not count. A broker
may still have acks to work off when the last message has run; for ours the time until there are none is measured too.
"""

from __future__ import annotations

import time

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import CPU, MB, Figure, Measurement, Options
from benchmarks.processes import BenchmarkError, wait_until
from benchmarks.trial import Trial

MESSAGES = 50_000
WARM_UP = 45.0
SETTLE = 45_000


class Drain(Measurement):
    name = "drain"
    title = "No-op drain, 2 processes × 8 threads"
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("settled_per_second", "until all acks are handled, messages/s"),
        *CPU,
    )

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = options.count(MESSAGES)
        with Trial(contender, self.name) as trial:
            if contender.in_process:
                return self._in_process(trial, messages)
            trial.fill(messages)
            return drain(trial, messages) | settled(trial, messages)

    def _in_process(self, trial: Trial, messages: int) -> dict[str, float]:
        figures = trial.drive("local_drain", messages=messages)
        return {
            "per_second": trial.tally.read().per_second,
            "worker_cpu_us": figures["worker_cpu"] / messages * 1e6,
            "worker_rss_mb": figures["driver_peak_rss"] / MB,
        }


def settled(trial: Trial, messages: int) -> dict[str, float]:
    """Waits until the broker has handled all acks, where it can be asked."""
    if not trial.contender.wait_until_settled([server.url for server in trial.servers], SETTLE):
        return {}
    return {"settled_per_second": messages / ((time.monotonic_ns() - trial.tally.read().first_ns) / 1e9)}


def drain(trial: Trial, messages: int) -> dict[str, float]:
    """Starts the workers and waits until `messages` have run; CPU time counts from the first of them."""
    server_before = trial.server_usage()
    trial.start_workers()
    wait_until(lambda: trial.tally.read().messages > 0, WARM_UP, "the first message runs")
    worker_before, already = trial.worker_usage(), trial.tally.read().messages
    trial.wait_for(messages)
    count, worker, server = trial.tally.read(), trial.worker_usage(), trial.server_usage()
    if not worker.peak_rss_bytes:
        raise BenchmarkError("the workers were gone before their memory could be read")
    result = {"per_second": count.per_second}
    worker_cpu, server_cpu = worker.cpu_since(worker_before), server.cpu_since(server_before)
    if worker_cpu is not None and server_cpu is not None and server.peak_rss_bytes is not None:
        if already < messages / 2:
            result["worker_cpu_us"] = worker_cpu / (count.messages - already) * 1e6
        result["server_cpu_us"] = server_cpu / count.messages * 1e6
        result["worker_rss_mb"] = worker.peak_rss_bytes / MB
        result["server_rss_mb"] = server.peak_rss_bytes / MB
    return result
