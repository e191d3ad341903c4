"""Many delayed messages, all due at one moment: what the workers' memory grows by, and how late they begin.

The fleet is idle and warm, its memory is read, the messages are enqueued, and the memory is read again shortly
before they are due. How fast they can be enqueued is asked first, so that none is due before all are stored.
"""

from __future__ import annotations

import time

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import MB, Figure, Measurement, Options
from benchmarks.processes import BenchmarkError
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

MESSAGES = 100_000
WARM_UP = 300
QUIET = 5.0  # seconds between the last enqueue and the moment when all are due, at least


class Delayed(Measurement):
    name = "delayed"
    title = "Delayed messages, all due at once"
    quick = False
    repetitions = 1
    figures = (
        Figure("growth_mb", "worker memory grew", "MB", plotted=True),
        Figure("lag_p50_ms", "late p50", "ms"),
        Figure("lag_p99_ms", "late p99", "ms"),
        Figure("early_ms", "earliest", "ms"),
        Figure("per_second", "enqueued/s"),
        Figure("server_rss_mb", "server memory", "MB"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        million = ["1,000,000"] if options.million else []
        return [f"{options.count(MESSAGES):,}", *million]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        messages = int(case.replace(",", ""))
        with Trial(contender, self.name, samples=messages + WARM_UP) as trial:
            trial.start_workers()
            trial.drive("batch", messages=WARM_UP)
            trial.wait_for(WARM_UP)
            far = time.monotonic_ns() + 6 * 3600 * 10**9
            rate = trial.drive("delayed", messages=WARM_UP, first=messages, due_ns=far)["per_second"]
            before = trial.worker_usage()
            due_ns = time.monotonic_ns() + int((messages / rate * 1.6 + 3 * QUIET) * 1e9)
            figures = trial.drive("delayed", messages=messages, due_ns=due_ns)
            left = (due_ns - time.monotonic_ns()) / 1e9
            if left < QUIET:
                raise BenchmarkError(f"enqueuing took until {left:.1f} s before the messages were due")
            time.sleep(left - 1)
            waiting, server = trial.worker_usage(), trial.server_usage()
            trial.wait_for(1 + WARM_UP + messages)
            late = [began - due_ns for began in trial.tally.times()[:messages]]
        if not (before.rss_bytes and waiting.rss_bytes and server.rss_bytes):
            raise BenchmarkError("memory can only be read where there is a /proc")
        return {
            "growth_mb": (waiting.rss_bytes - before.rss_bytes) / MB,
            "lag_p50_ms": percentile(late, 0.5) / 1e6,
            "lag_p99_ms": percentile(late, 0.99) / 1e6,
            "early_ms": min(late) / 1e6,
            "per_second": figures["per_second"],
            "server_rss_mb": server.rss_bytes / MB,
        }
