"""Cost with growing work: drain rate and enqueue time with 10,000 to 1,000,000 messages waiting.

The rate is that of the same number of messages in every case: those that begin 2,001st to 9,000th. The rest stays
where it is. A million is waited for by contenders that fill their queue fast enough; `--million` asks all.
"""

from __future__ import annotations

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import MB, Figure, Measurement, Options
from benchmarks.trial import Trial

WAITING = (10_000, 100_000, 1_000_000)
FIRST, LAST = 2_000, 9_000
ENQUEUED = 2_000
FILL_TIMEOUT = 3_600.0


class Growth(Measurement):
    name = "growth"
    title = "Drain and enqueue with messages waiting"
    quick = False
    figures = (
        Figure("per_second", "drained/s", plotted=True),
        Figure("enqueue_us", "one enqueue", "µs"),
        Figure("server_rss_mb", "server memory", "MB"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        sizes = [options.count(size) for size in WAITING]
        largest = len(sizes) if contender.fills_fast or options.million else len(sizes) - 1
        return [f"{size:,} waiting" for size in sizes[:largest]]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        waiting = int(case.split()[0].replace(",", ""))
        first, last = options.count(FIRST, least=2), options.count(LAST, least=10)
        with Trial(contender, self.name, samples=waiting) as trial:
            trial.fill(waiting, FILL_TIMEOUT)
            enqueued = options.count(ENQUEUED)
            figures = trial.drive("enqueue", messages=enqueued)
            server = trial.server_usage()
            trial.start_workers()
            trial.wait_for(last)
            trial.stop_workers()
            began = sorted(moment for moment in trial.tally.times() if moment)
        result = {
            "per_second": (last - first) / ((began[last - 1] - began[first - 1]) / 1e9),
            "enqueue_us": figures["seconds"] / enqueued * 1e6,
        }
        if server.rss_bytes:
            result["server_rss_mb"] = server.rss_bytes / MB
        return result
